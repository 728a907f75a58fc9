"""Each property on a case with a known answer, and on one that must fail; baselines of the literature's numbers."""

from __future__ import annotations

import math

import pytest
import torch

import visionpos as vp
from visionpos.analysis import NotDefined, kernel, logit_kernel
from visionpos.analysis import properties as p

SQUARE, GRID = (14, 14), (5, 7)


def of(name, grid=SQUARE, **options):
    positions = kernel.exact_grid(grid)
    return logit_kernel(kernel.exact(kernel.build(name, grid, **options)), positions), positions


def random_table(dim, grid=SQUARE, seed=0):
    count = math.prod(grid)
    return torch.randn(count, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def distances(grid):
    coords = kernel.exact_grid(grid).coords
    return torch.cdist(coords, coords)


BASELINES = [
    ("sincos2d", {}, (-0.83, 0.45, 0.38, 4.2)),
    ("rope_axial", {"temperature": 100.0}, (-0.83, 0.45, 0.40, 4.2)),
    ("rope_axial", {"temperature": 10000.0}, (-0.79, 0.41, 0.52, 4.2)),
    ("rope_dinov3", {}, (-0.84, 0.45, 0.37, 4.2)),
    ("alibi2d", {}, (-1.0, 0.0, 0.0, 9.2)),
]


@pytest.mark.parametrize(("name", "options", "expected"), BASELINES)
def test_decay_baselines(name, options, expected):
    k, positions = of(name, **options)
    radii, profile = p.distance_profile(k, positions)
    found = p.spearman(k, positions), p.rising_share(profile), p.rebound(profile), p.half_radius(radii, profile)
    assert found[:3] == pytest.approx(expected[:3], abs=0.0051)
    assert found[3] == pytest.approx(expected[3], abs=0.051)


def test_decay_of_a_rising_bias_is_the_opposite():
    positions, d = kernel.exact_grid(GRID), distances(GRID)[None]
    _, profile = p.distance_profile(d, positions)
    assert p.spearman(d, positions) == pytest.approx(1)
    assert (p.rising_share(profile), p.rebound(profile)) == (1, 1)
    with pytest.raises(NotDefined):
        p.half_radius(*p.distance_profile(d, positions))
    with pytest.raises(NotDefined, match="same"):
        p.spearman(torch.ones(2, 35, 35), positions)


def test_stationarity():
    for name in ("sincos2d", "rope_axial", "alibi2d"):
        assert p.stationarity(*of(name)) < 1e-13
        assert p.stationarity(*of(name, GRID)) < 1e-13
    for dim, expected in ((32, 0.92), (192, 0.71)):
        table = random_table(dim)
        assert p.stationarity((table @ table.T)[None], kernel.exact_grid(SQUARE)) == pytest.approx(expected, abs=0.01)


def test_linear_map_is_measured_on_held_out_pairs():
    positions = kernel.exact_grid(SQUARE)
    for dim in (32, 192):
        table = vp.sincos_2d(SQUARE, dim, dtype=torch.float64)
        assert p.linear_map_residual(table, positions, (3, 0)) < 1.5e-9
    table = random_table(192)
    assert p.linear_map_residual(table, positions, (3, 0)) == pytest.approx(1.29, abs=0.05)
    assert p.linear_map_residual(table, positions, (3, 0), held_out=False) < 1e-10, "the trap: perfect in-sample"
    with pytest.raises(NotDefined):
        p.linear_map_residual(table, positions, (14, 0))


def test_rotation_map_and_orthogonality():
    positions = kernel.exact_grid(GRID)
    turn = kernel.rotations(kernel.build("rope_axial", GRID), positions)
    assert p.rotation_map_residual(turn, positions) < 1e-13
    assert p.orthogonality_error(turn) < 1e-13
    assert p.orthogonality_error(2 * turn) == pytest.approx(3)
    shuffled = turn[:, torch.randperm(35, generator=torch.Generator().manual_seed(0))]
    assert p.rotation_map_residual(shuffled, positions) > 0.5


def test_the_kernel_of_pope_is_the_mean_cosine_of_its_channels():
    k, positions = of("pope", GRID)
    theta = 100 ** (-torch.arange(32, dtype=torch.float64) / 32)
    delta = positions.coords[:, None] - positions.coords[None]  # (N, N, 2)
    assert (k - (delta[..., None] * theta).cos().mean((-1, -2))).abs().max() < 1e-12
    with pytest.raises(NotDefined, match="no matrix"):
        kernel.rotations(kernel.build("pope", GRID), positions)


def test_boundedness():
    table = vp.sincos_2d(GRID, 32, dtype=torch.float64)
    assert p.sup_norm(table) == pytest.approx(1)
    assert p.norm_drift(table) == pytest.approx(1)
    assert p.norm_drift(table * torch.linspace(1, 3, 35)[:, None]) == pytest.approx(3)
    with pytest.raises(NotDefined):
        p.norm_drift(torch.zeros(3, 4))
    for power in (0.5, 1.0, 2.0):
        profile = p.distance_profile(-(distances(GRID)[None] ** power), kernel.exact_grid(GRID))
        assert p.growth_exponent(*profile) == pytest.approx(power)


def test_isotropy_and_direction():
    for name, expected in (("rope_axial", 0.064), ("alibi2d", 0)):
        assert p.anisotropy(*of(name)) == pytest.approx(expected, abs=5e-4)
    positions = kernel.exact_grid(GRID)
    x = positions.coords[:, 1]
    directed = (x[:, None] - x[None])[None]
    assert p.anisotropy(directed, positions) > 0.5
    assert p.directionality(directed) == pytest.approx(2)
    assert p.directionality(of("alibi2d")[0]) == 0


def test_hidden_pairs_are_left_out():
    positions, k = kernel.exact_grid(GRID), -distances(GRID)[None]
    x = positions.coords[:, 1]
    hidden = k.masked_fill(x[None, :, None] < x[None, None], -math.inf)
    _, profile = p.distance_profile(hidden, positions)
    assert p.spearman(hidden, positions) == pytest.approx(-1)
    assert p.rising_share(profile) == 0
    assert p.stationarity(hidden, positions) < 1e-13
    assert p.directionality(hidden) > 0.3
    assert p.sup_norm(hidden) == pytest.approx(k.abs().max().item())
    with pytest.raises(NotDefined, match="hides"):
        p.numerical_rank(hidden)


def test_translation_equivariance():
    positions = kernel.exact_grid(SQUARE)

    def error(encoding, shift, at=positions, seeds=16):
        moved = vp.Positions(at.coords + torch.tensor(shift, dtype=at.coords.dtype), SQUARE)
        pairs = [[kernel.attention_logits(encoding, where, seed) for where in (at, moved)] for seed in range(seeds)]
        return sum(p.equivariance_error(*pair) for pair in pairs) / seeds

    sinusoid, rope = kernel.build("sincos2d", SQUARE), kernel.build("rope_axial", SQUARE)
    for shift, expected in (((0, 1), 0.15), ((0, 7), 0.46), ((5, 5), 0.60)):  # of one draw; a draw's spread is 0.04
        assert error(sinusoid, shift) == pytest.approx(expected, abs=0.04)
    assert error(rope, (5, 5), seeds=1) < 1e-14
    assert error(rope, (5, 5), vp.Positions.grid(SQUARE), seeds=1) < 1e-6


def test_extrapolation():
    for size, expected in ((24, (0.655, 0.330)), (28, (0.536, 0.241)), (14, (1, 1))):
        assert p.support_ratio(SQUARE, (size, size)) == pytest.approx(expected, abs=5e-4)
    pairs, _ = p.support_ratio((3, 5), (4, 5))
    brute = [abs(a - b) < 3 for a in range(4) for b in range(4)]
    assert pairs == pytest.approx(sum(brute) / 16)
    assert p.output_drift(torch.tensor([-1.0, 1.0]), torch.tensor([3.0])) == pytest.approx(3 / math.sqrt(2))
    d = {n: distances((n, n))[None] for n in (14, 28)}
    for slope, expected in ((0.5, (4.38, 4.79)), (0.0625, (5.26, 6.58)), (0.0, (5.28, 6.66))):
        found = [p.attention_entropy(-slope * d[n]) for n in (14, 28)]
        assert found == pytest.approx(expected, abs=0.0051)


@pytest.mark.parametrize(
    ("name", "options", "bands", "mean"),
    [
        ("rope_axial", {"temperature": 10000.0}, 3, 0.29),
        ("rope_axial", {}, 5, 0.55),
        ("rope_dinov3", {}, 5, 0.52),
        ("rope_mixed", {}, 10, 0.89),
    ],
)
def test_phase_coverage(name, options, bands, mean):
    frequencies = kernel.phase_frequencies(
        kernel.exact(kernel.build(name, SQUARE, **options)), kernel.exact_grid(SQUARE)
    )
    covered = p.phase_coverage(frequencies, SQUARE)
    assert (covered >= 1).double().mean().item() == bands / 16
    assert covered.mean().item() == pytest.approx(mean, abs=0.0051)


def test_phases_of_a_band_that_never_turns_and_of_no_pairs():
    assert p.phase_coverage(torch.zeros(1, 2), GRID).item() == 1
    with pytest.raises(NotDefined, match="pairs"):
        kernel.phase_frequencies(kernel.exact(kernel.build("liere", GRID)), kernel.exact_grid(GRID))


def test_uniqueness_error_and_rank():
    table = torch.eye(6, dtype=torch.float64)[None]
    assert p.uniqueness(table) == pytest.approx(math.sqrt(2))
    table[0, 3] = table[0, 2]
    assert p.uniqueness(table) < 1e-7
    assert p.relative_error(torch.tensor([1.0, 2.1]), torch.tensor([1.0, 2.0])) == pytest.approx(0.05)
    u, v = random_table(3, GRID), random_table(3, GRID, 1)
    assert p.numerical_rank((u @ v.T)[None]) == 3
    assert p.numerical_rank((u @ v.T)[None] * 1e-4) == 0
    assert p.numerical_rank(-0.5 * distances(SQUARE)[None], 0.1) == 129
    l1 = (kernel.exact_grid(GRID).coords[:, None] - kernel.exact_grid(GRID).coords).abs().sum(-1)
    assert p.numerical_rank(l1[None], 1e-9) == sum(GRID) - 1
