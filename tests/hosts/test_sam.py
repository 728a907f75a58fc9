"""timm's image encoder of SAM as host."""

import copy
import pickle

import pytest
import timm
import torch
import torch.nn.functional as F

import visionpos as vp
from tests.small import in_turn, pictures

ENCODINGS = [name for name in vp.list_encodings() if name != "none"]
SIZE = (24, 40)  # 6 x 10 tokens; windows of 4 x 4 need padding


def sam(**options):
    torch.manual_seed(0)
    options = {"img_size": SIZE, "patch_size": 4, "num_classes": 5, "embed_dim": 32, "num_heads": 2} | options
    options = {"depth": 2, "window_size": 4, "global_attn_indexes": [1], "neck_chans": 16} | options
    model = timm.create_model("samvit_base_patch16", **options).eval()
    with torch.no_grad():  # timm begins with zeros
        for name, parameter in model.named_parameters():
            if "pos" in name:
                parameter.normal_()
    return model


def attentions(model):
    return [block.attn for block in model.blocks]


OWN = "learned2d+decomposed"


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("size", [SIZE, (32, 28)])
def test_converting_to_what_the_host_has_changes_nothing(size, fused):
    plain, model = sam(), vp.set_encoding(sam(), OWN)
    for attn in [*attentions(plain), *attentions(model)]:
        attn.fused_attn = fused
    difference = (model(pictures(size)) - plain(pictures(size))).abs().max()
    # at another size timm resizes its tables by interpolate in float32: the last bit of the table differs
    assert difference < 1e-5 if fused or size != SIZE else difference == 0
    assert isinstance(model, type(plain))
    assert list(model.state_dict()) == list(plain.state_dict())
    assert [n for n, _ in model.named_parameters()] == [n for n, _ in plain.named_parameters()]
    model.load_state_dict(plain.state_dict(), strict=True)
    assert [type(e).__name__ for e in vp.get_encoding(model)] == ["Learned2D", "Decomposed", "Decomposed"]


@pytest.mark.parametrize("options", [{"use_rel_pos": False}, {"use_abs_pos": False}, {"qk_norm": True}])
def test_other_encoders(options):
    plain, model = sam(**options), sam(**options)
    vp.get_encoding(model)
    for attn in [*attentions(plain), *attentions(model)]:
        attn.fused_attn = False
    assert torch.equal(model(pictures(SIZE)), plain(pictures(SIZE)))


def test_weight_decay_spares_what_timm_forgets():
    model = sam()
    assert not any("rel_pos" in name for name in model.no_weight_decay())
    spared = vp.set_encoding(model, OWN).no_weight_decay()
    assert {"pos_embed", "blocks.0.attn.rel_pos_h", "blocks.1.attn.rel_pos_w"} <= spared


def test_own_rope_is_refused():
    with pytest.raises(ValueError, match="use_rope=False"):
        vp.set_encoding(sam(use_rel_pos=False, use_rope=True), "rope_axial")


@pytest.mark.parametrize("name", in_turn(ENCODINGS, 2))
def test_every_encoding_trains(name):
    model = vp.set_encoding(sam(), name).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for _ in range(2):
        optimizer.zero_grad()
        F.cross_entropy(model(pictures(SIZE)), torch.tensor([1, 3])).backward()
        optimizer.step()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert {encoding.name for encoding in vp.get_encoding(model)} == {name}
    assert model(pictures((32, 28))).isfinite().all()


def test_none_removes_every_position():
    model = sam(neck_chans=0, global_attn_indexes=[0, 1])
    x = pictures(SIZE)
    moved = torch.cat([x[..., 16:], x[..., :16]], -1)
    assert (model(moved) - model(x)).abs().max() > 1e-4
    vp.set_encoding(model, "none")
    assert (model(moved) - model(x)).abs().max() < 1e-5
    assert not any("pos" in name for name in model.state_dict())


def test_tables_have_the_window_or_the_grid():
    model = vp.set_encoding(sam(), "relative_table")
    assert [attn.encodings[0].feat_shape for attn in attentions(model)] == [(4, 4), (6, 10)]


@pytest.mark.parametrize("options", [{}, {"interpolation": "bicubic", "keep_aspect": True}, {"preset": "moonvit"}])
def test_a_table_that_timm_would_read_otherwise_lives_elsewhere(options):
    model = vp.set_encoding(sam(), {"name": "learned2d", "grid_size": (3, 4), **options})
    assert model.pos_embed is None
    assert model.pos_embed_input[0].pos_embed.shape == (1, 3, 4, 32)
    vp.set_encoding(model, {"name": "learned2d", "grid_size": (3, 4), "interpolation": "bicubic"})
    assert model.pos_embed.shape == (1, 3, 4, 32)


def test_copies_are_independent():
    model = vp.set_encoding(sam(), OWN + "+sincos2d")
    want = model(pictures(SIZE))
    want.sum().backward()
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(copied(pictures(SIZE)), want)
        with torch.no_grad():
            copied.blocks[0].attn.rel_pos_h.normal_()
        assert not torch.equal(copied(pictures(SIZE)), want)
    assert torch.equal(model(pictures(SIZE)), want)


def test_gradient_checkpointing_with_two_sizes_in_one_backward():
    model = vp.set_encoding(sam(), OWN + "+rope_axial+peg").train()

    def gradients():
        model.zero_grad()
        (model(pictures(SIZE)).square().sum() + model(pictures((32, 28))).square().sum()).backward()
        return [parameter.grad.clone() for parameter in model.parameters()]

    plain = gradients()
    model.set_grad_checkpointing()
    assert all((a - b).abs().max() < 1e-6 * a.abs().max().clamp(min=1) for a, b in zip(plain, gradients(), strict=True))


def test_forward_intermediates():
    plain, model = sam(), vp.set_encoding(sam(), OWN)
    for attn in [*attentions(plain), *attentions(model)]:
        attn.fused_attn = False
    wanted, got = (
        plain.forward_intermediates(pictures(SIZE))[1],
        model.forward_intermediates(pictures(SIZE))[1],
    )
    assert all(torch.equal(a, b) for a, b in zip(wanted, got, strict=True))
    last, _ = vp.set_encoding(model, "sincos2d+alibi2d").forward_intermediates(pictures(SIZE))
    assert torch.equal(last, model.forward_features(pictures(SIZE)))
