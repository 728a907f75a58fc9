"""A source whose pictures do not lie in memory: timm's loaders read them batch by batch, in processes of their own.

It takes over where pictures on the device would be more than `data.memory`, where every training crop is cut from the
file (`recipe.crop_scale`), and for data sets by timm's names: `torch/`, `hfds/`, `hfids/`, `wds/`, `tfds/`. timm reads,
decodes, crops and scales; all else that happens to a picture is done by `data/augment`, on the device.

Which pictures a batch has, and which process decodes them, is the business of `reading.py`. An interrupted run goes on
with the pictures it would have seen; that it ends with the same bits is promised for resident pictures only.
"""

import itertools
from collections.abc import Callable, Iterable
from typing import Any

import torch
from timm.data import create_dataset, create_loader, create_transform
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

from visionpos.training.config.schema import Data, Recipe
from visionpos.training.data.augment import Augment, normalize
from visionpos.training.data.datasets import Pictures
from visionpos.training.data.streams import stream
from visionpos.training.data.subsets import shuffled
from visionpos.training.errors import ConfigError, DataError, one_line
from visionpos.training.run.distributed import Distributed
from visionpos.training.run.reading import Batches, in_order, reading, training_batches

__all__ = ["LoaderSource", "class_names", "evaluation_loader", "loader_batches", "open_named"]

EVALUATION_BATCH_SIZE = 256
MEASURED_PICTURES = 1024  # from which mean and std are taken where neither the data nor the weights give them


class LoaderSource:
    """Serve pictures through loader processes, each epoch in a new order.

    Args:
        train: What to train on, by timm's interface: a `transform` is set on it.
        test: What to evaluate on.
        classes: Names of the classes.
        split: What the pictures to evaluate on are called in results.
        data: The data's configuration; `size` must be given.
        recipe: What happens to training pictures.
        seed: Of order and augmentation.
        distributed: Where batches are wanted, and the processes that share the decoding of each.

    Raises:
        ConfigError: no size is given, a batch is larger than the set, or several processes are to share a stream.
    """

    split_record = None

    def __init__(
        self,
        train: Dataset,
        test: Dataset,
        classes: tuple[str, ...],
        split: str,
        data: Data,
        recipe: Recipe,
        seed: int,
        distributed: Distributed,
    ):
        if data.shape is None:
            raise ConfigError("data.size: null given; accepted for pictures that are read as they are used: a size")
        if distributed.size > 1 and isinstance(train, IterableDataset):
            raise ConfigError(
                f"data.name: {data.name!r} given, a stream, which {distributed.size} processes cannot share picture by "
                "picture; accepted under torchrun: folders, torch/... and hfds/...; for streams timm's own train.py"
            )
        self.splits, self.data, self.recipe, self.seed = (split,), data, recipe, seed
        self.distributed, self.device = distributed, distributed.device
        mean, std = data.mean, data.std
        if mean is None or std is None:
            own_mean, own_std = measure(train, data)
            mean, std = mean or own_mean, std or own_std
        self.loader, self.test = training_loader(train, data, recipe), evaluation_loader(test, data)
        self.steps_per_epoch = len(self.loader)
        if not self.steps_per_epoch:
            raise ConfigError(f"recipe.batch_size: {recipe.batch_size} given; accepted: at most {len(train)} pictures")
        self.generator = torch.Generator(self.device)
        self.iterator: Batches | None = None
        self.next_step = -1
        self.metadata = {
            "num_classes": len(classes),
            "image_size": list(data.shape),
            "channels": 3,
            "chance": 1 / len(classes),
            "train_size": len(train),
            "test_size": len(test),
            "mean": list(mean),
            "std": list(std),
            "note": "pictures were read and decoded as they were used; an interrupted run need not end bit by bit",
            "classes": list(classes),
            "resident": False,
        }

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """Return augmented pictures (B, C, H, W) and targets (B, K) of a training step."""
        if step != self.next_step:
            self.iterator = training_batches(self.loader, self.distributed, self.seed, step)
        images, labels = next(self.iterator)
        self.next_step = step + 1
        images, labels = images.to(self.device, non_blocking=True), labels.to(self.device, non_blocking=True)
        self.generator.manual_seed(stream("augmentation", self.seed, step))
        mean, std = self.metadata["mean"], self.metadata["std"]
        augment = Augment(images, labels, self.metadata["num_classes"], mean, std, self.recipe)
        end = self.recipe.mixup_off_epoch
        rows = torch.arange(len(labels), device=self.device)
        return augment(rows, self.generator, mixing=end is None or step < end * self.steps_per_epoch)

    def describe(self, step: int) -> str:
        """Return which examples the batch of a step has, in words."""
        epoch, index = divmod(step, self.steps_per_epoch)
        return f"batch {index} of the loader in epoch {epoch}"

    def evaluation(self, split: str) -> Batches:
        """Yield the test pictures, normalised, and their labels."""
        return loader_batches(in_order(self.test, self.distributed), self.metadata, self.device)


