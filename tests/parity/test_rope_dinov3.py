"""DINOv3's RoPE: a centred box, rows first, the two halves of a head paired."""

import math

import pytest
import torch
from timm.layers.pos_embed_sincos import RotaryEmbeddingDinoV3, apply_rot_embed_cat

import visionpos as vp
from tests.parity.rotary_oracle import GRIDS, compare, gradcheck, grid64, relative_residual, rotation_matrix


def build(**options):
    return vp.create_encoding("rope_dinov3", **{"num_heads": 1, "head_dim": 8, **options})


def test_golden():
    angles = build().angles(grid64((2, 3)))[0]
    assert angles[0].sin().tolist() == pytest.approx([0, -0.30901699, 0.8660254, -0.40673664], abs=1e-8)
    assert angles[0].cos().tolist() == pytest.approx([-1, 0.95105652, -0.5, 0.91354546], abs=1e-8)
    assert angles[5].sin().tolist() == pytest.approx([0, 0.30901699, -0.8660254, 0.40673664], abs=1e-8)


@pytest.mark.parametrize(
    ("normalize", "rows", "columns"),
    [
        ("separate", [-0.5, 0.5], [-0.75, -0.25, 0.25, 0.75]),
        ("max", [-0.75, -0.25], [-0.75, -0.25, 0.25, 0.75]),
        ("min", [-0.5, 0.5], [-0.5, 0.5, 1.5, 2.5]),
    ],
)
def test_golden_coordinates(normalize, rows, columns):
    angles = build(normalize=normalize).angles(grid64((2, 4)))[0].unflatten(0, (2, 4)) / (2 * math.pi)
    assert angles[:, 0, 0].tolist() == pytest.approx(rows)
    assert angles[0, :, 2].tolist() == pytest.approx(columns)


def test_golden_periods():
    angles = build(min_period=0.5, max_period=4.0).angles(grid64((1, 4)))[0]
    assert (2 * math.pi * 0.75 / angles[3, 2:]).tolist() == pytest.approx([0.5, 4])
    assert (2 * math.pi * 0.75 / build().angles(grid64((1, 4)))[0, 3, 2:]).tolist() == pytest.approx([1, 10])


@pytest.mark.parametrize("layout", ["half", "interleaved"])
@pytest.mark.parametrize("normalize", ["separate", "max", "min"])
@pytest.mark.parametrize("grid", GRIDS)
def test_oracle(grid, normalize, layout):
    sides = {"separate": grid, "max": (max(grid),) * 2, "min": (min(grid),) * 2}[normalize]
    periods = [100 ** (4 * k / 8) for k in range(2)]

    def matrix(head, y, x):
        box = [2 * (i + 0.5) / side - 1 for i, side in zip((y, x), sides, strict=True)]
        return rotation_matrix([2 * math.pi * i / period for i in box for period in periods], layout)

    compare(build(num_heads=2, normalize=normalize, layout=layout), grid, matrix)


@pytest.mark.parametrize("options", [{}, {"min_period": 0.5, "max_period": 8.0}, {"normalize_coords": "min"}])
@pytest.mark.parametrize("grid", [(3, 5), (4, 2)])
def test_against_timm(grid, options):
    rope = RotaryEmbeddingDinoV3(16, feat_shape=list(grid), **options)
    ours = {key.removesuffix("_coords"): value for key, value in options.items()}
    q = torch.randn(1, 2, grid[0] * grid[1], 16, generator=torch.Generator().manual_seed(0))
    want = apply_rot_embed_cat(q, rope.get_embed(), half=True)
    got, _ = build(num_heads=2, head_dim=16, **ours)(q, q, vp.Positions.grid(grid))
    assert (got - want).abs().max() < 2e-6 * q.abs().max()  # timm's angles, up to 16, are float32


def test_a_larger_grid_samples_the_same_box():
    small, large = (build().angles(grid64(grid))[0] for grid in ((2, 3), (6, 9)))
    assert (large.unflatten(0, (6, 9))[1::3, 1::3].flatten(0, 1) - small).abs().max() < 1e-12


def test_trap_two_rows_are_one_to_the_fastest_pair():
    turned = build().prepare(grid64((2, 3)))[:, 0].unflatten(1, (2, 3))
    assert (turned[:, 0, :, 0] - turned[:, 1, :, 0]).abs().max() < 1e-12
    turned = build(min_period=2.5, max_period=10.0).prepare(grid64((2, 3)))[:, 0].unflatten(1, (2, 3))
    assert (turned[:, 0, :, 0] - turned[:, 1, :, 0]).abs().max() > 0.5


@pytest.mark.parametrize("normalize", ["separate", "min"])
def test_gradients(normalize):
    assert gradcheck(build(head_dim=4, normalize=normalize), (2, 3))


@pytest.mark.parametrize("normalize", ["separate", "max", "min"])
def test_relative(normalize):
    assert relative_residual(build(normalize=normalize)) < 1e-12


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"min_period": 1.0}, "min_period and max_period come together, got 1.0 and None"),
        ({"min_period": 4.0, "max_period": 1.0}, "periods must be 0 < min_period <= max_period, got 4.0 and 1.0"),
        ({"temperature": 50.0, "min_period": 1.0, "max_period": 4.0}, "temperature=50.0 and min_period, max_period"),
        ({"temperature": None}, "temperature must be a number where min_period and max_period are not given"),
        ({"normalize": "mean"}, "normalize must be one of 'separate', 'max', 'min', got 'mean'"),
        ({"extrapolate": True}, "rope_dinov3: scaling='run_on' needs the grid that was trained on"),
        ({"head_dim": 6}, "head_dim must be a positive multiple of 4"),
    ],
)
def test_errors(options, message):
    with pytest.raises(ValueError, match=message):
        build(**options)
