"""Sources of batches: pictures resident on the device, or a position task made on the fly.

The training batch of a step is a function of (seed, step) and of nothing else: not of the model, its initialisation or
its encoding, nor of when anything is logged. So the position in the data is one number.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from visionpos.training.config.schema import Data, Recipe
from visionpos.training.data.augment import Augment, normalize
from visionpos.training.data.datasets import Pictures, load_listed, load_pictures
from visionpos.training.data.folders import PictureFiles, is_flat, list_folder
from visionpos.training.data.readers import CIFAR
from visionpos.training.data.streams import stream
from visionpos.training.data.subsets import holdout, shuffled, subset
from visionpos.training.data.tasks import PositionTask
from visionpos.training.errors import ConfigError
from visionpos.training.run.distributed import Distributed
from visionpos.training.run.listed import SPLIT_SEED, is_resident, keep_split, listed_pictures, split_record
from visionpos.training.run.loader import LoaderSource, class_names, evaluation_loader, loader_batches, open_named

__all__ = [
    "PictureSource",
    "Source",
    "TaskSource",
    "evaluation_pictures",
    "open_evaluation",
    "open_source",
    "open_task",
    "picture_batches",
    "picture_split",
    "task_batches",
    "task_splits",
]

Batches = Iterator[tuple[Tensor, Tensor]]

EVALUATION_BATCH_SIZE = 512
EVALUATION_TASK_SIZE = 2048  # pictures of a position task, the same ones in every run
COPIES_NOTE = (
    "class folders and archives of {} may hold re-encoded copies (the project's cifar10.tar.xz is JPEG, quality 75): "
    "accuracies are not comparable with published ones to better than about a point"
)


@runtime_checkable
class Source(Protocol):
    """Say what training needs to know of its data."""

    splits: tuple[str, ...]  # what accuracy is measured on; the first one is the headline
    steps_per_epoch: int | None  # None if there are no epochs
    metadata: dict[str, Any]  # for result.json, and all that evaluation must know later
    split_record: dict[str, list[str]] | None  # which pictures of a flat folder are for what

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """Return pictures (B, C, H, W) float32 of a step, and labels (B,) or smoothed and mixed targets (B, K)."""

    def describe(self, step: int) -> str:
        """Return which examples the batch of a step has, in words."""

    def evaluation(self, split: str) -> Batches:
        """Yield the pictures and labels of a split, the same at every call."""


def open_source(data: Data, recipe: Recipe, seed: int, distributed: Distributed) -> Source:
    """Return the source that a configuration describes, with its pictures on the device of this process."""
    if data.is_task:
        return TaskSource(open_task(data), recipe.batch_size, seed, distributed.device)
    listed = None if data.is_named else listed_pictures(data)
    if is_resident(data, recipe, listed):
        source = _resident(data, recipe, seed, distributed.device)
    elif data.is_named:
        train, test = (open_named(data, which, recipe.batch_size, seed) for which in (0, 1))
        source = LoaderSource(train, test, class_names(train, data), "test", data, recipe, seed, distributed)
    else:
        files = map(PictureFiles, (listed["train"], listed["test"]))
        classes, split = listed["train"].classes, picture_split(data)
        source = LoaderSource(*files, classes, split, data, recipe, seed, distributed)
    if listed and is_flat(Path(data.name)):
        source.split_record = split_record(listed)
    return source


def _resident(data: Data, recipe: Recipe, seed: int, device: torch.device) -> "PictureSource":
    """Return the source of pictures that all lie on the device."""
    train, test = training_pictures(data)
    if train.classes != test.classes:
        raise ConfigError(f"data.name: the training and test pictures of {data.name!r} have different classes")
    if recipe.batch_size > len(train):
        raise ConfigError(
            f"recipe.batch_size: {recipe.batch_size} given; accepted: at most the {len(train)} pictures there are"
        )
    return PictureSource(train, test, picture_split(data), recipe, seed, device, data.mean, data.std, copies_note(data))


class PictureSource:
    """Serve uint8 pictures on the device; every epoch a new order, every step new crops and flips."""

    split_record = None

    def __init__(
        self,
        train: Pictures,
        test: Pictures,
        split: str,
        recipe: Recipe,
        seed: int,
        device: torch.device,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        note: str = "",
    ):
        mean, std = (given or own for given, own in zip((mean, std), train.mean_std(), strict=True))
        self.splits = (split,)
        self.test, self.recipe, self.seed, self.device = test.to(device), recipe, seed, device
        self.steps_per_epoch = len(train) // recipe.batch_size
        on_device = train.to(device)
        try:
            self.augment = Augment(on_device.images, on_device.labels, len(train.classes), mean, std, recipe)
        except ValueError as error:
            raise ConfigError(f"recipe: {error}") from None
        self.generator = torch.Generator(device)
        self.order: tuple[int, Tensor] = (-1, torch.empty(0))
        self.metadata = {
            "num_classes": len(train.classes),
            "image_size": list(train.images.shape[2:]),
            "channels": train.images.shape[1],
            "chance": 1 / len(train.classes),
            "train_size": len(train),
            "test_size": len(test),
            "mean": list(mean),
            "std": list(std),
            "note": note,
            "classes": list(train.classes),
            "resident": True,
        }

    def rows(self, step: int) -> Tensor:
        """Return (B,) indices of the training pictures of a step."""
        epoch, index = divmod(step, self.steps_per_epoch)
        if self.order[0] != epoch:
            order = shuffled(self.metadata["train_size"], stream("order", self.seed, epoch))
            self.order = epoch, order.to(self.device)
        return self.order[1][index * self.recipe.batch_size : (index + 1) * self.recipe.batch_size]

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """Return augmented pictures (B, C, H, W) and targets (B, K) of a training step."""
        self.generator.manual_seed(stream("augmentation", self.seed, step))
        end = self.recipe.mixup_off_epoch
        return self.augment(self.rows(step), self.generator, mixing=end is None or step < end * self.steps_per_epoch)

    def describe(self, step: int) -> str:
        """Return which examples the batch of a step has, in words."""
        rows = self.rows(step).tolist()
        return f"training pictures {', '.join(map(str, rows[:8]))}{' ...' if len(rows) > 8 else ''}"

    def evaluation(self, split: str) -> Batches:
        """Yield the test pictures, normalised, and their labels."""
        return picture_batches(self.test, self.metadata["mean"], self.metadata["std"])


class TaskSource:
    """Serve a position task; every step has new pictures."""

    steps_per_epoch = None
    split_record = None

    def __init__(self, task: PositionTask, batch_size: int, seed: int, device: torch.device):
        self.task, self.batch_size, self.seed = task, batch_size, seed
        self.generator = torch.Generator(device)
        self.splits = task_splits(task)
        self.metadata = {
            "num_classes": task.num_classes,
            "image_size": list(task.image_size),
            "channels": 3,
            "chance": task.chance,
            "train_size": None,
            "test_size": EVALUATION_TASK_SIZE,
            "note": "pictures are made on the fly: no training picture is seen twice",
        }

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """Return new pictures (B, 3, H, W) of a training step, and labels (B,)."""
        self.generator.manual_seed(stream("task", self.seed, step))
        return self.task.sample(self.batch_size, self.generator)

    def describe(self, step: int) -> str:
        """Return which examples the batch of a step has, in words."""
        return f"pictures of the task made for seed {self.seed}, step {step}"

    def evaluation(self, split: str) -> Batches:
        """Yield the pictures and labels of a split, the same at every call."""
        return task_batches(self.task, split, self.generator)


def copies_note(data: Data) -> str:
    """Return what accuracies on CIFAR must say unless its original files are there; nothing for other pictures."""
    if data.name not in CIFAR:
        return ""
    kind, root = CIFAR[data.name], Path(data.root)
    originals = (folder / name for folder in (root, root / data.name) for name in (kind.base_folder, kind.filename))
    return "" if any(path.exists() for path in originals) else COPIES_NOTE.format(data.name)


def open_task(data: Data) -> PositionTask:
    """Return the position task that a configuration describes; ConfigError if there is none such."""
    try:
        return PositionTask(data.name, tuple(data.grid), data.cell, data.holdout, data.noise)
    except ValueError as error:
        raise ConfigError(f"data: {error}") from None


def task_splits(task: PositionTask) -> tuple[str, ...]:
    """Return `inside`, where the task is trained, and with a hold-out `outside` and `whole` too."""
    return ("inside",) if task.holdout == "none" else ("inside", "outside", "whole")


def task_batches(task: PositionTask, split: str, generator: torch.Generator) -> Batches:
    """Yield the evaluation pictures of one split of a task, made on the generator's device."""
    generator.manual_seed(stream("evaluation", split))
    for _ in range(EVALUATION_TASK_SIZE // EVALUATION_BATCH_SIZE):
        yield task.sample(EVALUATION_BATCH_SIZE, generator, split="train" if split == "inside" else split)


def training_pictures(data: Data) -> tuple[Pictures, Pictures]:
    """Return what to train on, and what to evaluate on: the test pictures, or training pictures held out."""
    train = _load(data, "train")
    train, other = holdout(train, data.validation, SPLIT_SEED) if data.validation else (train, _load(data, "test"))
    return (subset(train, data.per_class, SPLIT_SEED) if data.per_class else train), other


def evaluation_pictures(data: Data) -> Pictures:
    """Return what to evaluate on, as above, without the rest."""
    return holdout(_load(data, "train"), data.validation, SPLIT_SEED)[1] if data.validation else _load(data, "test")


Batching = Callable[[Callable[[Tensor], Tensor]], Batches]  # a change of uint8 pictures to batches of them, changed


def open_evaluation(data: Data, metadata: dict[str, Any], device: torch.device, run: Path) -> Batching:
    """Return what makes the batches of a run's evaluation, each with the uint8 pictures changed first.

    Raises:
        ConfigError: a flat folder is split otherwise than when the run began.
    """
    listed = None if data.is_named else listed_pictures(data)
    if listed and is_flat(Path(data.name)):
        keep_split(run, split_record(listed))
    if metadata.get("resident", True):
        pictures = evaluation_pictures(data).to(device)
        return partial(picture_batches, pictures, metadata["mean"], metadata["std"])
    test = PictureFiles(listed["test"]) if listed else open_named(data, 1)
    return partial(loader_batches, evaluation_loader(test, data), metadata, device)


def picture_split(data: Data) -> str:
    """Return what the pictures to evaluate on are called in results."""
    return "validation" if data.validation else "test"


def picture_batches(
    pictures: Pictures, mean: list[float], std: list[float], change: Callable[[Tensor], Tensor] = lambda images: images
) -> Batches:
    """Yield normalised pictures and labels in order, the uint8 pictures of each batch changed first.

    The batches are as large as each other where that can be: a compiled model is then compiled for one size alone.
    """
    batches = math.ceil(len(pictures) / EVALUATION_BATCH_SIZE)
    for rows in torch.arange(len(pictures), device=pictures.labels.device).split(math.ceil(len(pictures) / batches)):
        yield normalize(change(pictures.images[rows]), mean, std), pictures.labels[rows]


def _load(data: Data, split: str) -> Pictures:
    """Return a split of the pictures, at the size that is asked for."""
    path = Path(data.name)
    if data.name not in CIFAR and is_flat(path):
        return load_listed(list_folder(path, data.test_fraction, data.split_seed)[split], data.shape, data.crop_pct)
    if data.test_fraction is not None:
        raise ConfigError(
            f"data.test_fraction: {data.test_fraction} given, but {data.name!r} has a test set of its own"
        )
    return load_pictures(data.name, split, data.root, data.shape, data.download, data.crop_pct)
