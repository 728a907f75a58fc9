"""Decomposed relative positions against a plain loop, the exact fold into longer q and k, and timm's SAM."""

import pytest
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import Attention as TimmAttention
from timm.models.vision_transformer_sam import get_decomposed_rel_pos_bias
from torch import nn

import visionpos as vp
from visionpos.hosts.attention import Attention, AttentionContext

F64 = torch.float64
GRIDS = [(3, 5), (4, 2), (1, 6), (5, 1)]


def grid64(grid, prefix=0):
    return vp.Positions(vp.Positions.grid(grid).coords.double(), grid, prefix, is_grid=True)


def build(grid, heads=2, head_dim=4, **options):
    torch.manual_seed(0)
    options = {"init_std": 1.0, **options}
    return vp.create_encoding("decomposed", num_heads=heads, head_dim=head_dim, feat_shape=grid, **options).double()


def queries(positions, heads=2, head_dim=4, batch=2):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, heads, positions.num_tokens, head_dim, generator=generator, dtype=F64)


def read(table, place):
    """A row of a table at a real place, linearly."""
    low = min(int(place), len(table) - 2) if len(table) > 1 else 0
    return table[low] if len(table) == 1 else table[low] + (place - low) * (table[low + 1] - table[low])


def oracle(encoding, positions, q):
    p = positions.num_prefix_tokens
    bias = torch.zeros(*q.shape[:3], q.shape[2], dtype=F64)
    height, width = positions.feat_shape
    for b, h in ((b, h) for b in range(q.shape[0]) for h in range(q.shape[1])):
        coords = (positions.coords[b] if positions.is_batched else positions.coords).tolist()
        for i, (y, x) in enumerate(coords):
            for j, (v, u) in enumerate(coords):
                r = read(encoding.rel_pos_h, y - v + height - 1) + read(encoding.rel_pos_w, x - u + width - 1)
                bias[b, h, p + i, p + j] = q[b, h, p + i] @ r
    return bias


@pytest.mark.parametrize("prefix", [0, 2])
@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize("grid", GRIDS)
def test_oracle(grid, heads, prefix):
    encoding, positions = build(grid, heads), grid64(grid, prefix)
    q = queries(positions, heads)
    want = oracle(encoding, positions, q)
    assert (encoding.bias(positions, content=q) - want).abs().max() < 1e-10
    loose = vp.Positions(positions.coords, grid, prefix)  # the same tokens, not known to be a whole grid
    assert (encoding.bias(loose, content=q) - want).abs().max() < 1e-10


@pytest.mark.parametrize("grid", [(3, 5), (4, 2)])
def test_real_and_batched_coordinates(grid):
    generator = torch.Generator().manual_seed(2)
    coords = torch.rand(2, 4, 2, generator=generator, dtype=F64) * torch.tensor([grid[0] - 1, grid[1] - 1])
    encoding, positions = build(grid), vp.Positions(coords, grid, 1)
    q = queries(positions)
    assert (encoding.bias(positions, content=q) - oracle(encoding, positions, q)).abs().max() < 1e-10


@pytest.mark.parametrize("grid", GRIDS)
def test_equals_the_fold(grid):
    """q' = [q / sqrt(d), q Rh^T, q Rw^T], k' = [k, onehot(y), onehot(x)]: logits without a table of pairs."""
    encoding, positions = build(grid), grid64(grid)
    q, k = queries(positions), queries(positions).flip(0)
    y, x = positions.coords.long().unbind(-1)
    rows = encoding.rel_pos_h[y[:, None] - torch.arange(grid[0]) + grid[0] - 1]  # (N, H, D)
    columns = encoding.rel_pos_w[x[:, None] - torch.arange(grid[1]) + grid[1] - 1]
    long_q = torch.cat([q / 2, torch.einsum("bhnd,nkd->bhnk", q, rows), torch.einsum("bhnd,nkd->bhnk", q, columns)], -1)
    one_hot = torch.cat([F.one_hot(y, grid[0]), F.one_hot(x, grid[1])], dim=-1).to(F64)
    long_k = torch.cat([k, one_hot.expand(2, 2, -1, -1)], -1)
    logits = encoding(q @ k.transpose(-2, -1) / 2, positions, content=q)
    assert (logits - long_q @ long_k.transpose(-2, -1)).abs().max() < 1e-12


@pytest.mark.parametrize(("old", "new"), [((3, 5), (3, 5)), ((3, 5), (6, 4)), ((4, 2), (2, 5)), ((5, 4), (7, 1))])
def test_timms_sam_on_this_and_another_grid(old, new):
    encoding, positions = build(old), grid64(new)
    q = queries(positions)
    tables = encoding.rel_pos_h, encoding.rel_pos_w
    want = get_decomposed_rel_pos_bias(q.flatten(0, 1), *tables, new, new).unflatten(0, (2, 2))
    assert (encoding.bias(positions, content=q) - want).abs().max() < 1e-10
    encoding.set_feat_shape(new)
    assert encoding.rel_pos_h.shape == (2 * new[0] - 1, 4)
    assert (encoding.bias(positions, content=q) - want).abs().max() < 1e-10


@pytest.mark.parametrize("fused", [False, True])
def test_whole_layer_uses_unscaled_queries(fused):
    torch.manual_seed(3)
    layer, positions = TimmAttention(12, num_heads=3, qkv_bias=True).double().eval(), grid64((3, 2), 1)
    layer.__class__, layer.fused_attn = Attention, fused
    layer.encodings = nn.ModuleList([build((3, 2), heads=3)])
    x = torch.randn(2, 7, 12, dtype=F64)
    q, k, v = layer.qkv(x).reshape(2, 7, 3, 3, 4).permute(2, 0, 3, 1, 4)
    logits = q @ k.transpose(-2, -1) / 2 + oracle(layer.encodings[0], positions, q)
    want = layer.proj((logits.softmax(-1) @ v).transpose(1, 2).flatten(2))
    assert (layer(x, AttentionContext(positions)) - want).abs().max() < 1e-10


def test_presets_and_errors():
    assert not build((3, 5), init_std=None).rel_pos_h.any()
    assert build((20, 30), head_dim=32, preset="mvit", init_std=None).rel_pos_w.std().item() == pytest.approx(
        0.02, rel=0.1
    )
    for options, word in (
        ({"preset": "vit"}, "sam"),
        ({"head_dim": 0}, "head_dim"),
        ({"reference_shape": 3}, "option"),
    ):
        with pytest.raises(ValueError, match=word):
            build((3, 5), **options)
    encoding = build((3, 5))
    with pytest.raises(ValueError, match="one grid"):
        encoding.bias(grid64((3, 5)), grid64((5, 3)), queries(grid64((3, 5))))
    with pytest.raises(ValueError, match="content"):
        encoding.bias(grid64((3, 5)))


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("grid", [(2, 3), (3, 1)])
def test_gradients(grid, whole):
    encoding, positions = build((2, 3), head_dim=2), grid64(grid)
    positions = positions if whole else vp.Positions(positions.coords + 0.25, grid)

    def bias(q, rows, columns):
        tables = {"rel_pos_h": rows, "rel_pos_w": columns}
        logits = torch.zeros(1, 1, 1, 1, dtype=F64).expand(1, 2, positions.num_tokens, positions.num_tokens)
        return torch.func.functional_call(encoding, tables, (logits, positions), {"content": q})

    inputs = [queries(positions, head_dim=2, batch=1).requires_grad_(), encoding.rel_pos_h, encoding.rel_pos_w]
    assert torch.autograd.gradcheck(bias, inputs)
