"""Biases of the distance and of the offset on one, two and three axes, pair by pair in float64."""

import functools
import itertools
import math

import pytest
import torch

import visionpos as vp

F64 = torch.float64
GRIDS = [(7,), (3, 5), (2, 3, 4)]


def shapes(encoding):
    """The bias of each head as a function of the distance, on a grid of a given diameter."""
    if encoding.name == "alibi2d":
        return [lambda d, _, m=m: -m * d for m in (2**-4, 2**-8)]
    if encoding.name == "kerple":
        r1, r2 = encoding.r1.tolist(), encoding.r2.tolist()
        if encoding.preset == "log":
            return [lambda d, _, a=a, b=b: -a * math.log1p(b * d) for a, b in zip(r1, r2, strict=True)]
        return [lambda d, _, a=a, b=b: -a * d**b for a, b in zip(r1, r2, strict=True)]
    c, threshold = encoding.c.item(), encoding.L.item()

    def network(d, diameter, head):
        x = torch.tensor([math.log1p(c * d) / math.log1p(c * max(threshold, diameter))], dtype=F64)
        return encoding.mlp(x)[head].item()

    return [lambda d, diameter, head=head: network(d, diameter, head) for head in (0, 1)]


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize(
    ("name", "options"),
    [("alibi2d", {}), ("kerple", {"preset": "log"}), ("kerple", {"preset": "power"}), ("fire", {"feat_shape": (2, 2)})],
)
def test_oracle(name, options, grid):
    torch.manual_seed(0)
    encoding = vp.create_encoding(name, num_heads=2, **options).double()
    whole = vp.Positions.grid(grid, 1).promote(F64)
    real = torch.rand(2, 5, len(grid), generator=torch.Generator().manual_seed(1), dtype=F64) * 3
    diameter = math.hypot(*(size - 1 for size in grid))
    for positions in (whole, vp.Positions(real, grid, 1)):
        bias = encoding.bias(positions).detach()
        bias = bias if positions.is_batched else bias[None]
        for sample, coords in enumerate(positions.coords if positions.is_batched else positions.coords[None]):
            assert not bias[sample, :, 0].any()
            for head, shape in enumerate(shapes(encoding)):
                want = [[shape(math.dist(p, q), diameter) for q in coords.tolist()] for p in coords.tolist()]
                assert (bias[sample, head, 1:, 1:] - torch.tensor(want, dtype=F64)).abs().max() < 1e-10


def offsets(grid):
    """Of each pair of tokens of a whole grid in row-major order: query minus key."""
    tokens = list(itertools.product(*map(range, grid)))
    return [[tuple(a - b for a, b in zip(p, q, strict=True)) for q in tokens] for p in tokens]


def of_pairs(function, grid):
    """What a function says of each pair, heads first: (heads, N, N)."""
    return torch.stack([torch.stack([function(offset) for offset in row]) for row in offsets(grid)]).permute(2, 0, 1)


def row_of(preset, offset, grid):
    """The row of the table that an offset has."""
    row, sign = 0, -1 if preset == "maxvit" else 1
    for d, n in zip(offset, grid, strict=True):
        row = row * n + abs(d) if preset == "levit" else row * (2 * n - 1) + sign * d + n - 1
    return row


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("preset", ["swin", "beit", "maxvit", "levit"])
def test_table_oracle(preset, grid):
    torch.manual_seed(0)
    encoding = vp.create_encoding("relative_table", num_heads=2, feat_shape=grid, preset=preset, init_std=1.0).double()
    table, whole = encoding.relative_position_bias_table.detach(), vp.Positions.grid(grid, 1).promote(F64)
    want, bias = of_pairs(lambda offset: table[row_of(preset, offset, grid)], grid), encoding.bias(whole).detach()
    assert torch.equal(bias[:, 1:, 1:], want)
    to_patch, to_class, _ = table[-3:] if preset == "beit" else torch.zeros(3, 2)
    assert (bias[:, 0, 1:] == to_patch[:, None]).all()
    assert (bias[:, 1:, 0] == to_class[:, None]).all()
    order = torch.randperm(whole.num_patches)
    kept = encoding.bias(whole.keep(order)).detach()[:, 1:, 1:]
    assert (kept - want[:, order][:, :, order]).abs().max() < 1e-12


