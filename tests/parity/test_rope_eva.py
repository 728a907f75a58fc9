"""Rescaled axial RoPE: rows first, grids aligned at the top-left token."""

import pytest
import torch
from timm.layers.pos_embed_sincos import RotaryEmbeddingCat, apply_rot_embed_cat

import visionpos as vp
from tests.parity.rotary_oracle import GRIDS, compare, gradcheck, relative_residual, rotation_matrix


def test_golden():
    encoding = vp.create_encoding("rope_eva", num_heads=1, head_dim=8, reference_shape=(2, 2))
    angles = encoding.angles(vp.Positions.grid((3, 3)))[0]
    assert angles[:, 2].tolist() == pytest.approx([0, 0.6666667, 1.3333333] * 3, abs=1e-6)  # x
    assert angles[:, 0].tolist() == pytest.approx([0] * 3 + [0.6666667] * 3 + [1.3333333] * 3, abs=1e-6)  # y
    sines = angles[1].sin().repeat_interleave(2).tolist()
    assert sines == pytest.approx([0, 0, 0, 0, 0.61836980, 0.61836980, 0.00666662, 0.00666662], abs=1e-7)


@pytest.mark.parametrize("layout", ["interleaved", "half"])
@pytest.mark.parametrize("reference", [None, (4, 4), (3, 7)])
@pytest.mark.parametrize("grid", GRIDS)
def test_oracle(grid, reference, layout):
    encoding = vp.create_encoding(
        "rope_eva", num_heads=2, head_dim=8, temperature=50.0, reference_shape=reference, layout=layout
    )
    ref_h, ref_w = reference or grid
    theta = [50.0 ** (-4 * k / 8) for k in range(2)]

    def matrix(head, y, x):
        return rotation_matrix(
            [y / grid[0] * ref_h * t for t in theta] + [x / grid[1] * ref_w * t for t in theta], layout
        )

    compare(encoding, grid, matrix)


@pytest.mark.parametrize("reference", [None, (4, 4), (2, 6)])
@pytest.mark.parametrize("grid", [(4, 6), (5, 3), (1, 4)])
def test_against_timm(grid, reference):
    rope = RotaryEmbeddingCat(
        16, in_pixels=False, feat_shape=list(grid), ref_feat_shape=None if reference is None else list(reference)
    )
    q = torch.randn(1, 2, grid[0] * grid[1], 16)
    encoding = vp.create_encoding("rope_eva", num_heads=2, head_dim=16, reference_shape=reference)
    got, _ = encoding(q, q, vp.Positions.grid(grid))
    assert (got - apply_rot_embed_cat(q, rope.get_embed())).abs().max() < 2e-6


def test_extrapolate_takes_coordinates_as_they_are():
    on = vp.create_encoding("rope_eva", num_heads=1, head_dim=8, reference_shape=(2, 2), extrapolate=True)
    plain = vp.create_encoding("rope_eva", num_heads=1, head_dim=8)
    assert torch.equal(on.angles(vp.Positions.grid((3, 5))), plain.angles(vp.Positions.grid((3, 5))))


@pytest.mark.parametrize("grid", [(2, 3), (3, 2)])
def test_gradients(grid):
    assert gradcheck(vp.create_encoding("rope_eva", num_heads=1, head_dim=4, reference_shape=(4, 4)), grid)


def test_relative():
    assert relative_residual(vp.create_encoding("rope_eva", num_heads=2, head_dim=8, reference_shape=(4, 4))) < 1e-12


def test_errors():
    with pytest.raises(ValueError, match="head_dim must be a positive multiple of 4 .* got 6"):
        vp.create_encoding("rope_eva", num_heads=1, head_dim=6)
