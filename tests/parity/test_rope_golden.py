"""Golden-gate RoPE, and its frequencies along evenly spread directions."""

import math

import pytest
import torch

import visionpos as vp
from tests.parity.rotary_oracle import GRIDS, compare, gradcheck, grid64, relative_residual, rotation_matrix

PHI = math.pi * (math.sqrt(5) - 1) / 2


def build(**options):
    return vp.create_encoding("rope_golden", **{"num_heads": 1, "head_dim": 8, **options})


def box(y, x, grid):
    """Area-preserving coordinates (y, x); an axis of one cell is 0."""
    halves = math.sqrt(grid[0] / grid[1]), math.sqrt(grid[1] / grid[0])
    return [half * (2 * i / (n - 1) - 1) if n > 1 else 0.0 for i, n, half in zip((y, x), grid, halves, strict=True)]


def test_golden():
    x, y = build().frequencies()[:, 0].tolist()
    assert x == pytest.approx([0.2, -0.33639905, -3.17722618, 17.93565645], abs=1e-8)
    assert y == pytest.approx([0, 0.86522226, -2.91059945, -8.84941963], abs=1e-8)
    omega = [math.hypot(*pair) for pair in zip(x, y, strict=True)]
    assert omega == pytest.approx([0.2, 0.92831777, 4.30886938, 20], abs=1e-8)


def test_golden_box():
    """The first pair turns with x alone, at 0.2 radians per unit; with one direction per axis one sees y too."""
    angles = build().angles(grid64((2, 3)))[0]
    assert (angles[:3, 0] / 0.2).tolist() == pytest.approx([-1.22474487, 0, 1.22474487], abs=1e-8)
    angles = build(num_directions=2).angles(grid64((2, 3)))[0]
    assert (angles[::3, 2] / 0.2).tolist() == pytest.approx([-0.81649658, 0.81649658], abs=1e-8)


@pytest.mark.parametrize("layout", ["half", "interleaved"])
@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize("grid", GRIDS)
def test_oracle(grid, heads, layout):
    encoding = build(num_heads=heads, min_freq=0.5, max_freq=30.0, zero_fraction=0.25, layout=layout)
    omega = [0, 0.5, math.sqrt(0.5 * 30), 30]

    def matrix(head, y, x):
        y, x = box(y, x, grid)
        turns = [PHI * (4 * head + i) for i in range(4)]
        return rotation_matrix(
            [w * (x * math.cos(t) + y * math.sin(t)) for w, t in zip(omega, turns, strict=True)], layout
        )

    compare(encoding, grid, matrix)


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("grid", GRIDS[:2])
def test_oracle_of_a_number_of_directions(grid, count):
    encoding = build(num_heads=2, head_dim=12, num_directions=count)
    each = 6 // count
    omega = [0.2 * 100 ** (i / (each - 1)) for i in range(each)]

    def matrix(head, y, x):
        y, x = box(y, x, grid)
        turns = [math.pi * k / count for k in range(count)]
        return rotation_matrix([w * (x * math.cos(t) + y * math.sin(t)) for t in turns for w in omega], "half")

    compare(encoding, grid, matrix)


@pytest.mark.parametrize(("share", "still"), [(0.0, 0), (0.25, 8), (0.9, 29), (0.999, 31)])
def test_zero_fraction(share, still):
    omega = build(head_dim=64, zero_fraction=share).frequencies().square().sum(0).sqrt()[0]
    assert (omega == 0).sum() == still
    assert omega[still].item() == pytest.approx(0.2)
    if still < 31:
        assert omega[-1].item() == pytest.approx(20)


def test_heads_differ():
    frequencies = build(num_heads=2).frequencies()
    assert (frequencies[:, 0, 3] - frequencies[:, 1, 3]).abs().max() > 1
    assert frequencies[:, 1, 0].tolist() == pytest.approx([0.2 * math.cos(4 * PHI), 0.2 * math.sin(4 * PHI)])


@pytest.mark.parametrize("options", [{}, {"num_directions": 2}])
def test_gradients(options):
    assert gradcheck(build(**options), (2, 3))


@pytest.mark.parametrize("options", [{}, {"zero_fraction": 0.5}, {"num_directions": 2}])
def test_relative(options):
    assert relative_residual(build(**options)) < 1e-12


def test_bfloat16_tokens_keep_exact_angles():
    positions = vp.Positions.grid((24, 40))
    assert torch.equal(build().bfloat16().angles(positions), build().angles(positions))
    assert (build().angles(positions) - build().angles(grid64((24, 40)))).abs().max() < 2e-6


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"min_freq": 0.0}, "rope_golden: min_freq must be a positive, finite number, got 0.0"),
        ({"min_freq": 30.0}, "frequencies must be 0 < min_freq <= max_freq, got 30.0 and 20.0"),
        ({"zero_fraction": 1.0}, r"zero_fraction must be in \[0, 1\), got 1.0"),
        ({"num_directions": 3}, "head_dim must be a positive multiple of 6 .* got 8"),
        ({"num_directions": 0}, "rope_golden: num_directions must be a positive integer or None, got 0"),
        ({"extrapolate": True}, "rope_golden: scaling='run_on' needs the grid that was trained on"),
    ],
)
def test_errors(options, message):
    with pytest.raises(ValueError, match=message):
        build(**options)