@pytest.mark.parametrize("grid", GRIDS)
def test_between_offsets_a_table_is_read_linearly_on_every_axis(grid):
    encoding = vp.create_encoding("relative_table", num_heads=1, feat_shape=grid).double()
    slopes = torch.arange(1, len(grid) + 1, dtype=F64)
    steps = vp.Positions.grid(tuple(2 * n - 1 for n in grid)).coords.double()
    encoding.relative_position_bias_table.data[:, 0] = (steps - steps[-1] / 2) @ slopes
    far = torch.tensor([n - 1 for n in grid])
    coords = torch.rand(6, len(grid), generator=torch.Generator().manual_seed(1), dtype=F64) * far
    want = (coords[:, None] - coords) @ slopes
    assert (encoding.bias(vp.Positions(coords, grid))[0] - want).abs().max() < 1e-12


@pytest.mark.parametrize(("old", "new"), [((3,), (5,)), ((2, 3, 2), (3, 4, 5)), ((3, 2, 4), (2, 2, 3))])
@pytest.mark.parametrize("preset", ["swin", "beit", "levit"])
def test_a_table_of_another_window_is_resized_axis_by_axis(preset, old, new):
    def create(sizes):
        return vp.create_encoding("relative_table", num_heads=1, feat_shape=sizes, preset=preset, init_std=1.0).double()

    def rows(encoding):
        table = encoding.relative_position_bias_table.detach()
        return table[: len(table) - 3 * (preset == "beit"), 0]

    def product(tables):
        return functools.reduce(lambda a, b: (a[:, None] * b).flatten(), tables)

    whole, axes = create(old), [create((n,)) for n in old]
    rows(whole).copy_(product(map(rows, axes)))
    whole.set_feat_shape(new)
    for each, size in zip(axes, new, strict=True):
        each.set_feat_shape((size,))
    assert (rows(whole) - product(map(rows, axes))).abs().max() < 1e-12


@pytest.mark.parametrize("grid", GRIDS)
def test_network_oracle(grid):
    torch.manual_seed(0)
    trained = tuple(n + 1 for n in grid)
    encoding = vp.create_encoding("log_cpb", num_heads=2, pretrained_window=trained, init_std=0.5).double()
    assert encoding.cpb_mlp[0].weight.shape == (512, len(grid))

    def bias(offset):
        u = [8 * d / (n - 1) for d, n in zip(offset, trained, strict=True)]
        g = [math.copysign(math.log2(1 + abs(each)) / 3, each) for each in u]
        return 16 * encoding.cpb_mlp(torch.tensor(g, dtype=F64)).sigmoid()

    want, whole = of_pairs(bias, grid), vp.Positions.grid(grid, 1).promote(F64)
    assert not encoding.bias(whole)[:, 0].any()
    assert (encoding.bias(whole)[:, 1:, 1:] - want).abs().max() < 1e-12
    assert (encoding.bias(whole.keep(torch.arange(4)))[:, 1:, 1:] - want[:, :4, :4]).abs().max() < 1e-12


@pytest.mark.parametrize(
    ("name", "options", "axes"),
    [
        ("relative_table", {"feat_shape": (2, 3, 4)}, 3),
        ("relative_table", {"feat_shape": (5,)}, 1),
        ("log_cpb", {"pretrained_window": (2, 3, 4)}, 3),
        ("log_cpb", {}, 2),
        ("kerple", {"reference_shape": (2, 3, 4)}, 3),
        ("alibi2d", {"reference_shape": (2, 3)}, 2),
    ],
)
def test_what_was_trained_says_how_many(name, options, axes):
    encoding = vp.create_encoding(name, num_heads=2, **options)
    for grid in GRIDS:
        positions = vp.Positions.grid(grid)
        if len(grid) == axes:
            assert encoding.bias(positions).isfinite().all()
        else:
            with pytest.raises(ValueError, match=rf"^{name} needs {axes} coordinates of a token, .* got {len(grid)}$"):
                encoding.bias(positions)


@pytest.mark.parametrize(("name", "given"), [("t5", (3,)), ("lookhere", (2, 3, 4))])
def test_a_trained_grid_on_other_axes(name, given):
    extra = {"layer": 0, "depth": 2} if name == "lookhere" else {}
    with pytest.raises(ValueError, match=f"^{name}: reference_shape must be 2 positive integers, got "):
        vp.create_encoding(name, num_heads=2, reference_shape=given, **extra)
