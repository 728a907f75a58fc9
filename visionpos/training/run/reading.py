"""The batches of timm's loaders: which pictures each has, from which seeds its crops are drawn, who decodes what.

A training batch is a function of (seed, step), whatever the number of workers and of processes: the order is that of
resident pictures, and the crop of a picture is drawn for it and for the epoch. Of several processes each decodes its
rows and has the others' sent to it as uint8, so that augmentation, which mixes pictures, sees the batch as one would.

Of a stream (`wds/`, `tfds/`, `hfids/`) no picture can be asked for: one process reads it, in an order that is a
function of the seed, the epoch and the number of workers.
"""

import itertools
import random
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

from visionpos.training.data.streams import stream
from visionpos.training.data.subsets import shuffled
from visionpos.training.run.distributed import Distributed

__all__ = ["Batches", "in_order", "reading", "training_batches"]

Batches = Iterator[tuple[Tensor, Tensor]]


def training_batches(loader: DataLoader, distributed: Distributed, seed: int, first: int) -> Batches:
    """Yield training batches from step `first` on, epoch after epoch: uint8 pictures (B, C, H, W) and labels (B,)."""
    if isinstance(loader.dataset, IterableDataset):
        return stream_batches(loader, seed, first)
    return row_batches(loader, distributed, seed, first)


class Drawn(Dataset):
    """Give pictures by (epoch, row), whose random crop is a function of the seed, the epoch and the row."""

    def __init__(self, dataset: Dataset, seed: int):
        self.dataset, self.seed = dataset, seed

    def __getitem__(self, key: tuple[int, int]):
        """Return a picture and its label."""
        with private_randomness(stream("crop", self.seed, *key)):
            return self.dataset[key[1]]


def row_batches(loader: DataLoader, distributed: Distributed, seed: int, first: int) -> Batches:
    """Yield the batches of a set whose pictures can be asked for; each process decodes its rows alone."""
    size, count = loader.batch_size, len(loader)

    def keys() -> Iterator[list[tuple[int, int]]]:
        """Yield epoch and row of the pictures that this process decodes for a step."""
        order = None
        for step in itertools.count(first):
            epoch, index = divmod(step, count)
            if order is None or index == 0:
                order = shuffled(len(loader.dataset), stream("order", seed, epoch))
            rows = distributed.local_rows(order[index * size : (index + 1) * size])
            yield [(epoch, row) for row in rows.tolist()]

    for batch in reading(loader, Drawn(loader.dataset, seed), keys()):
        yield tuple(map(distributed.all_rows, batch))


def stream_batches(loader: DataLoader, seed: int, first: int) -> Batches:
    """Yield the batches of a stream, of which those that come earlier in the first epoch are read and left out."""
    for step in itertools.count(first - first % len(loader)):
        epoch, index = divmod(step, len(loader))
        if index == 0:
            loader.dataset.set_epoch(epoch)  # timm's streams shuffle by it
            with private_randomness(stream("order", seed, epoch)):
                iterator = iter(loader)  # draws the seeds of the workers
        with private_randomness(stream("crop", seed, step)):  # without workers, crops are drawn here
            batch = next(iterator)
        if step >= first:
            yield batch


def in_order(loader: DataLoader, distributed: Distributed) -> Batches:
    """Yield a loader's batches to evaluate on; of several processes each decodes its rows alone."""
    if distributed.size == 1:
        yield from loader
        return
    batches = torch.arange(len(loader.dataset)).split(loader.batch_size)
    whole = (torch.cat([rows, rows[:1].expand(-len(rows) % distributed.size)]) for rows in batches)  # equal shares
    own = (distributed.local_rows(rows).tolist() for rows in whole)
    for rows, batch in zip(batches, reading(loader, loader.dataset, own), strict=True):
        yield tuple(distributed.all_rows(each)[: len(rows)] for each in batch)


def reading(loader: DataLoader, dataset: Dataset, keys: Iterable[list[Any]]) -> DataLoader:
    """Return a loader like another one, of chosen batches of a data set."""
    return DataLoader(
        dataset,
        batch_sampler=keys,
        num_workers=loader.num_workers,
        collate_fn=loader.collate_fn,
        generator=torch.Generator(),  # of the workers' seeds, or it would take one from everybody's
    )


@contextmanager
def private_randomness(seed: int) -> Iterator[None]:
    """Seed Python's and torch's global generators for the block, and leave them as they were."""
    before = random.getstate()
    try:
        with torch.random.fork_rng(devices=[]):
            random.seed(seed)
            torch.default_generator.manual_seed(seed)
            yield
    finally:
        random.setstate(before)
