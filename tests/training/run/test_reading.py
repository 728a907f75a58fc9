"""Loaders: several processes decode one batch between them, and streams are read from their beginning."""

import itertools
import random
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import numpy as np
import pytest
import torch
import torch.distributed as dist
from PIL import Image
from torch.utils.data import IterableDataset

from tests.training.scripts.test_own_pictures import photo_config
from visionpos.training.config.schema import Data, Recipe
from visionpos.training.data.folders import PictureFiles
from visionpos.training.errors import ConfigError
from visionpos.training.run import loader
from visionpos.training.run.distributed import Distributed
from visionpos.training.run.loader import LoaderSource
from visionpos.training.run.reading import training_batches
from visionpos.training.run.source import open_source

CPU = torch.device("cpu")
STATISTICS = ["--data.mean", "[0.5, 0.4, 0.3]", "--data.std", "[0.2, 0.3, 0.4]"]  # or some are decoded to take them
MIXED = ["--recipe.auto_augment", "trivial", "--recipe.mixup_alpha", "0.4", "--recipe.cutmix_alpha", "1"]
Batches = list[tuple[torch.Tensor, torch.Tensor]]


def member(rank: int, size: int) -> Distributed:
    distributed = object.__new__(Distributed)
    distributed.rank, distributed.size, distributed.device = rank, size, CPU
    return distributed


def counted(patch: pytest.MonkeyPatch) -> list[int]:
    """The rows that are decoded from now on."""
    read, decode = [], PictureFiles.__getitem__
    patch.setattr(PictureFiles, "__getitem__", lambda self, row: (read.append(row), decode(self, row))[1])
    return read


def together(size: int, work: Callable[[Distributed], Batches]) -> tuple[list[list], list[list[int]], list[Batches]]:
    """What each of several processes gives to the others, decodes, and gets out of its work.

    They work one after the other, and twice: first with their own rows in place of the others', to learn what all give.
    """
    given, read, got = [], [], []
    for rank in range(size):
        given.append([])
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(dist, "all_gather", partial(exchange, given[-1]))
            read.append(counted(patch))
            work(member(rank, size))
    for rank in range(size):
        known = zip(*given, strict=True)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(dist, "all_gather", lambda shares, own, known=known: fill(shares, next(known)))
            got.append(work(member(rank, size)))
    return given, read, got


def exchange(given: list[torch.Tensor], shares: list[torch.Tensor], own: torch.Tensor) -> None:
    given.append(own)
    fill(shares, [own] * len(shares))


def fill(shares: list[torch.Tensor], values: Sequence[torch.Tensor]) -> None:
    for share, value in zip(shares, values, strict=True):
        share.copy_(value)


def equal(one: Batches, other: Batches) -> bool:
    return all(map(torch.equal, itertools.chain(*one), itertools.chain(*other)))


@pytest.mark.parametrize("size", [2, 4])
def test_processes_decode_disjoint_shares_of_one_batch(size, tmp_path, monkeypatch):
    config = photo_config(tmp_path, "--data.memory", "0", "--recipe.crop_scale", "[0.3, 1]", *STATISTICS, *MIXED)
    first, last = 1, 4  # the epoch has three steps, of eight pictures

    def train(distributed: Distributed) -> Batches:
        source = open_source(config.data, config.recipe, config.seed, distributed)
        return [source.batch(step) for step in range(first, last + 1)]

    alone = open_source(config.data, config.recipe, config.seed, Distributed(CPU))
    rows = counted(monkeypatch)
    decoded = list(itertools.islice(training_batches(alone.loader, Distributed(CPU), config.seed, first), last))
    assert len(rows) == 8 * last
    given, read, got = together(size, train)
    assert all(equal(batches, train(Distributed(CPU))) for batches in got)
    for tensor, shares in zip(itertools.chain(*decoded), zip(*given, strict=True), strict=True):
        assert all(torch.equal(share, tensor[rank::size]) for rank, share in enumerate(shares))
    for step in range(last):
        shares = [each[8 // size * step : 8 // size * (step + 1)] for each in read]
        assert sorted(itertools.chain(*shares)) == sorted(rows[8 * step : 8 * (step + 1)]), "all of it, each once"
    assert [len(each) for each in read] == [8 * last // size] * size


def test_processes_decode_shares_of_what_they_evaluate_on(tmp_path, monkeypatch):
    """Six pictures in batches of four: neither is whole shares for three processes."""
    monkeypatch.setattr(loader, "EVALUATION_BATCH_SIZE", 4)
    config = photo_config(tmp_path, "--data.memory", "0", *STATISTICS)

    def evaluate(distributed: Distributed) -> Batches:
        return list(open_source(config.data, config.recipe, config.seed, distributed).evaluation("test"))

    alone = evaluate(Distributed(CPU))
    assert [len(labels) for _, labels in alone] == [4, 2]
    _, read, got = together(3, evaluate)
    assert all(equal(batches, alone) for batches in got)
    assert [len(each) for each in read] == [3, 3, 3], "six pictures, and three that fill up"


class Stream(IterableDataset):
    """Pictures whose brightness says where they are in the stream, as timm's streams give them."""

    transform: Callable | None = None
    epoch = 0

    def __len__(self) -> int:
        return 12

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator:
        for index in range(12):
            drawn = random.randrange(8)
            yield (
                self.transform(Image.fromarray(np.full((8, 12, 3), 100 * self.epoch + 8 * index + drawn, np.uint8))),
                index,
            )


def stream_source(distributed: Distributed) -> LoaderSource:
    data = Data("wds/none", size=(8, 12), workers=0, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
    return LoaderSource(
        Stream(), Stream(), tuple("abcdefghijkl"), "test", data, Recipe(epochs=2, batch_size=4), 0, distributed
    )


def test_a_stream_is_read_from_the_beginning_of_its_epoch():
    one, other = stream_source(Distributed(CPU)), stream_source(Distributed(CPU))
    batches = [one.batch(step) for step in range(6)]
    assert [targets.argmax(1).tolist() for _, targets in batches] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]] * 2
    assert [int(images.amin() * 255) // 100 for images, _ in batches] == [0, 0, 0, 1, 1, 1]
    for step in (4, 5, 1):
        assert all(map(torch.equal, other.batch(step), batches[step]))


def test_a_stream_is_not_for_several_processes():
    with pytest.raises(ConfigError, match=r"data.name: 'wds/none' given, a stream, which 2 processes cannot share"):
        stream_source(member(1, 2))