def training_loader(dataset: Dataset, data: Data, recipe: Recipe) -> DataLoader:
    """Return timm's loader of uint8 training pictures in a random order, cropped at random or as for evaluation."""
    plain = {"hflip": 0.0, "color_jitter": None}  # the rest of the augmentation is done in batches, on the device
    scale = {} if recipe.crop_scale is None else {"scale": recipe.crop_scale}
    loader = _loader(dataset, data, recipe.batch_size, is_training=True, **plain, **scale)
    if recipe.crop_scale is None:
        dataset.transform = create_transform(
            (3, *data.shape), use_prefetcher=True, interpolation="bicubic", **centre(data)
        )
    return loader


def evaluation_loader(dataset: Dataset, data: Data) -> DataLoader:
    """Return timm's loader of uint8 pictures in their own order, their centre cut out or squashed."""
    return _loader(dataset, data, EVALUATION_BATCH_SIZE, **centre(data))


def centre(data: Data) -> dict[str, Any]:
    """Return timm's words for how pictures are brought to one size."""
    return {"crop_mode": "squash", "crop_pct": 1.0} if data.crop_pct is None else {"crop_pct": data.crop_pct}


def _loader(dataset: Dataset, data: Data, batch_size: int, **options: Any) -> DataLoader:
    """Return the loader below timm's prefetcher: what it gives is uint8, and not yet on the device."""
    loader = create_loader(
        dataset,
        (3, *data.shape),
        batch_size,
        interpolation="bicubic",
        num_workers=data.workers,
        device=torch.device("cpu"),
        persistent_workers=False,  # those of an epoch are seeded by it
        **options,
    )
    return loader.loader


def loader_batches(
    batches: Iterable[tuple[Tensor, Tensor]],
    metadata: dict[str, Any],
    device: torch.device,
    change: Callable[[Tensor], Tensor] = lambda images: images,
) -> Batches:
    """Yield normalised pictures and labels on a device, the uint8 pictures of each batch changed first."""
    for images, labels in batches:
        images, labels = images.to(device, non_blocking=True), labels.to(device, non_blocking=True)
        yield normalize(change(images), metadata["mean"], metadata["std"]), labels


def measure(dataset: Dataset, data: Data) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return mean and std of the channels, of some pictures drawn at random, or the first ones of a stream."""
    loader = evaluation_loader(dataset, data)
    if not isinstance(dataset, IterableDataset):
        rows = shuffled(len(dataset), 0)[:MEASURED_PICTURES].split(loader.batch_size)
        loader = reading(loader, dataset, [batch.tolist() for batch in rows])
    images = torch.cat([images for images, _ in itertools.islice(loader, MEASURED_PICTURES // EVALUATION_BATCH_SIZE)])
    return Pictures(images, torch.zeros(len(images), dtype=torch.int64), ()).mean_std()


def open_named(data: Data, which: int, batch_size: int = EVALUATION_BATCH_SIZE, seed: int = 0) -> Dataset:
    """Return a data set by timm's name, such as hfds/USER/NAME, wds/NAME or torch/cifar10.

    Args:
        data: Where it is.
        which: 0 for the training pictures, 1 for those to evaluate on.
        batch_size: For sets that are streams.
        seed: Of their order.

    Raises:
        DataError: it is not there, or the library that reads it is not installed.
    """
    options = {"is_training": which == 0, "download": data.download, "batch_size": batch_size, "seed": seed}
    try:
        return create_dataset(data.name, root=data.root, split=data.splits[which], **options)
    except Exception as error:  # whatever the reader, the network or the disk comes up with
        what = f"data.name: {data.name!r}, split {data.splits[which]!r}"
        raise DataError(f"{what}: {type(error).__name__}: {one_line(error)}") from None


def class_names(dataset: Dataset, data: Data) -> tuple[str, ...]:
    """Return the names of the classes of a data set by timm's name; numbers where it has none.

    Raises:
        ConfigError: it does not say how many there are.
    """
    names = getattr(dataset, "classes", None)
    features = getattr(getattr(getattr(dataset, "reader", None), "dataset", None), "features", None) or {}
    names = names or getattr(features.get("label"), "names", None)
    if names is None and data.num_classes is None:
        raise ConfigError(f"data.num_classes: not given, and {data.name!r} does not say it; accepted: a whole number")
    return tuple(map(str, names or range(data.num_classes)))
