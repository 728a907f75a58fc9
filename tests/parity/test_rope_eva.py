"""Rescaled axial RoPE: rows first, grids aligned at the top-left token."""

import pytest
import torch
from timm.layers.pos_embed_sincos import RotaryEmbeddingCat, apply_rot_embed_cat

import visionpos as vp
from tests.parity.rotary_oracle import GRIDS, compare, gradcheck, relative_residual, rotation_matrix
from tests.small import pictures, vit


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


def registers(prefix, head_dim=64, **options):
    encoding = vp.create_encoding("rope_eva", num_heads=2, head_dim=head_dim, register_temperature=100.0, **options)
    cos, sin = encoding.prepare(vp.Positions.grid((3, 5), prefix)).double()
    return torch.atan2(sin, cos)[0, :prefix]


@pytest.mark.parametrize("prefix", [4, 5, 9, 10])
def test_registers_stand_on_a_grid_of_their_own(prefix):
    """ViT-5: bands 1, .749894209, .562341325 of a head of 64 channels, rows first; the class token does not turn."""
    angles, side = registers(prefix, reference_shape=(4, 4)), 3 if prefix > 5 else 2
    want = [[0.0] * 32] * (prefix - side**2)
    for y in range(side):
        for x in range(side):
            want.append([place * 100 ** (-4 * k / 64) for place in (y, x) for k in range(16)])
    assert (angles - torch.tensor(want, dtype=torch.float64)).abs().max() < 1e-6
    assert angles[-1, :3].tolist() == pytest.approx([(side - 1) * b for b in (1, 0.749894209, 0.562341325)], abs=1e-6)


def test_registers_in_a_model_see_the_patches_and_each_other_by_position():
    spec = {"name": "rope_eva", "register_temperature": 100.0}
    model, plain = vit(spec, reg_tokens=4), vit("rope_eva", reg_tokens=4)
    model.load_state_dict(plain.state_dict())
    assert (model(pictures()) - plain(pictures())).abs().max() > 1e-6
    encoding, positions = vp.get_encoding(model)[0], vp.Positions.grid((8, 12), 5)
    index = torch.tensor([[3, 50], [95, 0]])
    kept = encoding.take_tokens(encoding.prepare(positions), index, 5)
    assert torch.equal(kept, encoding.prepare(positions.keep(index)))
    q = torch.randn(2, 3, 101, 16)
    turned, _ = encoding(q, q, positions)
    assert torch.equal(turned[:, :, :2], q[:, :, :2])  # the class token, and the register at (0, 0)
    assert all((turned[:, :, i] - q[:, :, i]).abs().max() > 0.1 for i in range(2, 5))


def test_registers_that_are_no_square():
    with pytest.raises(ValueError, match="needs a square number of registers, .*, got 7 prefix tokens"):
        registers(7)
    assert registers(1).abs().max() == 0  # a class token alone
    assert torch.equal(registers(5, zero_fraction=0.5)[:, 8:16], torch.zeros(5, 8))
