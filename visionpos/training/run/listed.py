"""A run's pictures in class folders: which files they are, what they take in memory, and the record of their split."""

import json
from pathlib import Path

import torch

from visionpos.training.config.schema import Data, Recipe
from visionpos.training.data.folders import Listed, has_class_folders, list_folder
from visionpos.training.data.readers import CIFAR, decode
from visionpos.training.data.subsets import holdout_rows, subset_rows
from visionpos.training.errors import ConfigError

__all__ = ["SPLIT_SEED", "is_resident", "keep_split", "listed_pictures", "resident_bytes", "split_record"]

SPLIT_SEED = 0  # of the subset and the validation pictures: alike in all runs, whatever their seed


def is_resident(data: Data, recipe: Recipe, listed: dict[str, Listed] | None) -> bool:
    """Return whether all pictures lie on the device: they fit `data.memory`, and none is cut out of its file.

    Raises:
        ConfigError: pictures that no loader reads, those of an archive, are to be cut out of files.
    """
    if data.is_named:
        return False
    if listed is None:
        if recipe.crop_scale is not None:
            raise ConfigError(
                f"recipe.crop_scale: {list(recipe.crop_scale)} given for {data.name!r}; accepted for class folders and "
                "timm's names (torch/, hfds/, wds/ ...)"
            )
        return True
    return recipe.crop_scale is None and resident_bytes(data, recipe, listed) <= data.memory * 2**30


def resident_bytes(data: Data, recipe: Recipe, listed: dict[str, Listed]) -> int:
    """Return the bytes of a folder's pictures on the device: uint8, the training ones padded and with mirror images."""
    height, width = data.shape or decode("", listed["train"].files[0]).size[::-1]
    padded = (height + 2 * recipe.crop_padding) * (width + 2 * recipe.crop_padding) * (1 + recipe.flip)
    return 3 * (len(listed["train"].files) * padded + len(listed["test"].files) * height * width)


def listed_pictures(data: Data) -> dict[str, Listed] | None:
    """Return a folder's files for `train` and `test`, as `training_pictures` does; None for other forms of data."""
    path = Path(data.name)
    if data.is_named or data.name in CIFAR or not has_class_folders(path):
        return None
    found = list_folder(path, data.test_fraction, data.split_seed)
    train = found["train"]
    if data.validation:
        rest, held = holdout_rows(torch.tensor(train.labels), data.validation, SPLIT_SEED)
        found = {"train": train.take(rest.tolist()), "test": train.take(held.tolist())}
    if data.per_class:
        rows = subset_rows(torch.tensor(found["train"].labels), data.per_class, SPLIT_SEED)
        found["train"] = found["train"].take(rows.tolist())
    return found


def split_record(listed: dict[str, Listed]) -> dict[str, list[str]]:
    """Return which pictures of a flat folder are for training and for testing, as CLASS/FILE."""
    return {
        split: [f"{each.classes[label]}/{file.name}" for file, label in zip(each.files, each.labels, strict=True)]
        for split, each in listed.items()
    }


def keep_split(run: Path, record: dict[str, list[str]] | None) -> None:
    """Write into a run directory which pictures are for training and for testing.

    Raises:
        ConfigError: it says otherwise there; files have come or gone since the run began.
    """
    file = run / "split.json"
    if record is None:
        return
    if not file.exists():
        file.write_text(json.dumps(record, indent=1) + "\n")
    elif json.loads(file.read_text()) != record:
        raise ConfigError(f"data.name: pictures have come or gone since the run began, see {file}")
