"""Intervals: closed forms, and coverage on data whose truth is known."""

import numpy as np
import pytest

from visionpos.training.reports.statistics import (
    MAX_FREEDOM,
    bootstrap_means,
    degrees_of_freedom,
    seed_interval,
    student_quantile,
    two_level_bootstrap,
    variance_components,
)


def crossed(rng, seeds, pictures, by_seed, by_picture, rest):
    """Values (seeds, pictures) around 0 with these standard deviations."""
    return (
        rng.normal(0, by_seed, (seeds, 1))
        + rng.normal(0, by_picture, (1, pictures))
        + rng.normal(0, rest, (seeds, pictures))
    )


def coverage(draw, interval, times):
    """How often the interval of a draw holds the truth, 0."""
    found = [interval(draw(), index) for index in range(times)]
    return np.mean([each.low <= 0 <= each.high for each in found])


@pytest.mark.parametrize("shape", [(5, 40), (2, 30), (1, 50), (6, 1)])
def test_the_means_scatter_as_the_closed_form_says(shape):
    values = np.random.default_rng(0).random(shape) + np.arange(shape[0])[:, None] / 4
    means = bootstrap_means(values, 20_000, seed=1)
    assert means.var() == pytest.approx(sum(variance_components(values)), rel=0.05)
    assert means.mean() == pytest.approx(values.mean(), abs=4 * means.std() / 20_000**0.5)


def test_the_closed_form_is_the_textbook_s_at_either_level_alone():
    column = np.array([[0.1], [0.4], [0.7], [0.2]])
    assert sum(variance_components(column)) == pytest.approx(column.var(ddof=1) / 4)
    row = np.array([[1.0, 0.0, 1.0, 1.0, 0.0]])
    assert sum(variance_components(row)) == pytest.approx(0.6 * 0.4 / 5)


def test_degrees_of_freedom_are_those_of_what_decides():
    rng = np.random.default_rng(0)
    assert degrees_of_freedom(rng.random((4, 1))) == pytest.approx(3)
    assert degrees_of_freedom(rng.random((1, 50))) == pytest.approx(49)
    assert degrees_of_freedom(crossed(rng, 5, 400, 1, 0.1, 0.1)) == pytest.approx(4, rel=0.02)
    assert degrees_of_freedom(crossed(rng, 5, 400, 0, 1, 0)) == pytest.approx(399, rel=0.02)
    assert degrees_of_freedom(np.ones((3, 4))) == MAX_FREEDOM


def test_an_interval_of_seeds_that_decide_is_about_student_s():
    values = np.array([0.1, 0.4, 0.7, 0.2, 0.3])
    found, exact = two_level_bootstrap(values[:, None].repeat(50, 1)), seed_interval(values)
    assert found.high - found.low == pytest.approx(exact.high - exact.low, rel=0.1)
    assert found.mean == pytest.approx(exact.mean)


def test_the_same_values_give_the_same_interval_and_constants_none_at_all():
    values = np.random.default_rng(0).random((3, 50)) < 0.7
    assert two_level_bootstrap(values) == two_level_bootstrap(values)
    assert two_level_bootstrap(values) != two_level_bootstrap(values, seed=1)
    same = two_level_bootstrap(np.full((3, 50), 0.25))
    assert (same.mean, same.low, same.high) == pytest.approx((0.25, 0.25, 0.25))


def test_pairing_removes_what_pictures_do_to_both():
    rng = np.random.default_rng(0)
    a = crossed(rng, 5, 400, 0, 1, 0.1)
    b = a - 0.05 + rng.normal(0, 0.1, a.shape)
    paired = two_level_bootstrap(a - b)
    assert 0 < paired.low < paired.mean < paired.high
    alone = two_level_bootstrap(a)
    assert alone.high - alone.low > 5 * (paired.high - paired.low)


def test_student_s_quantiles_are_those_of_the_tables():
    known = {1: 12.7062, 2: 4.3027, 4: 2.7764, 9: 2.2622, 29: 2.0452}
    assert {freedom: round(student_quantile(freedom), 4) for freedom in known} == known


def test_seeds_alone_have_student_s_interval():
    found = seed_interval([0.1, 0.2, 0.3])
    half = 4.3027 * 0.1 / 3**0.5
    assert (found.mean, found.low, found.high) == pytest.approx((0.2, 0.2 - half, 0.2 + half), abs=1e-5)
    one = seed_interval([0.1])
    assert (one.mean, one.low, one.high) == (0.1, None, None)


@pytest.mark.parametrize("shape", [(5,), (0, 5), (5, 0), (2, 3, 4)])
def test_other_shapes_are_refused(shape):
    with pytest.raises(ValueError, match=r"values: an array of shape .* accepted: \(seeds, pictures\)"):
        two_level_bootstrap(np.zeros(shape))


def test_coverage_of_five_seeds_and_100_pictures():
    rng = np.random.default_rng(0)
    share = coverage(
        lambda: crossed(rng, 5, 100, 0.1, 1, 1), lambda values, seed: two_level_bootstrap(values, 300, seed), 300
    )
    assert 0.91 <= share <= 0.99


@pytest.mark.slow
@pytest.mark.parametrize(
    ("seeds", "spread", "low", "high"),
    [
        (3, (0.02, 1, 1), 0.93, 0.99),  # pictures matter most, as they do for real runs
        (5, (0.02, 1, 1), 0.93, 0.99),
        (5, (0.1, 1, 1), 0.92, 0.98),  # both matter
        (10, (0.1, 1, 1), 0.92, 0.98),
        (5, (0, 0, 1), 0.98, 1.0),  # only what is peculiar to seed and picture: too wide, as said
        (2, (1, 0, 0.01), 0.89, 0.96),  # only seeds matter
        (3, (1, 0, 0.01), 0.90, 0.97),
        (5, (1, 0, 0.01), 0.92, 0.98),
    ],
)
def test_coverage_is_as_the_module_says(seeds, spread, low, high):
    rng = np.random.default_rng(seeds)
    share = coverage(
        lambda: crossed(rng, seeds, 200, *spread),
        lambda values, seed: two_level_bootstrap(values, 500, seed),
        1500,
    )
    assert low <= share <= high


def test_coverage_of_student_s_interval():
    rng = np.random.default_rng(0)
    share = coverage(lambda: rng.normal(0, 1, 3), lambda values, _: seed_interval(values), 1000)
    assert 0.935 <= share <= 0.965
