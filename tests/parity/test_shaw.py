"""Shaw's relative key and value vectors, per axis, against a plain loop."""

import pytest
import torch
from timm.models.vision_transformer import Attention as TimmAttention
from torch import nn

import visionpos as vp
from visionpos.hosts.attention import Attention, AttentionContext

F64 = torch.float64
GRIDS = [(3, 5), (4, 2), (1, 6), (6, 1)]


def grid64(grid, prefix=0):
    return vp.Positions(vp.Positions.grid(grid).coords.double(), grid, prefix, is_grid=True)


def build(heads=2, head_dim=4, **options):
    torch.manual_seed(0)
    options = {"init_std": 1.0, **options}
    return vp.create_encoding("shaw", num_heads=heads, head_dim=head_dim, **options).double()


def queries(positions, heads=2, head_dim=4, batch=2):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, heads, positions.num_tokens, head_dim, generator=generator, dtype=F64)


def vector(table, clip, i, j, coords, prefix):
    """The vector of query i and key j: half of it for x, half for y; offsets are key minus query."""
    if i < prefix or j < prefix:
        row = 2 * clip + 1
        return torch.cat([table[0, row], table[1, row]]) if table.shape[1] > row else torch.zeros(2 * table.shape[2])
    (y, x), (v, u) = coords[i - prefix], coords[j - prefix]
    dx, dy = (max(-clip, min(clip, round(d))) for d in (u - x, v - y))
    return torch.cat([table[0, dx + clip], table[1, dy + clip]])


def vectors(table, clip, positions):
    """(B or 1, T, T, head_dim)."""
    batch = positions.coords if positions.is_batched else positions.coords[None]
    tokens, prefix = range(positions.num_tokens), positions.num_prefix_tokens
    return torch.stack(
        [
            torch.stack([torch.stack([vector(table, clip, i, j, c.tolist(), prefix) for j in tokens]) for i in tokens])
            for c in batch
        ]
    )


@pytest.mark.parametrize(("built", "prefix"), [(0, 0), (0, 2), (1, 1), (1, 3)])
@pytest.mark.parametrize("clip", [1, 2, 4])
@pytest.mark.parametrize("grid", GRIDS)
def test_oracle(grid, clip, built, prefix):
    encoding, positions = build(clip=clip, num_prefix_tokens=built), grid64(grid, prefix)
    q = queries(positions)
    want = torch.einsum("bhid,zijd->bhij", q, vectors(encoding.key_table, clip, positions)) / 2  # sqrt(head_dim)
    assert (encoding.bias(positions, content=q) - want).abs().max() < 1e-10


@pytest.mark.parametrize("built", [0, 1])
def test_real_batched_coordinates_and_other_keys(built):
    coords = torch.rand(2, 4, 2, generator=torch.Generator().manual_seed(2), dtype=F64) * 3
    encoding, positions = build(num_prefix_tokens=built), vp.Positions(coords, (4, 5), 1)
    q = queries(positions)
    table = vectors(encoding.key_table, 2, positions)
    bias = encoding.bias(positions, content=q)
    assert (bias - torch.einsum("bhid,bijd->bhij", q, table) / 2).abs().max() < 1e-10
    few = vp.Positions(coords[:, 1:3], (4, 5), 1)
    rows = torch.tensor([0, 2, 3])
    assert (encoding.bias(positions, few, q) - bias[..., rows]).abs().max() < 1e-10


