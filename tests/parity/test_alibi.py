"""ALiBi over the flat index and in two dimensions."""

import math

import pytest
import torch

import visionpos as vp

SLOPES = {
    1: [0.00390625],
    3: [0.0625, 0.00390625, 0.25],
    6: [0.25, 0.0625, 0.015625, 0.00390625, 0.5, 0.125],
    8: [2.0**-i for i in range(1, 9)],
    12: [2.0**-i for i in range(1, 9)] + [0.70710678, 0.35355339, 0.1767767, 0.08838835],
}


@pytest.mark.parametrize("heads", SLOPES)
def test_slopes(heads):
    assert vp.alibi_slopes(heads, dtype=torch.float64).tolist() == pytest.approx(SLOPES[heads], abs=1e-8)
    assert vp.alibi_slopes(heads).tolist() == pytest.approx(SLOPES[heads], abs=2e-6)


def test_golden_two_dimensions():
    bias = vp.create_encoding("alibi2d", num_heads=8).bias(vp.Positions.grid((2, 2)))
    assert bias[0, 0].tolist() == pytest.approx([0, -0.5, -0.5, -0.70710678], abs=2e-6)
    assert bias[7, 0].tolist() == pytest.approx([0, -0.00390625, -0.00390625, -0.00552427], abs=2e-6)
    row = vp.create_encoding("alibi2d", num_heads=8).bias(vp.Positions.grid((3, 3)))[0, 0]
    want = [0, -0.5, -1, -0.5, -0.70710678, -1.11803399, -1, -1.11803399, -1.41421356]
    assert row.tolist() == pytest.approx(want, abs=2e-6)


@pytest.mark.parametrize("heads", [1, 3, 4])
@pytest.mark.parametrize("grid", [(2, 3), (4, 1), (3, 5)])
@pytest.mark.parametrize("name", ["alibi", "alibi2d"])
def test_oracle(name, grid, heads):
    positions = vp.Positions(vp.Positions.grid(grid).coords.double(), grid, num_prefix_tokens=1)
    bias = vp.create_encoding(name, num_heads=heads).bias(positions)
    slopes = vp.alibi_slopes(heads, dtype=torch.float64)
    count = grid[0] * grid[1]
    assert bias.shape == (heads, count + 1, count + 1)
    assert (bias[:, 0] == 0).all()
    assert (bias[:, :, 0] == 0).all()
    for i in range(count):
        for j in range(count):
            (yi, xi), (yj, xj) = divmod(i, grid[1]), divmod(j, grid[1])
            distance = abs(i - j) if name == "alibi" else math.hypot(yi - yj, xi - xj)
            for head in range(heads):
                assert bias[head, i + 1, j + 1].item() == pytest.approx(-slopes[head].item() * distance, abs=1e-12)


def test_queries_and_keys_at_different_places():
    encoding = vp.create_encoding("alibi2d", num_heads=2)
    positions = vp.Positions.grid((3, 4), num_prefix_tokens=1)
    keys = positions.keep(torch.tensor([5, 0, 11]))
    bias = encoding.bias(positions, keys=keys)
    assert bias.shape == (2, 13, 4)
    assert torch.equal(bias, encoding.bias(positions)[:, :, [0, 6, 1, 12]])


def test_keys_elsewhere_are_carried_to_the_trained_grid_too():
    encoding = vp.create_encoding("alibi2d", num_heads=2, reference_shape=(3, 4), extrapolate=False)
    positions = vp.Positions.grid((5, 10))
    index = torch.tensor([5, 0, 49])
    assert torch.equal(encoding.bias(positions, keys=positions.keep(index)), encoding.bias(positions)[:, :, index])


def test_monotone_and_unbounded():
    bias = vp.create_encoding("alibi2d", num_heads=1).bias(vp.Positions.grid((1, 40)))[0, 0]
    assert (bias.diff() < 0).all()


def test_gradient_of_coordinates_is_finite_at_distance_zero():
    coords = vp.Positions.grid((2, 3)).coords.requires_grad_()
    vp.create_encoding("alibi2d", num_heads=1).bias(vp.Positions(coords, (2, 3))).sum().backward()
    assert coords.grad.isfinite().all()


def test_errors():
    with pytest.raises(ValueError, match="num_heads must be positive, got 0"):
        vp.alibi_slopes(0)
