"""timm's Swin V2 as host."""

import copy
import pickle

import pytest
import timm
import torch
import torch.nn.functional as F

import visionpos as vp
from tests.small import in_turn, pictures
from visionpos.hosts.swin_v2 import CosineWindowAttention

ENCODINGS = [name for name in vp.list_encodings() if name != "none"]
SIZE = (32, 48)


def swin(lively=False, **options):
    torch.manual_seed(0)
    options = {"img_size": SIZE, "patch_size": 2, "window_size": 4, "num_classes": 5, "embed_dim": 16} | options
    options = {"depths": (2, 1), "num_heads": (1, 4), "drop_path_rate": 0.0} | options
    model = timm.create_model("swinv2_tiny_window8_256", **options).eval()
    with torch.no_grad():  # timm begins with zero norms at the end of every branch: attention would not show
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.add_(0.5)
            if lively and "cpb_mlp" in name:
                parameter.mul_(10)
    return model


def close(got, want):
    """tau comes with the length of k, where timm multiplies the product: other roundings."""
    assert want.abs().max() > 0
    assert (got - want).abs().max() <= 2e-6 * want.abs().max()


@pytest.mark.parametrize("pretrained", [0, 12])
@pytest.mark.parametrize("window", [4, (4, 8), (2, 3)])
def test_converting_to_what_the_host_has_changes_nothing(window, pretrained):
    options = {"window_size": window, "pretrained_window_sizes": (pretrained,) * 2, "lively": True}
    plain, model = swin(**options), swin(**options)
    vp.set_encoding(model, "log_cpb")
    close(model(pictures()), plain(pictures()))
    assert isinstance(model, type(plain))
    assert list(model.state_dict()) == list(plain.state_dict())
    assert [n for n, _ in model.named_parameters()] == [n for n, _ in plain.named_parameters()]
    assert all("cpb_mlp" in name for name in model.no_weight_decay() ^ plain.no_weight_decay())  # timm 1.0.26 forgets
    model.load_state_dict(plain.state_dict(), strict=True)


def test_weight_decay_spares_every_encoding():
    spared = vp.set_encoding(swin(), {"name": "log_cpb", "init_std": 0.1}).no_weight_decay()
    assert {"layers.0.blocks.0.attn.cpb_mlp.0.weight", "layers.1.blocks.0.attn.cpb_mlp.2.weight"} <= spared
    model = vp.set_encoding(swin(), "relative_table+learned")
    spared = model.no_weight_decay()
    assert {"layers.0.blocks.0.attn.encodings.0.relative_position_bias_table", "pos_embed_input.0.pos_embed"} <= spared
    assert not any("cpb_mlp" in name for name in [*spared, *model.state_dict()])


def test_fused_attention_agrees():
    model = vp.set_encoding(swin(), "log_cpb+rope_axial")
    want = model(pictures())
    for module in model.modules():
        if isinstance(module, CosineWindowAttention):
            module.fused_attn = True
    assert 0 < (model(pictures()) - want).abs().max() < 1e-5


@pytest.mark.parametrize("separate", [False, True])
def test_rotations_turn_what_the_cosine_is_taken_of(separate):
    """Against the formula: tau cos(q, k) of rotated q and k."""
    model = vp.set_encoding(swin(window_size=(2, 3)), "rope_axial")
    attn = model.layers[0].blocks[0].attn
    attn.qkv_bias_separate = separate
    with torch.no_grad():
        attn.q_bias.normal_()
    x = torch.randn(4, 6, 16)
    bias = torch.cat([attn.q_bias, torch.zeros(16), attn.v_bias])
    q, k, v = ((x @ attn.qkv.weight.t() + bias).view(4, 6, 3, 1, 16).permute(2, 0, 3, 1, 4)).double()
    q, k = attn.encodings[0](F.normalize(q, dim=-1), F.normalize(k, dim=-1), vp.Positions.grid((2, 3)))
    logits = q @ k.mT * attn.logit_scale.exp().double()
    want = attn.proj((logits.softmax(-1) @ v).transpose(1, 2).flatten(2).float())
    assert (attn(x) - want).abs().max() < 1e-6


@pytest.mark.parametrize("name", in_turn(ENCODINGS, 2))
def test_every_encoding_trains(name):
    model = vp.set_encoding(swin(), name).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for _ in range(2):
        optimizer.zero_grad()
        F.cross_entropy(model(pictures()), torch.tensor([1, 3])).backward()
        optimizer.step()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert {encoding.name for encoding in vp.get_encoding(model)} == {name}


