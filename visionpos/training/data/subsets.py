"""Random orders of a data set, and parts balanced over its classes: to train on, or held out for tuning."""

import torch

from visionpos.training.data.datasets import Pictures
from visionpos.training.errors import DataError

__all__ = ["holdout", "holdout_rows", "shuffled", "subset", "subset_rows"]


def shuffled(count: int, seed: int) -> torch.Tensor:
    """Return the rows 0 to count - 1, (count,) int64, in a random order."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))


def subset(pictures: Pictures, per_class: int, seed: int) -> Pictures:
    """Return a class-balanced random subset, in the old order; for one seed, a smaller one lies within a larger one.

    Raises:
        DataError: If a class has fewer than `per_class` pictures.
    """
    return pictures.take(subset_rows(pictures.labels, per_class, seed))


def subset_rows(labels: torch.Tensor, per_class: int, seed: int) -> torch.Tensor:
    """Return the rows of the subset of pictures with these labels (N,), as `subset` takes them."""
    by_class = _shuffled_by_class(labels, seed)
    smallest = min(map(len, by_class))
    if not 1 <= per_class <= smallest:
        raise DataError(f"per_class must be in 1 .. {smallest}, the size of the smallest class, got {per_class}")
    return torch.cat([members[:per_class] for members in by_class]).sort().values


def holdout(pictures: Pictures, count: int, seed: int) -> tuple[Pictures, Pictures]:
    """Split off `count` pictures for tuning, from each class in proportion to its size, both in the old order.

    Returns:
        The rest and the held-out pictures.

    Raises:
        DataError: If there would be nothing left in one of the two parts.
    """
    rest, held = holdout_rows(pictures.labels, count, seed)
    return pictures.take(rest), pictures.take(held)


def holdout_rows(labels: torch.Tensor, count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the rows of both parts of pictures with these labels (N,), as `holdout` takes them."""
    total = len(labels)
    if not 0 < count < total:
        raise DataError(f"cannot hold out {count} of {total} pictures")
    by_class = torch.cat(_shuffled_by_class(labels, seed))
    held = torch.zeros(total, dtype=torch.bool)
    held[torch.arange(count) * total // count] = True  # evenly spaced, so every class gives its share
    return by_class[~held].sort().values, by_class[held].sort().values


def _shuffled_by_class(labels: torch.Tensor, seed: int) -> list[torch.Tensor]:
    """Return the indices of each class's pictures in a random order."""
    labels = labels.cpu()
    order = shuffled(len(labels), seed)
    return [order[labels[order] == label] for label in range(int(labels.max()) + 1)]
