"""Swin v2-CR as host: cosine attention, and timm's network of log-spaced offsets under its name."""

import copy

import pytest
import timm
import torch

import visionpos as vp
from tests.hosts.same_bits import OWN, shapes
from tests.small import needs_newer_timm, pictures, randomised

KINDS = {  # windows divide the grid, or do not; pictures of the model's size, or of any
    (64, 96): {"window_size": 4},
    (72, 96): {"window_size": (5, 4), "strict_img_size": False},
}


def plain_model(size=(64, 96)):
    torch.manual_seed(0)
    options = {"depths": (2, 2), "num_heads": (2, 4), "embed_dim": 32, "init_values": 0.5, "num_classes": 4}
    return randomised(timm.create_model("swinv2_cr_tiny_224", img_size=size, **options, **KINDS[size]))


@pytest.mark.parametrize("size", KINDS)
@torch.no_grad()
def test_converting_to_what_the_host_has_changes_no_bit(size):
    """In float64 timm's logarithms are rounded to float32."""
    plain, x = plain_model(size), pictures(size)
    model = copy.deepcopy(plain)
    assert [encoding.name for encoding in vp.get_encoding(model)] == ["meta_mlp"] * 4
    for spec in ("meta_mlp", OWN):
        vp.set_encoding(model, vp.get_encoding(model) if spec is OWN else spec)
        assert shapes(model) == shapes(plain)
        assert torch.equal(model(x), plain(x))
        dropped = []
        for each in (model, plain):
            torch.manual_seed(1)
            dropped.append(each.train()(x))
            each.eval()
        assert torch.equal(*dropped)
        assert (dropped[0] - plain(x)).abs().max() > 1e-4
    for way in ({}, {"indices": [0], "stop_early": True}):
        (last, found), (want, found_want) = (each.forward_intermediates(x, **way) for each in (model, plain))
        assert all(torch.equal(a, b) for a, b in zip([last, *found], [want, *found_want], strict=True))
    assert (model.double()(x.double()) - plain.double()(x.double())).abs().max() < 1e-6
    assert model.no_weight_decay() == set()


@torch.no_grad()
def test_attention_is_the_formula_beside_another_encoding():
    model = vp.set_encoding(plain_model().double(), "meta_mlp+rope_axial+alibi2d")
    attn = model.stages[1].blocks[0].attn
    window = vp.Positions.grid((4, 4))
    positions = vp.Positions(window.coords.double(), (4, 4), is_grid=True)
    rope, alibi = (next(e for e in attn.encodings if e.name == name) for name in ("rope_axial", "alibi2d"))
    x = torch.randn(3, 16, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    q, k, v = attn.qkv(x).view(3, 16, 3, 4, 16).permute(2, 0, 3, 1, 4)
    q, k = rope(q / q.norm(dim=-1, keepdim=True), k / k.norm(dim=-1, keepdim=True), positions)
    delta = positions.coords[:, None] - positions.coords[None]
    bias = attn.meta_mlp(delta.sign() * (1 + delta.abs()).log()).movedim(-1, 0) + alibi.bias(positions)
    tau = attn.logit_scale.exp()[:, None, None]
    out = ((q @ k.mT) * tau + bias).softmax(-1) @ v
    assert (attn(x) - attn.proj(out.transpose(1, 2).flatten(2))).abs().max() < 1e-10


@needs_newer_timm
@torch.no_grad()
def test_the_input_size_changes_as_in_timm():
    plain, model = plain_model(), plain_model()
    vp.get_encoding(model)
    for each in (model, plain):
        each.set_input_size(img_size=(96, 128), window_size=3)
    assert torch.equal(model(pictures((96, 128))), plain(pictures((96, 128))))
    vp.set_encoding(model, "learned+relative_table+peg")
    model.set_input_size(img_size=(64, 128))
    assert model(pictures((64, 128))).isfinite().all()
    assert vp.get_encoding(model)[0].feat_shape == (16, 32)


def test_input_encodings_reach_the_patches_and_others_leave_the_network_behind():
    model = vp.set_encoding(plain_model(), "sincos2d+rope_mixed")
    assert not [key for key in model.state_dict() if "meta_mlp" in key]
    model.train()(pictures((64, 96))).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
