"""Visformer as host: a table in each of three stages, also in those whose blocks have no attention."""

import pytest
import timm
import torch

import visionpos as vp
from tests.hosts.same_bits import OWN, check_same_bits
from tests.small import pictures, randomised
from visionpos.hosts.host import timm_is_from

SIZE, OTHER = (64, 96), (96, 32)
OPTIONS = {"init_channels": 8, "embed_dim": 48, "depth": (1, 2, 1), "num_heads": 3, "num_classes": 4}


def plain_model(size=SIZE, name="visformer_tiny", **options):
    torch.manual_seed(0)
    return randomised(timm.create_model(name, img_size=size, **OPTIONS, **options))


@pytest.mark.parametrize(
    "options", [{}, {"use_pos_embed": False}, {"attn_stage": "111", "spatial_conv": "000"}], ids=str
)
@pytest.mark.parametrize("size", [SIZE, OTHER])
@torch.no_grad()
def test_converting_to_what_the_host_has_changes_no_bit(size, options):
    names = [] if "use_pos_embed" in options else ["learned"] * 3
    ways = ({}, {"norm": True, "indices": [1, 2]}, {"indices": [1], "stop_early": True})
    ways = ways if timm_is_from("1.0.31") else ()  # before, timm's Visformer had no features
    spec = "learned" if names else "none"
    check_same_bits(plain_model(size, **options), pictures(size), names, spec, OWN, ways=ways)


@torch.no_grad()
def test_attention_is_the_formula():
    model = vp.set_encoding(plain_model().double(), "rope_axial+alibi2d")
    attn = model.stage2[1].attn
    positions = vp.Positions(vp.Positions.grid((4, 6)).coords.double(), (4, 6), is_grid=True)
    rope, alibi = attn.encodings
    x = torch.randn(2, 48, 4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    q, k, v = attn.qkv(x).view(2, 3, 3, 16, 24).mT.unbind(1)
    q, k = rope(q, k, positions)
    out = (q @ k.mT / 4 + alibi.bias(positions)).softmax(-1) @ v
    assert (attn(x) - attn.proj(out.mT.reshape(2, 48, 4, 6))).abs().max() < 1e-10


@torch.no_grad()
def test_each_stage_gets_an_encoding_of_its_width():
    model, x = plain_model(), pictures(SIZE)
    vp.set_encoding(model, ["sincos2d", {"name": "learned", "dim": 96}])
    found = [(e.name, e.dim) for e in vp.get_encoding(model)]
    assert found == [("sincos2d", 24), ("sincos2d", 48), ("sincos2d", 96), ("learned", 96)]
    assert [key for key in model.state_dict() if "pos_embed" in key] == ["pos_embed3"]
    want = list(model.through_stages(x))
    vp.set_encoding(model, [{"name": "sincos2d", "dim": 24}, {"name": "learned", "dim": 96}])
    got = list(model.through_stages(x))
    assert torch.equal(got[0], want[0])
    assert (got[1] - want[1]).abs().max() > 1e-3


def test_what_is_built_otherwise_is_one_line():
    model = timm.create_model("visformer_tiny", img_size=SIZE, **OPTIONS, vit_stem=True)
    with pytest.raises(ValueError, match="a Visformer with vit_stem takes no encodings"):
        vp.set_encoding(model, "none")
    with pytest.raises(ValueError, match="output_fmt must be 'NCHW', got 'NLC'"):
        vp.set_encoding(plain_model(), "none").forward_intermediates(pictures(SIZE), output_fmt="NLC")
