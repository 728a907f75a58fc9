import itertools
import math

import pytest
import torch
from timm.layers.pos_embed_sincos import build_sincos2d_pos_embed

import visionpos as vp

F64 = torch.float64
# 2 x 3 grid, dim 8: channels [sin x | cos x | sin y | cos y], frequencies 1 and 0.01
MAE = [
    [0, 0, 1, 1, 0, 0, 1, 1],
    [0.84147098, 0.00999983, 0.54030231, 0.99995, 0, 0, 1, 1],
    [0.90929743, 0.01999867, -0.41614684, 0.9998, 0, 0, 1, 1],
    [0, 0, 1, 1, 0.84147098, 0.00999983, 0.54030231, 0.99995],
    [0.84147098, 0.00999983, 0.54030231, 0.99995, 0.84147098, 0.00999983, 0.54030231, 0.99995],
    [0.90929743, 0.01999867, -0.41614684, 0.9998, 0.84147098, 0.00999983, 0.54030231, 0.99995],
]
PRESETS = ["mae", "mocov3", "big_vision", "timm"]


def wave(p, count, temperature, inclusive):
    omega = [temperature ** -(i / (max(count - 1, 1) if inclusive else count)) for i in range(count)]
    return [math.sin(p * w) for w in omega], [math.cos(p * w) for w in omega]


def oracle(feat_shape, dim, temperature, preset):
    """Written from the page's description of each dialect, token by token."""
    height, width = feat_shape
    rows = []
    for token in range(height * width):
        y, x = divmod(token, width)
        if preset == "mocov3":  # its table runs column by column
            x, y = divmod(token, height)
        sy, cy = wave(y, dim // 4, temperature, preset == "big_vision")
        sx, cx = wave(x, dim // 4, temperature, preset == "big_vision")
        rows.append(sy + sx + cy + cx if preset == "timm" else sx + cx + sy + cy)
    return torch.tensor(rows, dtype=F64)


def test_golden_mae():
    assert (vp.sincos_2d((2, 3), 8, dtype=F64) - torch.tensor(MAE, dtype=F64)).abs().max() < 1e-8
    assert (vp.sincos_2d((2, 3), 8) - torch.tensor(MAE)).abs().max() < 2e-6


def test_golden_dialects():
    row = vp.sincos_2d((2, 3), 8, preset="big_vision", dtype=F64)[1]
    assert row.tolist() == pytest.approx([0.84147098, 0.0001, 0.54030231, 1, 0, 0, 1, 1], abs=1e-8)
    row = vp.sincos_2d((2, 3), 8, preset="timm", dtype=F64)[1]
    assert row.tolist() == pytest.approx([0, 0, 0.84147098, 0.00999983, 1, 1, 0.54030231, 0.99995], abs=1e-8)
    column = vp.sincos_2d((1, 2), 16, preset="big_vision", dtype=F64)[1, :4].asin()
    assert column.tolist() == pytest.approx([1, 0.04641589, 0.00215443, 0.0001], abs=1e-8)


def test_mocov3_is_mae_with_halves_swapped_on_squares_and_column_major_elsewhere():
    square = vp.sincos_2d((4, 4), 8, dtype=F64)
    assert torch.equal(vp.sincos_2d((4, 4), 8, preset="mocov3", dtype=F64), square.roll(4, dims=1))
    by_columns = torch.tensor(MAE, dtype=F64).view(2, 3, 8).transpose(0, 1).reshape(6, 8)
    assert (vp.sincos_2d((2, 3), 8, preset="mocov3", dtype=F64) - by_columns).abs().max() < 1e-8


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("temperature", [100.0, 10000.0])
@pytest.mark.parametrize("feat_shape", [(2, 3), (5, 4), (3, 3), (1, 6)])
def test_oracle(feat_shape, temperature, preset):
    want = oracle(feat_shape, 24, temperature, preset)
    assert (vp.sincos_2d(feat_shape, 24, temperature, preset, dtype=F64) - want).abs().max() < 1e-10
    encoding = vp.create_encoding("sincos2d", dim=24, temperature=temperature, preset=preset)
    assert (encoding.embed(vp.Positions.grid(feat_shape)) - want).abs().max() < 2e-6


def test_timm_preset_against_timm():
    want = build_sincos2d_pos_embed([3, 5], 16, temperature=10000.0)
    assert (vp.sincos_2d((3, 5), 16, preset="timm") - want).abs().max() < 2e-6


def test_prefix_rows_are_zero():
    x = torch.zeros(1, 8, 8)
    out = vp.create_encoding("sincos2d", dim=8)(x, vp.Positions.grid((2, 3), num_prefix_tokens=2))
    assert (out[0, :2] == 0).all()
    assert (out[0, 2:] - torch.tensor(MAE)).abs().max() < 2e-6


@pytest.mark.unhooked
def test_errors():
    with pytest.raises(ValueError, match="preset must be one of mae, mocov3, big_vision, timm, got 'moco'"):
        vp.sincos_2d((2, 3), 8, preset="moco")
    with pytest.raises(ValueError, match="dim must be a positive multiple of 4"):
        vp.sincos_2d((2, 3), 6)


@pytest.mark.parametrize("preset", ["mae", "big_vision", "timm"])
@pytest.mark.parametrize("grid", [(5,), (2, 3, 4)])
def test_any_number_of_axes(grid, preset):
    encoding, axes = vp.create_encoding("sincos2d", dim=24, temperature=50.0, preset=preset), len(grid)
    positions = vp.Positions.grid(grid, 1).promote(F64)
    real = vp.Positions(torch.rand(2, 6, axes, generator=torch.Generator().manual_seed(0), dtype=F64) * 3, grid)
    for each in (positions, real):
        for row, place in zip(encoding.embed(each).view(-1, 24), each.coords.view(-1, axes).tolist(), strict=True):
            waves = [wave(p, 24 // (2 * axes), 50.0, preset == "big_vision") for p in place]
            if preset == "timm":
                parts = [s for s, _ in waves] + [c for _, c in waves]
            else:
                parts = [part for pair in reversed(waves) for part in pair]
            want = list(itertools.chain.from_iterable(parts))
            assert (row - torch.tensor(want, dtype=F64)).abs().max() < 1e-10


def test_axes_that_cannot_be():
    with pytest.raises(ValueError, match="^preset 'mocov3' of sincos2d needs 2 coordinates of a token, got 3$"):
        vp.create_encoding("sincos2d", dim=24, preset="mocov3").embed(vp.Positions.grid((2, 3, 4)))
    with pytest.raises(ValueError, match="^dim must be a positive multiple of 6 "):
        vp.create_encoding("sincos2d", dim=16).embed(vp.Positions.grid((2, 3, 4)))
