"""KERPLE: logarithmic and power kernels of the distance."""

import math

import pytest
import torch

import visionpos as vp

GOLDEN = {
    "log": (1.5, 0.5, [0, -0.60819766, -1.03972077, -1.3744361, -1.64791843]),
    "power": (0.5, 1.5, [0, -0.5, -1.41421356, -2.59807621, -4]),
}


def positions_of(grid, whole=True, prefix=0):
    return vp.Positions(vp.Positions.grid(grid).coords.double(), grid, prefix, is_grid=whole)


def kerple(num_heads, preset="log", r1=None, r2=None):
    torch.manual_seed(0)
    encoding = vp.create_encoding("kerple", num_heads=num_heads, preset=preset).double()
    with torch.no_grad():
        for parameter, value in ((encoding.r1, r1), (encoding.r2, r2)):
            if value is not None:
                parameter.copy_(torch.as_tensor(value, dtype=torch.float64))
    return encoding


@pytest.mark.parametrize("preset", GOLDEN)
def test_golden(preset):
    r1, r2, want = GOLDEN[preset]
    for grid in ((1, 5), (5, 1)):
        bias = kerple(1, preset, r1, r2).bias(positions_of(grid))[0]
        assert bias[0].tolist() == pytest.approx(want, abs=1e-8)
        assert bias[2].tolist() == pytest.approx([want[2], want[1], 0, want[1], want[2]], abs=1e-8)


@pytest.mark.parametrize("preset", GOLDEN)
@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize(("grid", "whole"), [((2, 3), True), ((3, 2), False), ((1, 4), True), ((3, 5), False)])
def test_oracle(grid, whole, heads, preset):
    encoding = kerple(heads, preset)
    r1, r2 = encoding.r1.tolist(), encoding.r2.tolist()
    bias = encoding.bias(positions_of(grid, whole, prefix=1)).detach()
    assert (bias[:, 0] == 0).all()
    assert (bias[:, :, 0] == 0).all()
    for i in range(grid[0] * grid[1]):
        for j in range(grid[0] * grid[1]):
            d = math.hypot(i // grid[1] - j // grid[1], i % grid[1] - j % grid[1])
            want = [-a * math.log(1 + b * d) if preset == "log" else -a * d**b for a, b in zip(r1, r2, strict=True)]
            assert bias[:, i + 1, j + 1].tolist() == pytest.approx(want, abs=1e-10)


@pytest.mark.parametrize(
    ("preset", "given", "acting"),
    [("log", (-1.0, 5.0), (0.01, 5.0)), ("log", (3.0, 0.0), (3.0, 0.01)), ("power", (-1.0, 2.5), (0.01, 2.0))],
)
def test_clamp_lets_the_gradient_pass(preset, given, acting):
    outside, inside = (kerple(1, preset, *values) for values in (given, acting))
    positions = positions_of((2, 3))
    for encoding in (outside, inside):
        encoding.bias(positions).sum().backward()
    assert torch.allclose(outside.bias(positions), inside.bias(positions), atol=1e-12)
    for name in ("r1", "r2"):
        assert getattr(outside, name).grad.item() == pytest.approx(getattr(inside, name).grad.item(), rel=1e-9)
        assert getattr(outside, name).grad.item() != 0
    assert (outside.r1.item(), outside.r2.item()) == given  # the parameters themselves are left alone


@pytest.mark.parametrize(("preset", "highest"), [("log", (2.0, 1.0)), ("power", (1.0, 2.0))])
def test_initial_weights(preset, highest):
    encoding = kerple(5000, preset)
    for parameter, high in zip((encoding.r1, encoding.r2), highest, strict=True):
        assert parameter.min() >= 0.01
        assert 0.99 * high < parameter.max() <= high
        assert parameter.mean().item() == pytest.approx(high / 2, rel=0.05)
    assert encoding.no_weight_decay() == {"r1", "r2"}


def test_conditionally_positive_definite():
    """Why the kernel may be used in two dimensions: no weights that sum to zero give a negative form."""
    for preset in GOLDEN:
        bias = kerple(4, preset).bias(positions_of((3, 4))).detach()
        centred = torch.eye(12, dtype=torch.float64) - 1 / 12
        assert torch.linalg.eigvalsh(centred @ bias @ centred).min() > -1e-10


def test_errors():
    with pytest.raises(ValueError, match="preset must be one of 'log', 'power', got 'cubic'"):
        kerple(2, "cubic")