def test_none_removes_every_position_inside_a_window():
    """One window that is the whole grid, no shift: moving patches changes nothing."""
    model = swin(img_size=(8, 12), window_size=(4, 6), depths=(1,), num_heads=(2,), lively=True)
    x = pictures((8, 12))
    moved = torch.cat([x[..., 6:], x[..., :6]], -1)
    assert (model(moved) - model(x)).abs().max() > 1e-4
    vp.set_encoding(model, "none")
    assert (model(moved) - model(x)).abs().max() < 1e-5
    assert vp.get_encoding(model) == []


@pytest.mark.parametrize("pretrained", [0, 6])
def test_window_and_picture_size_can_change(pretrained):
    options = {"pretrained_window_sizes": (pretrained,) * 2, "lively": True}
    plain, model = swin(**options), vp.set_encoding(swin(**options), "log_cpb+learned")
    with torch.no_grad():
        model.pos_embed_input[0].pos_embed.zero_()
    for changed in (plain, model):
        changed.set_input_size((48, 80), window_size=(6, 8))
    x = pictures((48, 80))
    close(model(x), plain(x))
    assert model.pos_embed_input[0].feat_shape == (24, 40)
    vp.set_encoding(model, "log_cpb+relative_table")
    model.set_input_size(SIZE, window_size=4)
    assert model.layers[0].blocks[0].attn.encodings[1].feat_shape == (4, 4)
    assert model(pictures()).shape == (2, 5)


def test_the_network_comes_back_with_its_weights_and_the_pretrained_window():
    model = swin(pretrained_window_sizes=(12, 6))
    network = model.layers[0].blocks[0].attn.cpb_mlp
    vp.set_encoding(model, "rope_axial+log_cpb")
    assert model.layers[0].blocks[0].attn.cpb_mlp is network
    vp.set_encoding(model, "none")
    assert model.layers[0].blocks[0].attn.cpb_mlp is None
    vp.set_encoding(model, "log_cpb")
    assert model.layers[0].blocks[0].attn.cpb_mlp is not network
    assert [e.pretrained_window for e in vp.get_encoding(model)] == [(12, 12), (12, 12), (6, 6)]
    assert list(model.state_dict()) == list(swin().state_dict())


def test_copies_are_independent():
    model = vp.set_encoding(swin(), "learned+log_cpb")
    want = model(pictures())
    want.sum().backward()
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(copied(pictures()), want)
        with torch.no_grad():
            copied.pos_embed_input[0].pos_embed.normal_()
            copied.layers[0].blocks[0].attn.cpb_mlp[2].weight.normal_()
        assert not torch.equal(copied(pictures()), want)
    assert torch.equal(model(pictures()), want)


def test_gradient_checkpointing():
    model = vp.set_encoding(swin(), "log_cpb+rope_axial+peg").train()

    def gradients():
        model.zero_grad()
        model(pictures()).square().sum().backward()
        return [parameter.grad.clone() for parameter in model.parameters()]

    plain = gradients()
    model.set_grad_checkpointing()
    assert all((a - b).abs().max() < 1e-6 for a, b in zip(plain, gradients(), strict=True))


def test_forward_intermediates():
    plain, model = swin(lively=True), vp.set_encoding(swin(lively=True), "log_cpb")
    wanted, got = plain.forward_intermediates(pictures())[1], model.forward_intermediates(pictures())[1]
    for a, b in zip(wanted, got, strict=True):
        close(b, a)
    vp.set_encoding(model, "log_cpb+sincos2d")
    last, taken = model.forward_intermediates(pictures())
    assert [tuple(t.shape) for t in taken] == [(2, 16, 16, 24), (2, 32, 8, 12)]
    assert torch.equal(last, model.forward_features(pictures()))


def test_meta_initialisation():
    """No shifted windows: timm 1.0.26 does not compute their masks again."""
    with torch.device("meta"):
        model = vp.set_encoding(swin(depths=(1, 1)), "log_cpb")
    model.to_empty(device="cpu")
    source = vp.set_encoding(swin(depths=(1, 1)), "log_cpb")
    for buffer in model.buffers():
        buffer.fill_(-12345)
    model.load_state_dict(source.state_dict(), strict=True)
    for module in model.modules():
        if hasattr(module, "init_non_persistent_buffers"):
            module.init_non_persistent_buffers()
    assert torch.equal(model(pictures()), source(pictures()))
