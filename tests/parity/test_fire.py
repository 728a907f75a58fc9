"""FIRE: a network of the normalised distance."""

import math

import pytest
import torch

import visionpos as vp
from visionpos.bias.fire import fire_input


def positions_of(grid, whole=True, prefix=0):
    return vp.Positions(vp.Positions.grid(grid).coords.double(), grid, prefix, is_grid=whole)


def fire(num_heads, grid, c=None, L=None):
    torch.manual_seed(0)
    encoding = vp.create_encoding("fire", num_heads=num_heads, feat_shape=grid).double()
    with torch.no_grad():
        for parameter, value in ((encoding.c, c), (encoding.L, L)):
            if value is not None:
                parameter.fill_(value)
    return encoding


def oracle(encoding, distance, diameter):
    first, _, last = encoding.mlp
    c, L = abs(encoding.c.item()), abs(encoding.L.item())
    x = math.log(c * distance + 1) / math.log(c * max(L, diameter) + 1)
    hidden = [max(0.0, w[0] * x + b) for w, b in zip(first.weight.tolist(), first.bias.tolist(), strict=True)]
    rows = zip(last.weight.tolist(), last.bias.tolist(), strict=True)
    return [sum(w * h for w, h in zip(row, hidden, strict=True)) + b for row, b in rows]


@pytest.mark.parametrize(
    ("index", "want"),
    [
        (6, [1, 0.86268506, 0.71589285, 0.55821753, 0.38791521, 0.20278605, 0]),
        (2, [0.54186211, 0.28326313, 0]),
    ],
)
def test_golden_input(index, want):
    c, threshold = torch.tensor(0.1, dtype=torch.float64), torch.tensor(4.0, dtype=torch.float64)
    distance = index - torch.arange(index + 1, dtype=torch.float64)
    assert fire_input(distance, float(index), c, threshold).tolist() == pytest.approx(want, abs=1e-8)


@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize(("c", "L"), [(0.1, 1.0), (-0.7, 9.0)])
@pytest.mark.parametrize(("grid", "whole"), [((2, 3), True), ((3, 2), False), ((1, 4), True), ((3, 5), False)])
def test_oracle(grid, whole, c, L, heads):
    encoding = fire(heads, grid, c, L)
    bias = encoding.bias(positions_of(grid, whole, prefix=1)).detach()
    assert (bias[:, 0] == 0).all()
    assert (bias[:, :, 0] == 0).all()
    diameter = math.hypot(grid[0] - 1, grid[1] - 1)
    for i in range(grid[0] * grid[1]):
        for j in range(grid[0] * grid[1]):
            d = math.hypot(i // grid[1] - j // grid[1], i % grid[1] - j % grid[1])
            assert bias[:, i + 1, j + 1].tolist() == pytest.approx(oracle(encoding, d, diameter), abs=1e-10)


def test_a_larger_grid_is_interpolated():
    encoding = fire(2, (3, 5))
    small, large = encoding.bias(positions_of((3, 5))), encoding.bias(positions_of((5, 9)))
    assert torch.allclose(small[:, 0, -1], large[:, 0, -1], atol=1e-6)  # corner to corner is 1 on both
    far = fire(2, (3, 5), L=100.0)  # a normaliser beyond both grids: distances keep their meaning
    assert torch.equal(far.bias(positions_of((3, 5)))[:, 0, 6], far.bias(positions_of((5, 9)))[:, 0, 10])


@pytest.mark.parametrize("grid", [(3, 5), (7, 12), (1, 4), (1, 1)])
def test_every_parameter_learns_from_the_start(grid):
    torch.manual_seed(0)
    encoding = vp.create_encoding("fire", num_heads=3, feat_shape=grid)
    assert encoding.c.item() == pytest.approx(0.1)
    assert encoding.L.item() == pytest.approx(max(math.hypot(grid[0] - 1, grid[1] - 1), 1))
    bias = encoding.bias(vp.Positions.grid(grid))
    assert bias.isfinite().all()
    (bias * torch.randn(bias.shape)).sum().backward()
    if grid != (1, 1):
        assert all(parameter.grad.abs().sum() > 0 for parameter in encoding.parameters())


def test_a_threshold_inside_the_grid_has_no_effect():
    positions = positions_of((3, 5))
    one, other = fire(2, (3, 5), L=0.5), fire(2, (3, 5), L=3.0)
    assert torch.equal(one.bias(positions), other.bias(positions))
    one.bias(positions).sum().backward()
    assert one.L.grad == 0


def test_extreme_parameters_stay_finite():
    for c in (0.0, 1e-20, 1e6):
        assert fire(2, (3, 5), c=c, L=0.0).bias(positions_of((3, 5))).isfinite().all()
        assert fire(2, (3, 5), c=c, L=0.0).float().bias(vp.Positions.grid((1, 1))).isfinite().all()


def test_names_and_options():
    encoding = vp.create_encoding("fire", num_heads=3, feat_shape=(3, 5), init_c=0.5, init_L=20.0)
    shapes = {name: tuple(p.shape) for name, p in encoding.named_parameters()}
    mlp = {"mlp.0.weight": (32, 1), "mlp.0.bias": (32,), "mlp.2.weight": (3, 32), "mlp.2.bias": (3,)}
    assert shapes == {"c": (), "L": (), **mlp}
    assert (encoding.c.item(), encoding.L.item()) == (0.5, 20.0)
    with pytest.raises(ValueError, match="fire: init_c must be a positive, finite number, got 0"):
        vp.create_encoding("fire", num_heads=3, feat_shape=(3, 5), init_c=0)
