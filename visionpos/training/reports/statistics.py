"""Intervals: how sure a mean over seeds and test pictures is, by the two-level bootstrap.

Seeds and pictures are two crossed samples: every run, of whatever encoding and seed, is judged on the same pictures.
Each replicate therefore draws seeds and, independently, pictures, both with replacement, and averages over the drawn
rows and columns. A paired difference is the same thing done with the differences of two encodings: what a picture or a
seed does to both drops out. Source: Owen, "The pigeonhole bootstrap" (arXiv 0711.4018): what varies from seed to seed,
and from picture to picture, is counted right; what is peculiar to one seed on one picture is counted three times, so
that the intervals err on the wide side.

Of S seeds, S - 1 are drawn, which makes the variance between seeds unbiased (Rao and Wu 1988, doi
10.1080/01621459.1988.10478591); drawing S would lose the share 1 / S of it. A percentile knows nothing of how badly
few seeds tell their own variance: where seeds are all that matters, 3 of them would cover 71 % instead of 95 %. So the
interval is stretched about the mean by Student's quantile over the normal one, with Satterthwaite's degrees of freedom:
S - 1 where seeds decide, and next to no stretch where pictures do. Measured with normal values, the intervals cover
92 % with 2 or 3 seeds and 95 % with 5 where seeds alone matter, and 95 to 98 % where pictures do.
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

__all__ = ["Interval", "degrees_of_freedom", "seed_interval", "two_level_bootstrap", "variance_components"]

NUM_REPLICATES = 2000
CONFIDENCE_LEVEL = 0.95
MAX_FREEDOM = 10_000  # degrees of freedom with which Student's t is normal


@dataclass(frozen=True)
class Interval:
    """Hold a mean with the ends of its 95 % interval, which is absent where there is nothing to draw from."""

    mean: float
    low: float | None = None
    high: float | None = None

    def within(self, lowest: float, highest: float) -> "Interval":
        """Return the same interval without what is impossible."""
        return self if self.low is None else replace(self, low=max(self.low, lowest), high=min(self.high, highest))


def two_level_bootstrap(values: NDArray, replicates: int = NUM_REPLICATES, seed: int = 0) -> Interval:
    """Return the mean of values (seeds, pictures) with its 95 % interval: percentiles, stretched for few seeds.

    A single seed is part of every replicate: then the interval says nothing about other seeds.

    Args:
        values: (S, N) one number for each seed and test picture: right or wrong, or the difference of two encodings.
        replicates: Number of bootstrap samples.
        seed: Of the draws; the same seed draws the same pictures for every encoding.
    """
    values = np.asarray(values, dtype=np.float64)
    if values.ndim != 2 or 0 in values.shape:
        raise ValueError(f"values: an array of shape {values.shape} given; accepted: (seeds, pictures), neither empty")
    means = bootstrap_means(values, replicates, seed)
    low, high = np.quantile(means, [(1 - CONFIDENCE_LEVEL) / 2, (1 + CONFIDENCE_LEVEL) / 2])
    mean, stretch = values.mean(), student_quantile(degrees_of_freedom(values)) / student_quantile(MAX_FREEDOM)
    return Interval(float(mean), float(mean + stretch * (low - mean)), float(mean + stretch * (high - mean)))


def bootstrap_means(values: NDArray, replicates: int, seed: int) -> NDArray:
    """Return (replicates,) means of values (S, N) over drawn seeds and pictures."""
    seeds, pictures = values.shape
    draws = max(seeds - 1, 1)
    shares = np.random.default_rng((seed, 0)).multinomial(draws, np.full(seeds, 1 / seeds), replicates) / draws
    counts = _picture_counts(pictures, replicates, seed)
    sums = np.concatenate([part @ values.T for part in np.array_split(counts, math.ceil(counts.size / 2**20))])
    return (shares * sums).sum(1) / pictures


@functools.lru_cache(maxsize=2)
def _picture_counts(pictures: int, replicates: int, seed: int) -> NDArray:
    """Return (replicates, pictures): how often each picture is drawn."""
    drawn = np.random.default_rng((seed, 1)).integers(pictures, size=(replicates, pictures))
    drawn += pictures * np.arange(replicates)[:, None]
    return np.bincount(drawn.ravel(), minlength=drawn.size).reshape(drawn.shape).astype(np.int16)


def seed_interval(values: Sequence[float] | NDArray) -> Interval:
    """Return the mean of values (S,), one for each seed, with Student's 95 % interval, absent for one seed."""
    values = np.asarray(values, dtype=np.float64)
    if len(values) == 1:
        return Interval(float(values[0]))
    mean, half = values.mean(), student_quantile(len(values) - 1) * values.std(ddof=1) / math.sqrt(len(values))
    return Interval(float(mean), float(mean - half), float(mean + half))


@functools.lru_cache(maxsize=16)
def student_quantile(freedom: float, share: float = (1 + CONFIDENCE_LEVEL) / 2) -> float:
    """Return the value below which Student's t falls with probability `share`.

    With t = sqrt(f) tan(a), f being the degrees of freedom, the angle a has the density cos^(f-1).
    """
    angle = np.linspace(-math.pi / 2, math.pi / 2, 200_001)
    density = np.cos(angle) ** (freedom - 1)
    below = np.concatenate([[0], np.cumsum((density[1:] + density[:-1]) / 2)])
    return math.sqrt(freedom) * math.tan(np.interp(share, below / below[-1], angle))


def degrees_of_freedom(values: NDArray) -> float:
    """Return Satterthwaite's degrees of freedom of the mean of values (S, N), at most MAX_FREEDOM.

    They are (sum of the variances)^2 / sum of (variance^2 / its own degrees of freedom).

    Source: Satterthwaite 1946, doi 10.2307/3002019.
    """
    seeds, pictures = (max(side - 1, 1) for side in values.shape)
    parts = variance_components(values)
    spread = sum(part**2 / freedom for part, freedom in zip(parts, (seeds, pictures, seeds * pictures), strict=True))
    return min(sum(parts) ** 2 / spread, MAX_FREEDOM) if spread else MAX_FREEDOM


def variance_components(values: NDArray) -> tuple[float, float, float]:
    """Return the variances of seeds, of pictures, and of what is peculiar to both.

    Together they are the variance of the bootstrap's means.

    That is the limit of many replicates. With row means r and column means c of values (S, N) and the mean m over all:
    mean((r - m)^2) / (S - 1), mean((c - m)^2) / N, mean((v - r - c + m)^2) / ((S - 1) N); with one seed, 1 for S - 1.
    """
    draws, pictures = max(values.shape[0] - 1, 1), values.shape[1]
    rows, columns, mean = values.mean(1, keepdims=True), values.mean(0, keepdims=True), values.mean()
    between_seeds = float(np.square(rows - mean).mean() / draws)
    between_pictures = float(np.square(columns - mean).mean() / pictures)
    return between_seeds, between_pictures, float(np.square(values - rows - columns + mean).mean() / (draws * pictures))
