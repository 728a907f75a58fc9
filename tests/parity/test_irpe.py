"""iRPE's buckets (golden values of the reference code) and biases against a plain loop."""

import math

import pytest
import torch
from timm.models.vision_transformer import Attention as TimmAttention
from torch import nn

import visionpos as vp
from visionpos.bias.irpe import piecewise_index
from visionpos.hosts.attention import Attention, AttentionContext

F64 = torch.float64
METHODS = ["product", "euclid", "quant", "cross"]
GRIDS = [(3, 5), (6, 2), (1, 6)]


def grid64(grid, prefix=0):
    return vp.Positions(vp.Positions.grid(grid).coords.double(), grid, prefix, is_grid=True)


def build(heads=2, head_dim=4, **options):
    torch.manual_seed(0)
    options = {"init_std": 1.0, **options}
    return vp.create_encoding("irpe", num_heads=heads, head_dim=head_dim, **options).double()


def queries(positions, heads=2, head_dim=4, batch=2):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, heads, positions.num_tokens, head_dim, generator=generator, dtype=F64)


def g(x, alpha=1.9, beta=3.8, gamma=15.2):
    """Equation 18 of the paper, as the reference code rounds it."""
    if abs(x) <= alpha:
        return round(x)
    far = round(alpha + math.log(abs(x) / alpha) / math.log(gamma / alpha) * (beta - alpha))
    return int(math.copysign(min(beta, far), x))


def buckets(method, dy, dx):
    """The bucket in each table."""
    if method == "product":
        return [(g(dy) + 3) * 7 + g(dx) + 3]
    if method == "cross":
        return [g(dy) + 3, g(dx) + 3]
    return [3 + g(round(math.hypot(dy, dx)) if method == "euclid" else dy * dy + dx * dx)]


def vectors(table, method, positions):
    """The sum of the vectors of every pair, (B or 1, T, T, head_dim or heads)."""
    batch = positions.coords if positions.is_batched else positions.coords[None]
    p, count = positions.num_prefix_tokens, positions.num_tokens
    out = torch.zeros(len(batch), count, count, table.shape[-1], dtype=table.dtype)
    rows = 49 if method == "product" else 7
    for b, coords in enumerate(batch.tolist()):
        for i in range(count):
            for j in range(count):
                if i >= p and j >= p:
                    (y, x), (v, u) = coords[i - p], coords[j - p]
                    index = buckets(method, y - v, x - u)
                elif table.shape[1] > rows:
                    index = [rows] * len(table)
                else:
                    continue
                out[b, i, j] = sum(table[t, row] for t, row in enumerate(index))
    return out


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_golden_buckets(dtype):
    want = [-3] * 12 + [-2, -2, -1, 0, 1, 2, 2] + [3] * 12
    assert piecewise_index(torch.arange(-15, 16, dtype=dtype), 1.9).tolist() == want
    assert [g(x) for x in range(-15, 16)] == want
    far = torch.arange(-400, 401, dtype=dtype) / 4
    assert piecewise_index(far, 1.9).tolist() == [g(x) for x in far.tolist()]


def test_golden_product_on_two_by_two():
    """The reference's row 1 with a class token, [49, 24, 23, 17, 16], read off a table that counts its rows."""
    encoding, positions = build(1, 1, num_prefix_tokens=1), grid64((2, 2), 1)
    assert encoding.key_table.shape == (1, 50, 1)
    encoding.key_table.data = torch.arange(50.0, dtype=F64).view(1, 50, 1)
    bias = encoding.bias(positions, content=torch.ones(1, 1, 5, 1, dtype=F64))[0, 0]
    assert bias[1].tolist() == [49, 24, 23, 17, 16]
    assert bias[0].tolist() == [49] * 5
    assert bias[4].tolist() == [49, 32, 31, 25, 24]