@pytest.mark.parametrize("values", [False, True])
@pytest.mark.parametrize(("built", "prefix"), [(0, 0), (0, 1), (1, 1), (1, 2)])
@pytest.mark.parametrize("grid", [(3, 2), (1, 4)])
def test_whole_layer(grid, built, prefix, values):
    """softmax((q . k + q . a) / sqrt(d)) (v + c), Shaw's equations 3 and 4."""
    torch.manual_seed(3)
    positions, count = grid64(grid, prefix), prefix + grid[0] * grid[1]
    layer = TimmAttention(12, num_heads=3, qkv_bias=True).double().eval()
    layer.__class__ = Attention
    encoding = build(3, num_prefix_tokens=built, values=values)
    layer.encodings = nn.ModuleList([encoding])
    x = torch.randn(2, count, 12, dtype=F64)
    q, k, v = layer.qkv(x).reshape(2, count, 3, 3, 4).permute(2, 0, 3, 1, 4)
    a = vectors(encoding.key_table, 2, positions)[0]
    p = ((q @ k.transpose(-2, -1) + torch.einsum("bhid,ijd->bhij", q, a)) / 2).softmax(-1)
    out = p @ v
    if values:
        out = out + torch.einsum("bhij,ijd->bhid", p, vectors(encoding.value_table, 2, positions)[0])
    want = layer.proj(out.transpose(1, 2).flatten(2))
    assert (layer(x, AttentionContext(positions)) - want).abs().max() < 1e-10
    layer.zero_grad()
    layer(x, AttentionContext(positions)).square().sum().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in encoding.parameters())


def test_value_side_in_low_precision_and_with_batched_coordinates():
    encoding = build(values=True).float()
    coords = torch.rand(2, 6, 2, generator=torch.Generator().manual_seed(2)) * 3
    positions = vp.Positions(coords, (4, 5), 1)
    p = torch.rand(2, 2, 7, 7, generator=torch.Generator().manual_seed(4)).softmax(-1)
    want = torch.einsum("bhij,bijd->bhid", p, vectors(encoding.value_table, 2, positions))
    assert (encoding.value_term(positions, p) - want).abs().max() < 2e-6
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (encoding.value_term(positions, p) - want).abs().max() < 2e-6
    half = build(values=True).bfloat16()
    assert (half.value_term(positions, p.bfloat16()) - want).abs().max() < 0.05


def test_options_and_errors():
    assert build(head_dim=64, init_std=None, clip=30).key_table.std().item() == pytest.approx(1 / 8, rel=0.05)
    assert build(clip=3).key_table.shape == (2, 7, 2)
    assert build(clip=3, num_prefix_tokens=4).key_table.shape == (2, 8, 2)
    assert set(build(values=True).state_dict()) == {"key_table", "value_table"}
    for options, word in (({"head_dim": 5}, "head_dim"), ({"clip": 0}, "clip"), ({"values": 3}, "values")):
        with pytest.raises(ValueError, match=word):
            build(**options)


def test_frame():
    """Interpolated, offsets on a larger grid shrink to those of the grid that was trained on."""
    encoding, larger = build(reference_shape=(2, 3), clip=1, extrapolate=False), grid64((3, 5))
    q = queries(larger)
    want = build(clip=1).bias(larger.rescale((2, 3)), content=q)
    assert torch.equal(encoding.bias(larger, content=q), want)
    assert not torch.equal(build(clip=1).bias(larger, content=q), want)


@pytest.mark.parametrize("built", [0, 1])
@pytest.mark.parametrize("grid", [(2, 3), (3, 1)])
def test_gradients(grid, built):
    encoding, positions = build(1, num_prefix_tokens=built, values=True, clip=1), grid64(grid, 1)

    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoding = encoding

        def forward(self, q):
            return encoding.value_term(positions, encoding.bias(positions, content=q).softmax(-1))

    def both(q, key_table, value_table):
        tables = {"encoding.key_table": key_table, "encoding.value_table": value_table}
        return torch.func.functional_call(Both(), tables, (q,))

    inputs = [queries(positions, 1, batch=1).requires_grad_(), encoding.key_table, encoding.value_table]
    assert torch.autograd.gradcheck(both, inputs)


def test_keys_elsewhere_are_carried_to_the_trained_grid_too():
    encoding, positions = build(reference_shape=(3, 4), extrapolate=False), grid64((5, 10))
    q, index = queries(positions), torch.tensor([5, 0, 49])
    got = encoding.bias(positions, keys=positions.keep(index), content=q)
    assert (got - encoding.bias(positions, content=q)[..., index]).abs().max() < 1e-12
