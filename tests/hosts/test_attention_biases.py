"""Families with LeViT's table as hosts: it is kept under timm's name and in timm's layout, and others act beside it."""

import copy

import pytest
import timm
import torch

import visionpos as vp
from tests.hosts.families import deeper
from tests.small import needs_newer_timm, pictures, randomised
from visionpos.analysis.zoo import ZOO, build

# timm's rounding of the same sums: a bias of three axes does not reach torch's fused attention there
FAMILIES = {
    "TinyViT": 1e-6,
    "LeViT": 0,
    "LeViT of convolutions": 1e-5,
    "EfficientFormer": 0,
    "EfficientFormerV2": 0,
    "EfficientViT": 1e-5,
}
FAMILIES = {family: bound for family, bound in FAMILIES.items() if family.partition(" of ")[0] in ZOO}
ANY_SIZE = {"TinyViT": (40, 72), "EfficientViT": (64, 112)}  # whose grids are no whole number of windows


def plain_model(family):
    torch.manual_seed(0)
    family, _, kind = family.partition(" of ")
    model, size = build(family, **deeper(family), **({"use_conv": True} if kind else {}))
    return randomised(model, scale=0.2), pictures(size)


def close(a, b, tolerance):
    assert (a - b).abs().max() <= tolerance * b.abs().max().clamp(min=1)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_converting_to_what_the_host_has_changes_nothing(family):
    plain, x = plain_model(family)
    model = copy.deepcopy(plain)
    assert {(encoding.name, encoding.preset) for encoding in vp.get_encoding(model)} == {("relative_table", "levit")}
    for _ in range(2):
        shapes = {key: tensor.shape for key, tensor in plain.state_dict().items()}
        assert {key: tensor.shape for key, tensor in model.state_dict().items()} == shapes
        close(model(x), plain(x), FAMILIES[family])
        close(model.double()(x.double()), copy.deepcopy(plain).double()(x.double()), 1e-13)
        model.float().load_state_dict(plain.state_dict())
        vp.set_encoding(model, "relative_table")
    for got, want in zip(model.forward_intermediates(x)[1], plain.forward_intermediates(x)[1], strict=True):
        close(got, want, FAMILIES[family])


@pytest.mark.parametrize("family", [family for family in ANY_SIZE if family in ZOO])
@torch.no_grad()
def test_pictures_of_another_size(family):
    plain, _ = plain_model(family)
    model, x = copy.deepcopy(plain), pictures(ANY_SIZE[family])
    vp.get_encoding(model)
    close(model(x), plain(x), FAMILIES[family])
    assert vp.set_encoding(model, "learned+rope_axial+lepe+peg")(x).isfinite().all()


@pytest.mark.parametrize("family", FAMILIES)
def test_the_bias_is_looked_up_anew_after_a_step_in_evaluation(family):
    """timm keeps what it looked up last while a model is in evaluation."""
    plain, x = plain_model(family)
    model = copy.deepcopy(plain)
    vp.get_encoding(model)
    with torch.no_grad():
        model(x)
        for each in (model, plain):
            for name, parameter in each.named_parameters():
                if "attention_biases" in name:
                    parameter.mul_(-1.5)
        close(model(x), plain(x), FAMILIES[family])


@pytest.mark.parametrize("family", FAMILIES)
def test_a_table_leaves_its_name_only_when_it_goes(family):
    plain, x = plain_model(family)
    state = {key: tensor.clone() for key, tensor in plain.state_dict().items()}
    tables = [key for key in state if key.endswith("attention_biases")]
    model = vp.set_encoding(copy.deepcopy(plain), "relative_table+alibi2d")
    assert all(torch.equal(model.state_dict()[key], state[key]) for key in tables)
    close(vp.set_encoding(model, "relative_table")(x), plain(x), FAMILIES[family])
    assert (vp.set_encoding(model, "none")(x) - plain(x)).abs().max() > 1e-3
    assert not set(tables) & set(model.state_dict())
    vp.set_encoding(model, {"name": "relative_table", "preset": "levit"})
    assert {key: tensor.shape for key, tensor in model.state_dict().items()} == {
        key: tensor.shape for key, tensor in state.items()
    }
    assert all((model.state_dict()[key] == 0).all() for key in tables)
    vp.set_encoding(model, {"name": "relative_table", "preset": "swin"})  # has a name of its own
    assert not set(tables) & set(model.state_dict())


def test_the_trained_grid_of_a_tiny_vit_is_that_of_its_configuration():
    size = {"pretrained_cfg_overlay": {"input_size": (3, 96, 160)}, "depths": (1, 1), "embed_dims": (12, 48)}
    model = timm.create_model("tiny_vit_5m_224", num_heads=(1, 3), window_sizes=(4, 4), **size)
    assert vp.set_encoding(model, "learned").pos_embed_input[0].feat_shape == (24, 40)


@needs_newer_timm
@torch.no_grad()
def test_the_input_size_of_an_efficient_vit_changes_as_in_timm():
    """Smaller pictures have smaller windows, for which tables are resized; bicubically too, with mirror images here."""
    plain, _ = plain_model("EfficientViT")
    model, small = copy.deepcopy(plain), (32, 80)
    vp.set_encoding(model, "relative_table+learned")
    for each in (model, plain):
        each.set_input_size(small)
    assert [block.attn.encodings[0].feat_shape for block in model.stages[0].blocks] == [(2, 2)] * 2
    assert model.pos_embed_input[0].feat_shape == (2, 5)
    assert {key: tensor.shape for key, tensor in plain.state_dict().items()}.items() <= {
        key: tensor.shape for key, tensor in model.state_dict().items()
    }.items()
    vp.set_encoding(model, "relative_table").load_state_dict(plain.state_dict())
    close(model(pictures(small)), plain(pictures(small)), 1e-5)


@needs_newer_timm
def test_each_head_of_an_efficient_vit_has_its_own_part_of_an_encoding():
    """The last head's slope changes its own output alone, in the layer that has it; the first head's those after it."""
    plain, x = plain_model("EfficientViT")
    model = vp.set_encoding(plain, {"name": "kerple", "layers": [0]})
    attn, heard = model.stages[0].blocks[0].attn, []
    attn.proj.register_forward_pre_hook(lambda module, args: heard.append(args[0].chunk(3, dim=1)))
    model(x)
    for head, changed in ((2, [False, False, True]), (0, [True, True, True])):
        with torch.no_grad():
            attn.encodings[0].r1[head] += 1
        model(x)
        assert [not torch.equal(a, b) for a, b in zip(heard[-1], heard[-2], strict=True)] == changed
