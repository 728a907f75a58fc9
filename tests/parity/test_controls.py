"""The position itself and its binary digits: their definitions, and the properties that they lack."""

import pytest
import torch

import visionpos as vp
from visionpos.analysis.measure import measure

GRIDS = [(3, 5), (6, 2), (1, 7), (4,), (2, 3, 4)]


def create(name, dim=6, **options):
    return vp.create_encoding(name, dim=dim, **options)


@pytest.mark.parametrize("grid", GRIDS)
def test_definitions(grid):
    positions, count = vp.Positions.grid(grid), torch.Size(grid).numel()
    assert create("scalar").embed(positions).tolist() == [[float(p)] + [0.0] * 5 for p in range(count)]
    divided = create("scalar", divided=True).embed(positions)
    assert divided.tolist() == [[pytest.approx(p / count, abs=1e-7)] + [0] * 5 for p in range(count)]
    assert create("binary").embed(positions).tolist() == [[float(p >> i & 1) for i in range(6)] for p in range(count)]


def test_kept_tokens_prefix_tokens_and_real_coordinates():
    positions, index = vp.Positions.grid((3, 5), 2), torch.tensor([[14, 3], [0, 7]])
    kept = positions.keep(index)
    assert torch.allclose(create("scalar", divided=True).embed(kept)[..., 0], index / 15)
    assert create("binary").embed(kept)[0].tolist() == [[0, 1, 1, 1, 0, 0], [1, 1, 0, 0, 0, 0]]
    x = torch.randn(2, 4, 6, generator=torch.Generator().manual_seed(0))
    for name in ("scalar", "binary"):
        assert torch.equal(create(name)(x, kept)[:, :2], x[:, :2])
    real = vp.Positions(torch.tensor([[1.0, 2.4], [0.5, 0.2]]), (3, 5))
    assert create("scalar").embed(real)[:, 0].tolist() == pytest.approx([7.4, 2.7])
    assert create("binary").embed(real).tolist() == [[1, 1, 1, 0, 0, 0], [1, 1, 0, 0, 0, 0]]  # of 7 and of 3


def test_more_digits_than_channels():
    assert create("binary", dim=2).embed(vp.Positions.grid((1, 6))).tolist()[4:] == [[0, 0], [1, 0]]
    assert create("binary", dim=2000).embed(vp.Positions.grid((3, 5))).sum() == sum(p.bit_count() for p in range(15))


def measured(name, grid, **options):
    keys = ("sup_norm", "linear_map", "stationarity", "spearman", "rebound")
    return measure(name, grid=grid, test_grid=tuple(2 * side for side in grid), only=keys, **options)


CONTROLS = {"scalar": {}, "divided": {"divided": True}, "binary": {}}


@pytest.mark.parametrize("control", CONTROLS)
def test_what_the_controls_lack_beside_the_sinusoid(control):
    """Bounded, linear in the offset, by the offset alone, decaying: the sinusoid has them all, to the stated number."""
    name = "scalar" if control == "divided" else control
    plane, row = (measured(name, grid, **CONTROLS[control]) for grid in ((14, 14), (1, 32)))
    good_plane, good_row = (measured("sinusoidal", grid) for grid in ((14, 14), (1, 32)))

    assert good_plane["sup_norm"] <= 1 + 1e-6
    assert (plane["sup_norm"] > 1 + 1e-6) == (control == "scalar")  # 783 on 28 x 28, and 63 on a row of 2 x 32
    if control == "scalar":
        assert plane["sup_norm"] == 28 * 28 - 1

    assert good_plane["linear_map"] < 1e-6
    assert plane["linear_map"] > 1e-2

    assert good_row["stationarity"] < 1e-6
    assert row["stationarity"] > 0.8

    assert good_row["spearman"] < -0.99
    assert row["spearman"] > -0.3
    if control == "binary":
        assert row["rebound"] > 0.3
        assert good_row["rebound"] < 0.01


def test_the_first_step_is_worth_less_the_longer_the_row():
    steps = [create("scalar", divided=True).embed(vp.Positions.grid((1, n)))[1, 0].item() for n in (4, 8, 400)]
    assert steps == pytest.approx([1 / 4, 1 / 8, 1 / 400])
