"""RoPE-Mixed: learned directions for every head and pair."""

import math

import pytest
import torch
from timm.layers.pos_embed_sincos import RotaryEmbeddingMixed, apply_rot_embed_cat

import visionpos as vp
from tests.parity.rotary_oracle import GRIDS, compare, gradcheck, grid64, point, relative_residual, rotation_matrix
from visionpos.rotary.rope_mixed import RopeMixed

FX = [0.8660254, 0.27386128, -0.5, -0.15811388]
FY = [0.5, 0.15811388, 0.8660254, 0.27386128]


def test_golden():
    freqs = RopeMixed.initial_freqs(torch.tensor([math.pi / 6], dtype=torch.float64), head_dim=8)
    assert freqs[0, 0].tolist() == pytest.approx(FX, abs=1e-8)
    assert freqs[1, 0].tolist() == pytest.approx(FY, abs=1e-8)
    encoding = vp.create_encoding("rope_mixed", num_heads=1, head_dim=8).double()
    with torch.no_grad():
        encoding.freqs.copy_(freqs)
    angles = encoding.angles(point(1, 2, (3, 4)))[0, 0]
    assert angles.tolist() == pytest.approx([2.23205081, 0.70583644, -0.1339746, -0.04236649], abs=1e-8)


@pytest.mark.parametrize("grid", GRIDS)
def test_unrotated_heads_are_axial(grid):
    encoding = vp.create_encoding("rope_mixed", num_heads=2, head_dim=12, temperature=10.0).double()
    with torch.no_grad():
        encoding.freqs.copy_(RopeMixed.initial_freqs(torch.zeros(2), 12))
    axial = vp.create_encoding("rope_axial", num_heads=2, head_dim=12, temperature=10.0)
    assert (encoding.angles(grid64(grid)) - axial.angles(grid64(grid))).abs().max() < 1e-12


@pytest.mark.parametrize("layout", ["interleaved", "half"])
@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize("grid", GRIDS)
def test_oracle(grid, heads, layout):
    encoding = vp.create_encoding("rope_mixed", num_heads=heads, head_dim=8, layout=layout).double()
    fx, fy = encoding.freqs.tolist()

    def matrix(head, y, x):
        return rotation_matrix([fx[head][c] * x + fy[head][c] * y for c in range(4)], layout)

    compare(encoding, grid, matrix)


@pytest.mark.parametrize("grid", [(3, 5), (4, 2), (1, 6)])
def test_against_timm(grid):
    """timm keeps the frequencies of all layers in one parameter, (2, depth, heads, head_dim / 2)."""
    rope = RotaryEmbeddingMixed(dim=24, depth=2, num_heads=3, feat_shape=list(grid))
    q = torch.randn(2, 3, grid[0] * grid[1], 8)
    for layer in range(2):
        encoding = vp.create_encoding("rope_mixed", num_heads=3, head_dim=8)
        with torch.no_grad():
            encoding.freqs.copy_(rope.freqs[:, layer])
        want = apply_rot_embed_cat(q, rope.get_embed()[layer])
        got, _ = encoding(q, q, vp.Positions.grid(grid))
        assert (got - want).abs().max() < 2e-6


def test_initialisation_rotates_heads():
    freqs = vp.create_encoding("rope_mixed", num_heads=64, head_dim=8).freqs.detach()
    magnitude = freqs.square().sum(0).sqrt()
    assert magnitude.allclose(torch.tensor([1, 10**-0.5, 1, 10**-0.5]).expand(64, 4))
    assert (freqs[:, :, :2] * freqs[:, :, 2:]).sum(0).abs().max() < 1e-6  # the two halves are a quarter turn apart
    quadrants = (freqs[:, :, 0] > 0).long().T @ torch.tensor([1, 2])
    assert set(quadrants.tolist()) == {0, 1, 2, 3}
    assert freqs.shape == (2, 64, 4)


@pytest.mark.parametrize("layout", ["interleaved", "half"])
def test_gradients(layout):
    assert gradcheck(vp.create_encoding("rope_mixed", num_heads=2, head_dim=4, layout=layout), (2, 3))


def test_relative():
    assert relative_residual(vp.create_encoding("rope_mixed", num_heads=2, head_dim=8).double()) < 1e-12


def test_errors():
    with pytest.raises(ValueError, match="head_dim must be a positive multiple of 4 .* got 6"):
        vp.create_encoding("rope_mixed", num_heads=1, head_dim=6)
    with pytest.raises(ValueError, match="rope_mixed: temperature must be a positive, finite number, got 0"):
        vp.create_encoding("rope_mixed", num_heads=1, head_dim=8, temperature=0.0)
