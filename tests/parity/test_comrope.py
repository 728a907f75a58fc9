"""ComRoPE: blocks of channels turned by generators that commute."""

import math

import pytest
import torch

import visionpos as vp
from tests.parity.rotary_oracle import F64, GRIDS, compare, exponential, gradcheck, grid64, relative_residual, tokens
from tests.parity.test_liere import P1, UPPER, channels
from visionpos.rotary.blocks import skew


def build(**options):
    return vp.create_encoding("comrope", **{"num_heads": 1, "head_dim": 8, "block": 4, **options}).double()


def test_golden():
    """Coordinates are measured from the middle of the image: on a grid of one cell they are the distances to it."""
    encoding = build(head_dim=4)
    with torch.no_grad():
        encoding.generators[0, 0] = torch.stack([P1[i, j] for i, j in UPPER])
        encoding.theta.copy_(torch.tensor([[0.7], [-0.3]]))

    def r(x, y):
        return encoding.prepare(vp.Positions(torch.tensor([[y, x]], dtype=F64), (1, 1)))[0, 0, 0]

    assert r(1.0, 0.0)[0].tolist() == pytest.approx([0.93612436, 0.01203197, 0.0782964, 0.34263113], abs=1e-8)
    assert (r(0.2, 0.7).T @ r(0.9, 0.1) - r(0.7, -0.6)).abs().max() < 1e-14


@pytest.mark.parametrize("layout", ["interleaved", "half"])
@pytest.mark.parametrize(("preset", "block"), [("ld", 2), ("ld", 4), ("ld", 8), ("ap", 2), ("ap", 4)])
@pytest.mark.parametrize("grid", GRIDS)
def test_oracle(grid, preset, block, layout):
    encoding = build(num_heads=2, preset=preset, block=block, layout=layout)
    upper = encoding.generators.detach()

    def matrix(head, y, x):
        y, x = ((i + 0.5) / n - 0.5 for i, n in zip((y, x), grid, strict=True))
        out = torch.zeros(8, 8, dtype=F64)
        for j, place in enumerate(channels(block, 8 // block, layout)):
            if preset == "ld":
                phase = encoding.theta[0, j].item() * x + encoding.theta[1, j].item() * y
            else:
                phase = x if j % 2 else y
            rotation = exponential(phase * skew(upper[head, j], block))
            for a, channel in enumerate(place):
                out[channel, place] = rotation[a]
        return out

    compare(encoding, grid, matrix)


@pytest.mark.parametrize("grid", [(2, 3), (4, 1)])
@pytest.mark.parametrize("preset", ["ld", "ap"])
def test_class_token_is_where_the_paper_puts_it(preset, grid):
    """Logits equal those of the paper's frame, (i + 1/2) / n, with the class token turned as a token at (1/2, 1/2)."""
    encoding, positions = build(preset=preset), grid64(grid, 1)
    q, k = tokens(encoding, positions, batch=1)
    a, b = encoding(q, k, positions)
    middle = torch.tensor([[n / 2 - 0.5 for n in grid]], dtype=F64)  # grid steps: (i + 1/2) / n = 1/2
    shifted = torch.cat([middle, positions.coords]) + torch.tensor(grid, dtype=F64) / 2  # now i / n from the corner
    c, d = encoding(q, k, vp.Positions(shifted, grid))
    assert (a @ b.mT - c @ d.mT).abs().max() < 1e-12


@pytest.mark.parametrize("preset", ["ld", "ap"])
@pytest.mark.parametrize("block", [2, 4, 8])
def test_relative(preset, block):
    assert relative_residual(build(num_heads=2, head_dim=16, preset=preset, block=block)) < 1e-12


@pytest.mark.parametrize("grid", [(2, 3), (5, 2)])
def test_blocks_of_two_are_rope_mixed(grid):
    encoding = build(num_heads=2, block=2)
    mixed = vp.create_encoding("rope_mixed", num_heads=2, head_dim=8, layout="interleaved").double()
    with torch.no_grad():  # minus: the other sense of rotation; the grid's size: coordinates of a unit image
        sizes = torch.tensor([grid[1], grid[0]], dtype=F64).view(2, 1, 1)
        mixed.freqs.copy_(-encoding.theta.unsqueeze(1) * encoding.generators.squeeze(-1) / sizes)
    q, k = tokens(encoding, grid64(grid))
    a, b = encoding(q, k, grid64(grid))
    c, d = mixed(q, k, grid64(grid))
    assert (a @ b.mT - c @ d.mT).abs().max() < 1e-12


def test_initialisation_and_default():
    encoding = vp.create_encoding("comrope", num_heads=12, head_dim=64)
    assert encoding.generators.shape == (12, 32, 1)
    assert encoding.theta.shape == (2, 32)
    encoding = vp.create_encoding("comrope", num_heads=12, head_dim=64, block=8)
    assert encoding.generators.shape == (12, 8, 28)
    assert encoding.theta.shape == (2, 8)
    assert encoding.generators.std().item() == pytest.approx(math.sqrt(2), rel=0.1)
    small = vp.create_encoding("comrope", num_heads=12, head_dim=64, preset="ap", init_std=0.1)
    assert small.theta is None
    assert small.generators.std().item() == pytest.approx(0.1 * math.sqrt(2), rel=0.1)


@pytest.mark.parametrize(
    "options",
    [{"preset": "ld"}, {"preset": "ap", "block": 2}, {"preset": "ld", "block": 2, "layout": "half"}],
)
def test_gradients(options):
    assert gradcheck(build(head_dim=4, **options), (2, 3))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"preset": "lp"}, "preset must be one of 'ld', 'ap', got 'lp'"),
        ({"block": 3}, "head_dim must be a positive multiple of 3 .* got 8"),
        ({"preset": "ap", "block": 8}, "head_dim must be a positive multiple of 16 .* got 8"),
        ({"reference_shape": (2, 2)}, "comrope has no option 'reference_shape'"),
    ],
)
def test_errors(options, message):
    with pytest.raises(ValueError, match=message):
        build(**options)
