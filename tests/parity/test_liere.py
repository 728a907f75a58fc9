"""LieRE: blocks of channels turned by generators that do not commute."""

import math

import pytest
import torch

import visionpos as vp
from tests.parity.rotary_oracle import (
    F64,
    GRIDS,
    compare,
    exponential,
    gradcheck,
    grid64,
    point,
    relative_residual,
    rotation_matrix,
    tokens,
)
from visionpos.rotary.blocks import skew

P1 = torch.arange(1, 17, dtype=F64).view(4, 4) / 10
P2 = torch.arange(16, 0, -1, dtype=F64).view(4, 4) / 10
UPPER = [(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)]


def build(**options):
    return vp.create_encoding("liere", **{"num_heads": 1, "head_dim": 8, "block": 4, **options}).double()


def channels(block, blocks, layout):
    """The channels of each block."""
    if layout == "interleaved":
        return [[block * j + i for i in range(block)] for j in range(blocks)]
    return [[j + blocks * i for i in range(block)] for j in range(blocks)]


def test_skew_reads_rows_of_the_upper_triangle():
    matrix = skew(torch.tensor([1.0, 2, 3, 4, 5, 6]), 4)
    assert matrix.tolist() == [[0, 1, 2, 3], [-1, 0, 4, 5], [-2, -4, 0, 6], [-3, -5, -6, 0]]


def test_golden():
    encoding = build(head_dim=4)
    with torch.no_grad():
        for axis, p in enumerate((P1, P2)):
            encoding.generators[axis, 0, 0] = torch.stack([p[i, j] for i, j in UPPER])

    def r(x, y):
        return encoding.prepare(point(y, x, (2, 2)))[0, 0, 0]

    assert r(1, 0)[0].tolist() == pytest.approx([0.88348479, -0.0417083, 0.01047729, 0.46648181], abs=1e-8)
    residual = (r(0.2, 0.7).T @ r(0.9, 0.1) - r(0.7, -0.6)).abs().max()
    assert residual.item() == pytest.approx(0.55872781, abs=1e-8)


