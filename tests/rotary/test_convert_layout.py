"""Projection weights carried from one pairing of channels to the other."""

import copy

import pytest
import torch
from timm.layers import Attention

import visionpos as vp
from visionpos.hosts.attention import Attention as EncodedAttention
from visionpos.hosts.attention import AttentionContext
from visionpos.rotation import convert_qk_layout

OTHER = {"interleaved": "half", "half": "interleaved"}
OPTIONS = {
    "rope1d": {},
    "rope_axial": {},
    "rope_eva": {"reference_shape": (2, 2)},
    "rope_mixed": {},
    "rope_dinov3": {},
    "rope_golden": {},
    "liere": {"block": 4},
    "comrope": {"block": 4},
}


def test_channels_of_half_are_the_even_then_the_odd():
    rows = torch.arange(24.0)  # q, k, v of one head
    want = [0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15, 16, 17, 18, 19, 20, 21, 22, 23]
    assert convert_qk_layout(rows, 1, "interleaved", "half").tolist() == want
    want = [0, 4, 1, 5, 2, 6, 3, 7]
    assert convert_qk_layout(rows[:8], 1, "half", "interleaved", fused=False).tolist() == want
    want = [0, 2, 1, 3, 4, 6, 5, 7]
    assert convert_qk_layout(rows[:8], 2, "interleaved", "half", fused=False).tolist() == want
    want = [0, 4, 1, 5, 2, 6, 3, 7]
    assert convert_qk_layout(rows[:8], 1, "interleaved", "half", fused=False, block=4).tolist() == want


@pytest.mark.parametrize("head_dim", [2, 6, 16])
def test_half_of_reordered_is_interleaved_reordered(head_dim):
    x, angles = torch.randn(5, head_dim), torch.rand(5, head_dim // 2)
    order = convert_qk_layout(torch.arange(head_dim), 1, "interleaved", "half", fused=False)
    assert torch.equal(vp.apply_rotary(x[:, order], angles, layout="half"), vp.apply_rotary(x, angles)[:, order])


@pytest.mark.parametrize("source", list(OTHER))
@pytest.mark.parametrize("shape", [(48,), (48, 16), (48, 3, 2)])
@pytest.mark.parametrize("block", [2, 4])
def test_round_trip(source, shape, block):
    rows = torch.randn(shape)
    there = convert_qk_layout(rows, 2, source, OTHER[source], block=block)
    assert not torch.equal(there, rows)
    assert torch.equal(there[32:], rows[32:])  # values
    assert torch.equal(convert_qk_layout(there, 2, OTHER[source], source, block=block), rows)
    assert convert_qk_layout(rows, 2, source, source) is rows


@pytest.mark.parametrize("source", list(OTHER))
@pytest.mark.parametrize("name", list(OPTIONS))
def test_attention_is_the_same(name, source):
    """A whole layer with q_norm, k_norm and a prefix token, in float64."""
    torch.manual_seed(0)
    layer = Attention(16, num_heads=2, qkv_bias=True, qk_norm=True, norm_layer=torch.nn.LayerNorm).double()
    layer.__class__ = EncodedAttention
    torch.nn.init.uniform_(layer.q_norm.weight)
    encoding = vp.create_encoding(name, num_heads=2, head_dim=8, layout=source, **OPTIONS[name]).double()
    layer.encodings = torch.nn.ModuleList([encoding])
    other = copy.deepcopy(layer)
    other.encodings[0].layout = OTHER[source]
    how, block = (source, OTHER[source]), OPTIONS[name].get("block", 2)
    positions = vp.Positions.grid((2, 3))
    context = AttentionContext(vp.Positions(positions.coords.double(), (2, 3), 1))
    x = torch.randn(2, 7, 16, dtype=torch.float64)
    assert (layer(x, context) - other(x, context)).abs().max() > 1e-4
    with torch.no_grad():
        for rows in (other.qkv.weight, other.qkv.bias):
            rows.copy_(convert_qk_layout(rows, 2, *how, block=block))
        for rows in (other.q_norm.weight, other.q_norm.bias, other.k_norm.weight, other.k_norm.bias):
            rows.copy_(convert_qk_layout(rows, 1, *how, fused=False, block=block))
    assert (layer(x, context) - other(x, context)).abs().max() < 1e-12


@pytest.mark.unhooked
def test_errors():
    with pytest.raises(ValueError, match="layout must be 'interleaved' or 'half', got 'both'"):
        convert_qk_layout(torch.zeros(48), 2, "both", "half")
    with pytest.raises(ValueError, match=r"rows must be a positive multiple of 6 .* got 20"):
        convert_qk_layout(torch.zeros(20), 2, "half", "interleaved")
    with pytest.raises(ValueError, match="head_dim must be a positive multiple of 2 .* got 5"):
        convert_qk_layout(torch.zeros(30), 2, "half", "interleaved")
