"""The sinusoid is pinned to the article's code, not to its printed table, whose rows break sin^2 + cos^2 = 1."""

import math

import pytest
import torch

import visionpos as vp


def oracle(p, dim, temperature, layout):
    pairs = [
        (math.sin(p * temperature ** (-2 * i / dim)), math.cos(p * temperature ** (-2 * i / dim)))
        for i in range(dim // 2)
    ]
    if layout == "interleaved":
        return [value for pair in pairs for value in pair]
    return [sin for sin, _ in pairs] + [cos for _, cos in pairs]


def test_the_articles_code():
    table = vp.sincos_1d(torch.arange(4, dtype=torch.float64), 4, temperature=100.0)
    want = [
        [0, 1, 0, 1],
        [0.84147098, 0.54030231, 0.09983342, 0.99500417],
        [0.90929743, -0.41614684, 0.19866933, 0.98006658],
        [0.14112001, -0.98999250, 0.29552021, 0.95533649],
    ]
    assert (table - torch.tensor(want, dtype=torch.float64)).abs().max() < 1e-8
    assert (table[:, 0::2] ** 2 + table[:, 1::2] ** 2 - 1).abs().max() < 1e-15
    printed = torch.tensor([0.0156, 0.9999, 0.0313, 0.9995], dtype=torch.float64)  # the article's row 1
    assert (table[1] - printed).abs().max() > 0.4


def test_golden_row():
    row = vp.sincos_1d(torch.tensor([3.0], dtype=torch.float64), 8)[0]
    want = [
        0.1411200081,
        -0.9899924966,
        0.2955202067,
        0.9553364891,
        0.0299955002,
        0.9995500337,
        0.0029999955,
        0.9999955,
    ]
    assert row.tolist() == pytest.approx(want, abs=1e-10)


@pytest.mark.parametrize("layout", ["interleaved", "split"])
@pytest.mark.parametrize("temperature", [100.0, 10000.0])
@pytest.mark.parametrize("dim", [2, 6, 64])
def test_oracle(dim, temperature, layout):
    positions = torch.tensor([0.0, 1.0, 2.5, 17.0, 262143.0], dtype=torch.float64)
    want = torch.tensor([oracle(p, dim, temperature, layout) for p in positions.tolist()], dtype=torch.float64)
    assert (vp.sincos_1d(positions, dim, temperature, layout) - want).abs().max() < 1e-10
    assert (vp.sincos_1d(positions.float(), dim, temperature, layout) - want).abs().max() < 2e-6
    assert vp.sincos_1d(positions.float(), dim).dtype == torch.float32
    assert vp.sincos_1d(torch.arange(3), dim).dtype == torch.float32


@pytest.mark.parametrize("grid", [(2, 3), (5, 1), (4, 7)])
def test_layer_takes_the_row_major_index(grid):
    table = vp.create_encoding("sinusoidal", dim=12).embed(vp.Positions.grid(grid))
    assert (table - vp.sincos_1d(torch.arange(grid[0] * grid[1]), 12)).abs().max() < 1e-6


def test_every_row_is_a_rotation_of_every_other():
    table = vp.sincos_1d(torch.arange(20, dtype=torch.float64), 8)
    angle = 5 * torch.tensor([10000 ** (-2 * i / 8) for i in range(4)], dtype=torch.float64)
    sin, cos = table[:15, 0::2], table[:15, 1::2]
    moved = torch.stack([sin * angle.cos() + cos * angle.sin(), cos * angle.cos() - sin * angle.sin()], -1).flatten(-2)
    assert (moved - table[5:]).abs().max() < 1e-14


@pytest.mark.unhooked
def test_unknown_layout():
    with pytest.raises(ValueError, match="layout must be 'interleaved' or 'split', got 'halves'"):
        vp.sincos_1d(torch.arange(3), 4, layout="halves")