@pytest.mark.parametrize(("built", "prefix"), [(0, 0), (0, 2), (1, 2)])
@pytest.mark.parametrize(("mode", "shared"), [("contextual", True), ("bias", True), ("bias", False)])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("grid", GRIDS)
def test_oracle(grid, method, mode, shared, built, prefix):
    encoding = build(method=method, mode=mode, num_prefix_tokens=built, shared_head=shared)
    positions = grid64(grid, prefix)
    q, table = queries(positions), vectors(encoding.key_table, method, positions)
    if mode == "contextual":
        want = torch.einsum("bhid,zijd->bhij", q, table) / 2  # the reference scales q first: sqrt(head_dim)
    else:
        want = table.permute(0, 3, 1, 2).expand(2, encoding.num_heads, -1, -1)
        assert (want[:, 0] == want[:, -1]).all() == shared
    assert (encoding.bias(positions, content=q) - want).abs().max() < 1e-10


@pytest.mark.parametrize("method", METHODS)
def test_real_and_batched_coordinates(method):
    coords = torch.rand(2, 5, 2, generator=torch.Generator().manual_seed(2), dtype=F64) * 6
    encoding, positions = build(method=method), vp.Positions(coords, (7, 8), 1)
    q = queries(positions)
    want = torch.einsum("bhid,bijd->bhij", q, vectors(encoding.key_table, method, positions)) / 2
    assert (encoding.bias(positions, content=q) - want).abs().max() < 1e-10


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("built", [0, 1])
def test_whole_layer_with_values(method, built):
    torch.manual_seed(3)
    positions = grid64((3, 2), 1)
    layer = TimmAttention(12, num_heads=3, qkv_bias=True).double().eval()
    layer.__class__ = Attention
    encoding = build(3, method=method, values=True, num_prefix_tokens=built)
    layer.encodings = nn.ModuleList([encoding])
    x = torch.randn(2, 7, 12, dtype=F64)
    q, k, v = layer.qkv(x).reshape(2, 7, 3, 3, 4).permute(2, 0, 3, 1, 4)
    scaled = q / 2
    on_keys = torch.einsum("bhid,ijd->bhij", scaled, vectors(encoding.key_table, method, positions)[0])
    p = (scaled @ k.transpose(-2, -1) + on_keys).softmax(-1)
    out = p @ v + torch.einsum("bhij,ijd->bhid", p, vectors(encoding.value_table, method, positions)[0])
    want = layer.proj(out.transpose(1, 2).flatten(2))
    assert (layer(x, AttentionContext(positions)) - want).abs().max() < 1e-10


def test_options_and_errors():
    assert not build(init_std=0.0).key_table.any()
    assert build(method="cross").key_table.shape == (2, 7, 4)
    assert build(method="euclid", mode="bias", heads=3).key_table.shape == (1, 7, 1)
    assert build(method="euclid", mode="bias", heads=3, shared_head=False).key_table.shape == (1, 7, 3)
    assert build(ratio=4.0).key_table.shape == (1, 17**2, 4)
    wrong = {"method": "manhattan", "mode": "context", "ratio": 0.0, "head_dim": 0}
    for name, value in wrong.items():
        with pytest.raises(ValueError, match=name):
            build(**{name: value})
    with pytest.raises(ValueError, match="contextual"):
        build(values=True, mode="bias")
    with pytest.raises(ValueError, match="shared_head=False needs mode='bias'"):
        build(shared_head=False)


@pytest.mark.parametrize("mode", ["contextual", "bias"])
@pytest.mark.parametrize("method", METHODS)
def test_gradients(method, mode):
    encoding, positions = build(1, 2, method=method, mode=mode, num_prefix_tokens=1), grid64((2, 3), 1)

    def bias(q, key_table):
        logits = torch.zeros(1, 1, 7, 7, dtype=F64)
        return torch.func.functional_call(encoding, {"key_table": key_table}, (logits, positions), {"content": q})

    q = queries(positions, 1, 2, batch=1).requires_grad_(mode == "contextual")
    assert torch.autograd.gradcheck(bias, [q, encoding.key_table])