@pytest.mark.parametrize("layout", ["interleaved", "half"])
@pytest.mark.parametrize("block", [2, 4, 8])
@pytest.mark.parametrize("reference", [None, (3, 4)])
@pytest.mark.parametrize("grid", GRIDS)
def test_oracle(grid, reference, block, layout):
    encoding = build(num_heads=2, block=block, layout=layout, reference_shape=reference)
    upper = encoding.generators.detach()
    last = [n / (reference or grid)[axis] for axis, n in enumerate(grid)]
    where = [(i, j) for i in range(block) for j in range(i + 1, block)]

    def matrix(head, y, x):
        y, x = (last[a] * i / (grid[a] - 1) if grid[a] > 1 else 0.0 for a, i in enumerate((y, x)))
        out = torch.zeros(8, 8, dtype=F64)
        for j, place in enumerate(channels(block, 8 // block, layout)):
            generator = torch.zeros(block, block, dtype=F64)
            for entry, (a, b) in enumerate(where):
                generator[a, b] = x * upper[0, head, j, entry] + y * upper[1, head, j, entry]
            rotation = exponential(generator - generator.T)
            for a, channel in enumerate(place):
                out[channel, place] = rotation[a]
        return out

    compare(encoding, grid, matrix)


@pytest.mark.parametrize("layout", ["interleaved", "half"])
def test_blocks_of_two_turn_against_rope(layout):
    encoding = build(block=2, layout=layout)
    angles = encoding.angles(grid64((2, 3)))[0].tolist()
    compare(encoding, (2, 3), lambda head, y, x: rotation_matrix([-a for a in angles[3 * y + x]], layout))


def test_not_relative_unless_blocks_have_two_channels():
    assert relative_residual(build(num_heads=2, head_dim=16, block=8)) > 0.05
    assert relative_residual(build(num_heads=2, head_dim=16, block=2)) < 1e-12


@pytest.mark.parametrize("layout", ["interleaved", "half"])
def test_one_generator_of_the_authors_for_all_heads(layout):
    """Theirs are (y, x); in the order (x, y) and repeated, every head turns by them."""
    theirs = torch.randn(2, 2, 6, dtype=F64)  # y and x, blocks, upper triangle
    encoding = build(num_heads=3, layout=layout)
    with torch.no_grad():
        encoding.generators.copy_(theirs.flip(0).unsqueeze(1).expand(2, 3, 2, 6))

    def matrix(head, y, x):
        out = torch.zeros(8, 8, dtype=F64)
        for j, place in enumerate(channels(4, 2, layout)):
            rotation = exponential(skew(y / 1 * theirs[0, j] + x / 2 * theirs[1, j], 4))
            for a, channel in enumerate(place):
                out[channel, place] = rotation[a]
        return out

    compare(encoding, (2, 3), matrix)


def test_initialisation_and_default():
    encoding = vp.create_encoding("liere", num_heads=12, head_dim=64)
    assert encoding.generators.shape == (2, 12, 8, 28)
    assert encoding.angles(vp.Positions.grid((2, 3))).shape == (12, 6, encoding.num_angles) == (12, 6, 8 * 28)
    assert 0 <= encoding.generators.min() < 0.1
    assert 2 * math.pi - 0.1 < encoding.generators.max() <= 2 * math.pi


@pytest.mark.parametrize("batched", [False, True])
def test_batched_coordinates_and_subsets(batched):
    encoding, positions = build(num_heads=2), grid64((3, 4), 1)
    q, k = tokens(encoding, positions, batch=3)
    index = torch.tensor([[5, 0, 7], [1, 2, 3], [11, 4, 6]]) if batched else torch.tensor([5, 0, 7]).expand(3, 3)
    full, _ = encoding(q, k, positions)
    rows = torch.cat([torch.zeros(3, 1, dtype=torch.long), 1 + index], dim=1)
    kept = torch.stack([x[:, r] for x, r in zip(q, rows, strict=True)])
    got, _ = encoding(kept, kept, positions.keep(index if batched else index[0]))
    want = torch.stack([x[:, r] for x, r in zip(full, rows, strict=True)])
    assert (got - want).abs().max() < 1e-12


@pytest.mark.parametrize("name", ["liere", "comrope", "string"])
def test_autocast_does_not_round_the_products(name):
    encoding = vp.create_encoding(name, num_heads=2, head_dim=16)
    positions = vp.Positions.grid((3, 4), 1)
    q, k = tokens(encoding, positions, dtype=torch.float32)
    want = encoding(q, k, positions)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = encoding(q, k, positions)
    assert torch.equal(got[0], want[0])
    assert torch.equal(got[1], want[1])
    assert encoding(q.bfloat16(), k.bfloat16(), positions)[0].dtype == torch.bfloat16


@pytest.mark.parametrize("block", [8, 16])
def test_float32_is_as_good_as_its_coordinates(block):
    encoding = vp.create_encoding("liere", num_heads=2, head_dim=16, block=block)
    exact = encoding.prepare(grid64((6, 9)))
    assert (encoding.prepare(vp.Positions.grid((6, 9))).double() - exact).abs().max() < 2e-6


@pytest.mark.parametrize(("block", "layout"), [(2, "half"), (4, "interleaved"), (4, "half")])
def test_gradients(block, layout):
    encoding = build(head_dim=4, block=block, layout=layout)
    with torch.no_grad():
        encoding.generators.mul_(0.2)
    assert gradcheck(encoding, (2, 3))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"block": 3}, "head_dim must be a positive multiple of 3 .* got 8"),
        ({"block": 1}, "block must be 2 or more, got 1"),
        ({"extrapolate": True}, "liere has no option 'extrapolate'"),
        ({"layout": "both"}, "layout must be one of"),
    ],
)
def test_errors(options, message):
    with pytest.raises(ValueError, match=message):
        build(**options)
