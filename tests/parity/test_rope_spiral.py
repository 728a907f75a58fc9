"""Spiral RoPE: the paper's closed form, its golden values, and what its authors' code agrees with."""

import math

import pytest
import torch

import visionpos as vp
from tests.parity.rotary_oracle import (
    F64,
    GRIDS,
    compare,
    gradcheck,
    grid64,
    point,
    relative_residual,
    rotation_matrix,
    tokens,
)


def build(**options):
    return vp.create_encoding("rope_spiral", **{"num_heads": 1, "head_dim": 16, **options})


def test_golden_angles_and_logit():
    encoding = build()
    angles = encoding.angles(point(1.0, 2.0, (14, 14)))[0, 0]
    want = [1.5, 0.15, 0.0318198052, 0.0031819805, 3.0, 0.3, 0.0106066017, 0.0010606602]
    assert angles.tolist() == pytest.approx(want, abs=1e-9)
    ones = torch.ones(1, 1, 2, 16, dtype=F64)
    pair = vp.Positions(torch.tensor([[4.0, 3.0], [5.0, 5.0]], dtype=F64), (14, 14))
    q, k = encoding(ones, ones, pair)
    assert (q @ k.mT)[0, 0, 0, 1].item() == pytest.approx(10.048568380748, abs=1e-9)


def test_golden_of_the_authors_frame():
    """14 x 14, head_dim 64, token (2, 3): they turn, in float32, about c = 6.5 and add c: one number for all."""
    angles = build(head_dim=64).angles(point(2.0, 3.0, (14, 14)))[0, 0]
    f = 1.5 * 1e4 ** (-4 * torch.arange(16, dtype=F64) / 64)
    t = torch.tensor([0, 0, 1, 1] * 4, dtype=F64) * math.pi / 4
    shift = torch.cat([f * 6.5 * (1 - t.sin() - t.cos()), f * 6.5 * (1 - t.cos() + t.sin())])
    got = angles + shift
    assert got[:4].tolist() == pytest.approx([3.0, 1.68702398, 0.39993919, 0.22490233], abs=1e-7)
    assert got[16:20].tolist() == pytest.approx([4.5, 2.53053596, 3.41863091, 1.92243744], abs=1e-7)


@pytest.mark.parametrize("directions", [2, 4, 8, 16])
def test_every_frequency_has_two_orthogonal_directions(directions):
    """Sixteen different frequencies at head_dim 64, not the same few in each direction."""
    x, y = build(head_dim=64, num_directions=directions).frequencies()[:, 0]
    speeds = torch.stack([x, y]).norm(dim=0)
    want = [1.5 * 1e4 ** (-4 * p / 64) for p in range(16)]
    assert speeds.tolist() == pytest.approx(want * 2, rel=1e-12)
    assert (x[:16] * x[16:] + y[:16] * y[16:]).abs().max() < 1e-12
    turns = {
        round(math.atan2(b, a) % math.pi / math.pi * directions, 6) for a, b in zip(x.tolist(), y.tolist(), strict=True)
    }
    assert {turn % directions for turn in turns} == set(range(directions))


@pytest.mark.parametrize("layout", ["interleaved", "half"])
@pytest.mark.parametrize(("directions", "head_dim", "side"), [(2, 12, 14), (4, 24, 14), (6, 36, 9), (8, 16, 5)])
@pytest.mark.parametrize("grid", GRIDS)
def test_oracle(grid, directions, head_dim, side, layout):
    encoding = build(
        num_heads=2,
        head_dim=head_dim,
        num_directions=directions,
        temperature=300.0,
        max_freq=0.7,
        reference_side=side,
        layout=layout,
    )

    def matrix(head, y, x):
        y, x = y * side / grid[0], x * side / grid[1]
        first, second = [], []
        for p in range(head_dim // 4):
            f = 0.7 * 300.0 ** (-4 * p / head_dim)
            t = math.floor(p / 2) % (directions // 2) * math.pi / directions
            first.append(f * (x * math.sin(t) + y * math.cos(t)))
            second.append(f * (x * math.cos(t) - y * math.sin(t)))
        return rotation_matrix(first + second, layout)

    compare(encoding, grid, matrix)


def test_two_directions_are_axial_with_y_first():
    encoding = build(num_directions=2, max_freq=1.0)
    axial = vp.create_encoding("rope_eva", num_heads=1, head_dim=16, reference_shape=(14, 14))
    q, k = tokens(encoding, grid64((3, 5)))
    for got, want in zip(encoding(q, k, grid64((3, 5))), axial(q, k, grid64((3, 5))), strict=True):
        assert (got - want).abs().max() < 1e-12


@pytest.mark.parametrize("directions", [2, 4, 8])
def test_relative(directions):
    assert relative_residual(build(num_directions=directions)) < 1e-12


def test_gradients():
    assert gradcheck(build(head_dim=8), (2, 3))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_directions": 3}, "num_directions must be a positive multiple of 2 .* got 3"),
        ({"num_directions": 8, "head_dim": 24}, "head_dim must be a positive multiple of 16 .* got 24"),
        ({"max_freq": 0.0}, "rope_spiral: max_freq must be a positive, finite number, got 0.0"),
        ({"reference_side": 0}, "rope_spiral: reference_side must be a positive integer, got 0"),
    ],
)
def test_errors(options, message):
    with pytest.raises(ValueError, match=message):
        build(**options)
