"""Intervals: closed forms, the cases without spread, and coverage on simulated studies whose truth is known."""

from statistics import NormalDist

import numpy as np
import pytest

from visionpos.training.reports.statistics import (
    accuracy_interval,
    difference_interval,
    margin,
    student_quantile,
)

STUDIES = 2000
PHI = NormalDist().cdf


def answers(rng, seeds, pictures, level, by_seed, shared, by_picture=0.0):
    """Right or wrong (studies, seeds, pictures): a probit model with an effect of each seed and of each picture.

    `shared` (studies, 1, pictures) is what a picture does to every model; its spread and `by_picture` add up.
    """
    of_seed = rng.normal(0, by_seed, (len(shared), seeds, 1)).astype(np.float32)
    of_picture = shared + by_picture * rng.standard_normal(shared.shape, dtype=np.float32)
    noise = rng.standard_normal((len(shared), seeds, pictures), dtype=np.float32)
    return (level + of_seed + of_picture + noise > 0).astype(np.float32)


def truth(level, *spreads):
    """The probability of a right answer, over all seeds and pictures."""
    return PHI(level / (1 + sum(spread**2 for spread in spreads)) ** 0.5)


@pytest.mark.parametrize("seeds", [3, 5])
@pytest.mark.parametrize(
    ("by_seed", "by_picture"),
    [(0, 1), (0.02, 1), (0.05, 2), (0.3, 0.5), (0.1, 0), (0, 0), (0.3, 0.1)],
    ids=["pictures", "mostly pictures", "hard pictures", "mostly seeds", "seeds", "neither", "seeds that differ"],
)
def test_95_percent_intervals_cover_the_truth_in_93_to_97_percent_of_studies(seeds, by_seed, by_picture):
    rng = np.random.default_rng([seeds, int(100 * by_seed), int(100 * by_picture)])
    pictures = 150
    shared = by_picture * rng.standard_normal((STUDIES, 1, pictures), dtype=np.float32)
    ours = answers(rng, seeds, pictures, 0.7, by_seed, shared)
    baseline = answers(rng, seeds, pictures, 0.5, by_seed, shared, by_picture=0.4)
    accuracy, other = truth(0.7, by_seed, by_picture), truth(0.5, by_seed, by_picture, 0.4)
    for values, expected in ((ours, accuracy), (ours - baseline, accuracy - other)):
        covered = np.abs(values.mean((1, 2)) - expected) <= margin(values)
        assert 0.93 <= covered.mean() <= 0.97


@pytest.mark.parametrize("seeds", [2, 3, 5, 10])
def test_intervals_of_seeds_alone_are_student_s_and_of_pictures_alone_normal(seeds):
    rng = np.random.default_rng(seeds)
    column = rng.random((seeds, 1)).repeat(40, 1)
    t = student_quantile(seeds - 1, 0.975)
    assert margin(column) == pytest.approx(t * column[:, 0].std(ddof=1) / seeds**0.5)
    row = rng.random((1, 40)).repeat(seeds, 0)
    assert margin(row) == pytest.approx(1.959964 * row[0].std(ddof=1) / 40**0.5)


def test_both_levels_count():
    rng = np.random.default_rng(0)
    seeds, pictures = rng.normal(0, 1, (4, 1)), rng.normal(0, 3, (1, 50))
    both = margin(seeds + pictures)
    assert both > margin(seeds + 0 * pictures)
    assert both > margin(0 * seeds + pictures)


@pytest.mark.parametrize("seeds", [2, 3, 5])
@pytest.mark.parametrize("right", [0, 43, 100])
def test_equal_seeds_are_no_certainty(seeds, right):
    values = np.zeros((seeds, 100))
    values[:, :right] = 1
    found = accuracy_interval(values)
    assert found.mean == right / 100
    assert 0 <= found.low <= found.mean <= found.high <= 1
    assert 0.03 < found.high - found.low < 0.25
    if right == 43:  # two seeds that agree are as good as one: the error of 43 of 100 (Agresti and Coull)
        assert (found.low, found.high) == pytest.approx((0.337, 0.528), abs=0.005)


@pytest.mark.parametrize("shape", [(2, 100), (3, 2048)])
def test_encodings_that_agree_on_every_picture_may_still_differ(shape):
    same = np.random.default_rng(0).integers(0, 2, shape)
    found = difference_interval(same, same)
    assert found.mean == 0
    assert -4 / shape[1] < found.low < -2 / shape[1]
    assert found.high == pytest.approx(-found.low)
    assert not found.excludes_zero


def test_seeds_of_equal_accuracy_on_other_pictures_are_no_certainty():
    values = np.zeros((2, 100))
    values[0, :43] = values[1, -43:] = 1
    found = accuracy_interval(values)
    assert found.mean == 0.43
    assert found.high - found.low > 0.03


def test_one_seed_has_no_interval():
    found = accuracy_interval(np.array([[1, 0, 1, 1]]))
    assert (found.mean, found.low, found.high, found.excludes_zero) == (0.75, None, None, False)
    assert difference_interval(np.ones((1, 9)), np.zeros((1, 9))).low is None


def test_pairing_removes_what_pictures_do_to_both():
    rng = np.random.default_rng(0)
    easy = rng.random((1, 400))
    a = (easy + rng.normal(0, 0.03, (5, 400)) > 0.3).astype(float)
    b = (easy + rng.normal(0, 0.03, (5, 400)) > 0.4).astype(float)
    paired, alone = difference_interval(a, b), accuracy_interval(a)
    assert 0.05 < paired.low < paired.mean < paired.high
    assert paired.excludes_zero
    assert difference_interval(b, a).high == pytest.approx(-paired.low)
    assert alone.high - alone.low > 1.3 * (paired.high - paired.low)


def test_a_higher_level_is_wider():
    values = np.random.default_rng(0).random((3, 50)) < 0.7
    usual, strict = accuracy_interval(values), accuracy_interval(values, 0.99)
    assert strict.low < usual.low < usual.high < strict.high


def test_student_s_quantiles_are_those_of_the_tables():
    known = {1: 12.7062, 2: 4.3027, 4: 2.7764, 9: 2.2622, 29: 2.0452}
    assert {freedom: round(student_quantile(freedom, 0.975), 4) for freedom in known} == known
    assert student_quantile(4, 0.9975) == pytest.approx(5.5976, abs=1e-4)


@pytest.mark.parametrize("shape", [(5,), (0, 5), (5, 0), (2, 3, 4)])
def test_other_shapes_are_refused(shape):
    with pytest.raises(ValueError, match=r"values: an array of shape .* accepted: \(seeds, pictures\)"):
        accuracy_interval(np.zeros(shape))
    with pytest.raises(ValueError, match=r"values: an array of shape .* accepted: \(seeds, pictures\)"):
        difference_interval(np.zeros(shape), np.zeros(shape))


def test_two_encodings_must_have_the_same_seeds_and_pictures():
    with pytest.raises(ValueError, match=r"baseline: shape \(2, 4\) given; accepted: that of `right`, \(2, 5\)"):
        difference_interval(np.zeros((2, 5)), np.zeros((2, 4)))
