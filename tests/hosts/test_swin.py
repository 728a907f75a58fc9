"""timm's Swin v1 as host."""

import copy
import pickle

import pytest
import torch

import visionpos as vp
from tests.small import in_turn, pictures, swin

IN_WINDOWS = [name for name in vp.list_encodings() if vp.encoding_info(name)["place"] in ("rotary", "bias")]
SIZE = (64, 96)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("window", [4, (4, 8), (2, 3)])
def test_converting_to_what_the_host_has_changes_nothing(window, fused):
    plain, model = swin(window_size=window), swin(window_size=window)
    vp.set_encoding(model, "relative_table")
    for module in [*plain.modules(), *model.modules()]:
        if hasattr(module, "fused_attn"):
            module.fused_attn = fused
    difference = (model(pictures(SIZE)) - plain(pictures(SIZE))).abs().max()
    assert difference < 1e-6 if fused else difference == 0
    assert isinstance(model, type(plain))
    assert list(model.state_dict()) == list(plain.state_dict())
    assert [n for n, _ in model.named_parameters()] == [n for n, _ in plain.named_parameters()]
    assert model.no_weight_decay() == plain.no_weight_decay()
    model.load_state_dict(plain.state_dict(), strict=True)


def test_a_training_step_of_the_converted_model_is_timms():
    def step(model):
        out = model(pictures(SIZE))
        return out, torch.autograd.grad(out.square().sum(), model.parameters())

    plain, model = swin(drop_path_rate=0.0).train(), vp.set_encoding(swin(drop_path_rate=0.0), "relative_table").train()
    (want, gradients), (got, found) = (step(either) for either in (plain, model))
    assert torch.equal(got, want)
    assert all((a - b).abs().max() <= 1e-5 * b.abs().max() for a, b in zip(found, gradients, strict=True))


def test_pictures_of_any_size():
    """timm builds the shift masks in every forward pass then."""
    plain, model = (swin(strict_img_size=False) for _ in range(2))
    vp.set_encoding(model, "relative_table")
    for size in ((64, 96), (48, 112), (80, 32)):
        assert torch.equal(model(pictures(size)), plain(pictures(size)))
        assert not torch.equal(model(-pictures(size)), plain(pictures(size)))


@pytest.mark.parametrize("dynamic", [False, True])
def test_shift_masks_hide_fully_at_every_size(dynamic):
    model = vp.set_encoding(swin(strict_img_size=not dynamic), "relative_table")
    model.set_input_size((96, 144), window_size=6)
    block = model.layers[0].blocks[1]
    mask = block.get_attn_mask(torch.zeros(1, 24, 36, 1)) if dynamic else block.attn_mask
    assert torch.equal(mask, vp.shifted_window_mask((24, 36), (6, 6), (3, 3)))


@pytest.mark.parametrize("name", in_turn([*IN_WINDOWS, "learned", "sincos2d", "sinusoidal"], 2))
def test_every_encoding_trains(name):
    model = vp.set_encoding(swin(), name).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for _ in range(3):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(pictures(SIZE)), torch.tensor([1, 3])).backward()
        optimizer.step()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert {encoding.name for encoding in vp.get_encoding(model)} == {name}


def test_none_removes_every_position_inside_a_window():
    """One window that is the whole grid, no shift: moving patches changes nothing."""
    model = vp.set_encoding(swin(img_size=(16, 16), depths=(1,)), "none")
    x = pictures((16, 16))
    assert (model(torch.cat([x[..., 8:], x[..., :8]], -1)) - model(x)).abs().max() < 1e-5
    assert [n for n, _ in model.named_parameters() if "relative" in n] == []


def test_windows_of_a_layer_have_its_window_and_heads():
    model = vp.set_encoding(swin(window_size=(4, 8)), "rope_axial+alibi2d")
    found = vp.get_encoding(model)
    assert [(e.name, e.num_heads, e.reference_shape) for e in found[:4]] == [
        ("rope_axial", 2, (4, 8)),
        ("alibi2d", 2, (4, 8)),
        ("rope_axial", 4, (4, 8)),
        ("alibi2d", 4, (4, 8)),
    ]


def test_window_and_picture_size_can_change():
    model = vp.set_encoding(swin(), "relative_table+sincos2d")
    before = model.layers[0].blocks[0].attn.relative_position_bias_table.detach().clone()
    model.set_input_size((96, 144), window_size=6)
    attn = model.layers[0].blocks[0].attn
    assert attn.window_size == (6, 6)
    want = vp.resize_relative_table(before, (6, 6), (4, 4))
    assert torch.equal(attn.relative_position_bias_table, want)
    assert model(pictures((96, 144))).shape == (2, 5)
    assert list(swin(img_size=(96, 144), window_size=6).state_dict()) == list(model.state_dict())


def test_where_one_side_fits_the_window_the_other_still_shifts():
    """The authors' model stops shifting along both axes then, which docs/hosts.md says."""
    model = vp.set_encoding(swin(img_size=(32, 64), window_size=4), "relative_table")  # grids of 8 x 16 and 4 x 8
    assert [tuple(layer.blocks[1].shift_size) for layer in model.layers] == [(2, 2), (0, 2)]


def test_window_larger_than_the_grid_is_cut_by_timm_and_followed():
    model = vp.set_encoding(swin(window_size=7, img_size=(32, 64)), {"name": "relative_table", "init_std": 0.5})
    assert model.layers[1].blocks[0].attn.window_size == (4, 7)
    assert vp.get_encoding(model)[2].feat_shape == (4, 7)
    assert model(pictures((32, 64))).isfinite().all()


def test_copies_are_independent():
    model = vp.set_encoding(swin(), "learned+relative_table")
    want = model(pictures(SIZE))
    want.sum().backward()
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(copied(pictures(SIZE)), want)
        with torch.no_grad():
            copied.pos_embed_input[0].pos_embed.normal_()
            copied.layers[0].blocks[0].attn.relative_position_bias_table.normal_()
        assert not torch.equal(copied(pictures(SIZE)), want)
    assert torch.equal(model(pictures(SIZE)), want)


def test_table_is_drawn_anew_only_with_options():
    model = swin()
    table = model.layers[0].blocks[0].attn.relative_position_bias_table
    vp.set_encoding(model, "rope_axial+relative_table")
    assert model.layers[0].blocks[0].attn.relative_position_bias_table is table
    vp.set_encoding(model, {"name": "relative_table", "init_std": 0.5})
    assert model.layers[0].blocks[0].attn.relative_position_bias_table.std() > 0.3


def test_meta_initialisation():
    with torch.device("meta"):
        model = vp.set_encoding(swin(), "relative_table")
    model.to_empty(device="cpu")
    source = vp.set_encoding(swin(), "relative_table")
    for buffer in model.buffers():
        buffer.fill_(-12345)
    model.load_state_dict(source.state_dict(), strict=True)
    for module in model.modules():
        if hasattr(module, "init_non_persistent_buffers"):
            module.init_non_persistent_buffers()
    assert torch.equal(model(pictures(SIZE)), source(pictures(SIZE)))


def test_gradient_checkpointing():
    model = vp.set_encoding(swin(drop_path_rate=0.0), "relative_table+rope_axial").train()

    def gradients():
        model.zero_grad()
        model(pictures(SIZE)).square().sum().backward()
        return [parameter.grad.clone() for parameter in model.parameters()]

    plain = gradients()
    model.set_grad_checkpointing()
    assert all((a - b).abs().max() < 1e-6 for a, b in zip(plain, gradients(), strict=True))
