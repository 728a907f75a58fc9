"""LePE inside whole attention layers against a float64 computation by hand."""

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import Attention as TimmAttention
from torch import nn

import visionpos as vp
from visionpos.hosts.attention import Attention, AttentionContext

F64 = torch.float64


def grid64(grid, prefix=0):
    return vp.Positions(vp.Positions.grid(grid).coords.double(), grid, prefix, is_grid=True)


def build(dim=12, **options):
    torch.manual_seed(0)
    return vp.create_encoding("lepe", dim=dim, **options).double()


def by_hand(encoding, v, grid):
    """Convolution of the values, (B, N, C) in row-major order, one kernel place after the other."""
    margin, (height, width) = encoding.kernel_size // 2, grid
    image = v.transpose(1, 2).unflatten(2, grid)
    mode = "constant" if encoding.padding == "zeros" else "circular"
    image = F.pad(image, (margin,) * 4, mode=mode)
    out = encoding.proj.bias[:, None, None].expand(len(v), -1, *grid).clone()
    for i in range(encoding.kernel_size):
        for j in range(encoding.kernel_size):
            part = image[:, :, i : i + height, j : j + width]
            out += encoding.proj.weight[:, 0, i, j, None, None] * part
    return out.flatten(2).transpose(1, 2)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize(("kernel_size", "padding"), [(3, "zeros"), (5, "zeros"), (3, "circular")])
@pytest.mark.parametrize(("heads", "prefix"), [(1, 0), (3, 1), (3, 2)])
@pytest.mark.parametrize("grid", [(3, 5), (4, 2)])
def test_whole_layer(grid, heads, prefix, kernel_size, padding, fused):
    """softmax(q k^T / sqrt(d)) v + conv(v), before the output projection; channels are head after head."""
    torch.manual_seed(3)
    count, positions = prefix + grid[0] * grid[1], grid64(grid, prefix)
    layer = TimmAttention(12, num_heads=heads, qkv_bias=True).double().eval()
    layer.__class__, layer.fused_attn = Attention, fused
    encoding = build(kernel_size=kernel_size, padding=padding)
    layer.encodings = nn.ModuleList([encoding])
    x = torch.randn(2, count, 12, dtype=F64)
    q, k, v = layer.qkv(x).reshape(2, count, 3, heads, -1).permute(2, 0, 3, 1, 4)
    p = (q @ k.transpose(-2, -1) * (12 / heads) ** -0.5).softmax(-1)
    out = (p @ v).transpose(1, 2).flatten(2)
    values = layer.qkv(x)[:, prefix:, 24:]
    out[:, prefix:] += by_hand(encoding, values, grid)
    assert (layer(x, AttentionContext(positions)) - layer.proj(out)).abs().max() < 1e-10


@pytest.mark.parametrize("grid", [(3, 5), (1, 6)])
def test_mix_of_kept_tokens_is_that_of_a_grid_with_holes(grid):
    encoding = build()
    index = torch.stack(
        [torch.randperm(grid[0] * grid[1], generator=torch.Generator().manual_seed(i))[:4] for i in (0, 1)]
    )
    v = torch.randn(2, 5, 12, generator=torch.Generator().manual_seed(1), dtype=F64)
    dense = torch.zeros(2, grid[0] * grid[1], 12, dtype=F64)
    for sample, rows in enumerate(index):
        dense[sample, rows] = v[sample, 1:]
    want = by_hand(encoding, dense, grid)
    got = encoding.mix(v, grid64(grid, 1).keep(index))
    assert not got[:, 0].any()
    for sample, rows in enumerate(index):
        assert (got[sample, 1:] - want[sample, rows]).abs().max() < 1e-10


def test_swin_convolves_inside_its_windows():
    model = timm.create_model(
        "swin_tiny_patch4_window7_224", img_size=(32, 48), window_size=(4, 2), depths=(1,), num_heads=(3,), embed_dim=12
    )
    attn = vp.set_encoding(model, "lepe").layers[0].blocks[0].attn.double()
    torch.manual_seed(4)
    x = torch.randn(2, 8, 12, dtype=F64)  # two windows of 4 x 2
    q, k, v = attn.qkv(x).reshape(2, 8, 3, 3, 4).permute(2, 0, 3, 1, 4)
    out = ((q @ k.transpose(-2, -1) / 2).softmax(-1) @ v).transpose(1, 2).flatten(2)
    want = attn.proj(out + by_hand(attn.encodings[0], attn.qkv(x)[..., 24:], (4, 2)))
    assert (attn(x) - want).abs().max() < 1e-10


def test_precision():
    """Mixed precision: low-precision values, but weights and sums in float32."""
    encoding, positions = build().float(), vp.Positions.grid((3, 5))
    v = torch.randn(2, 15, 12, generator=torch.Generator().manual_seed(1))
    want = encoding.mix(v, positions)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(encoding.mix(v, positions), want)
        low = encoding.mix(v.bfloat16(), positions)
    assert low.dtype == torch.bfloat16
    assert torch.equal(low, encoding.mix(v.bfloat16().float(), positions).bfloat16())


@pytest.mark.parametrize("grid", [(2, 3), (4, 1)])
@pytest.mark.parametrize("padding", ["zeros", "circular"])
def test_gradients(grid, padding):
    encoding, positions = build(dim=2, padding=padding), grid64(grid, 1)

    def forward(x, weight, bias):
        named = {"proj.weight": weight, "proj.bias": bias}
        return torch.func.functional_call(encoding, named, (x, positions))

    x = torch.randn(1, positions.num_tokens, 2, dtype=F64, requires_grad=True)
    assert torch.autograd.gradcheck(forward, [x, encoding.proj.weight, encoding.proj.bias])
