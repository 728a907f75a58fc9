"""Pictures in folders, one folder a class: which files there are, and which of them are for testing.

    photos/<class>/*.jpg                    a flat folder: a share of each class is split off for testing
    photos/train/<class>/*.jpg, photos/test/<class>/*.jpg, or val/ in place of test/

Nothing is decoded here. `Listed` is what both ways to read pictures start from: all of them into memory (`datasets.py`)
or batch by batch through loader processes (`run/loader.py`).
"""

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from torch.utils.data import Dataset

from visionpos.training.data.readers import SPLITS, decode
from visionpos.training.errors import DataError

__all__ = ["Listed", "PictureFiles", "is_flat", "split_files"]

TEST_FRACTION = 0.2  # of each class of a flat folder, where none is given
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


class Listed(NamedTuple):
    """Hold the pictures of a split as files.

    Attributes:
        classes: the names of the classes, sorted.
        files: the files, sorted by class and name.
        labels: of each file the index of its class.
    """

    classes: tuple[str, ...]
    files: list[Path]
    labels: list[int]

    def take(self, rows: Sequence[int]) -> "Listed":
        """Return the files of some rows."""
        return self._replace(files=[self.files[row] for row in rows], labels=[self.labels[row] for row in rows])


def is_flat(path: Path) -> bool:
    """Return whether a folder holds class folders with pictures, and no train/, test/ or val/."""
    if not path.is_dir() or any((path / name).is_dir() for names in SPLITS.values() for name in names):
        return False
    return any(_is_picture(file) for folder in _class_folders(path) for file in folder.iterdir())


def has_class_folders(path: Path) -> bool:
    """Return whether a folder holds class folders, flat or under train/ and test/ or val/, and no parquet files."""
    tables = any(path.glob("*.parquet")) or any((path / name).is_dir() for name in ("data", "plain_text"))
    split = all(any((path / name).is_dir() for name in names) for names in SPLITS.values())
    return path.is_dir() and not tables and (split or is_flat(path))


def list_folder(path: Path, test_fraction: float | None, seed: int) -> dict[str, Listed]:
    """Return the files of both splits of a folder for which `has_class_folders` holds.

    Args:
        path: the folder.
        test_fraction: of a flat folder, the share of each class for testing; 0.2 where None.
        seed: of that split.

    Raises:
        DataError: the splits have different classes, or a class is too small to be split.
    """
    if is_flat(path):
        return split_files(_listed(path), TEST_FRACTION if test_fraction is None else test_fraction, seed)
    if test_fraction is not None:
        raise DataError(f"{path} has train and test folders: there is nothing to split off, leave test_fraction out")
    found = {}
    for split, names in SPLITS.items():
        found[split] = _listed(next(path / name for name in names if (path / name).is_dir()))
    if found["train"].classes != found["test"].classes:
        differ = sorted(set(found["train"].classes) ^ set(found["test"].classes))
        raise DataError(f"{path}: train and test have different classes, only one has {', '.join(differ[:5])}")
    return found


def split_files(listed: Listed, test_fraction: float, seed: int) -> dict[str, Listed]:
    """Return files in two parts: of each class, a share for testing, at least one file, and the rest for training.

    Which files those are is decided by a hash of the seed and of class and name, not by where the folder lies.

    Raises:
        DataError: a class has fewer than two files.
    """

    def rank(row: int) -> bytes:
        """Return a file's place in the order from which the first are for testing."""
        name = f"{seed}/{listed.classes[listed.labels[row]]}/{listed.files[row].name}"
        return hashlib.blake2b(name.encode(), digest_size=8).digest()

    test: set[int] = set()
    for label, name in enumerate(listed.classes):
        rows = sorted((row for row, each in enumerate(listed.labels) if each == label), key=rank)
        if len(rows) < 2:
            raise DataError(f"class {name!r} has {len(rows)} pictures: at least 2 are needed to split off a test set")
        test |= set(rows[: min(max(round(test_fraction * len(rows)), 1), len(rows) - 1)])
    rows = range(len(listed.files))
    return {"train": listed.take([r for r in rows if r not in test]), "test": listed.take(sorted(test))}


class PictureFiles(Dataset):
    """Give the pictures of files as timm's loaders ask for them: transformed, with their labels.

    Args:
        listed: the files.
    """

    def __init__(self, listed: Listed):
        self.listed = listed
        self.transform: Callable | None = None  # timm's create_loader sets it

    def __len__(self) -> int:
        return len(self.listed.files)

    def __getitem__(self, index: int):
        """Return a picture and its label."""
        file = self.listed.files[index]
        image = decode(str(file), file)
        return image if self.transform is None else self.transform(image), self.listed.labels[index]


def _class_folders(path: Path) -> list[Path]:
    """Return the folders in a folder, sorted, without hidden ones."""
    return sorted(folder for folder in path.iterdir() if folder.is_dir() and not folder.name.startswith("."))


def _is_picture(file: Path) -> bool:
    """Return whether a file has the name of a picture."""
    return file.suffix.lower() in SUFFIXES and not file.name.startswith(".")


def _listed(path: Path) -> Listed:
    """Return the pictures in the class folders of a folder, sorted."""
    by_class = {folder.name: sorted(filter(_is_picture, folder.rglob("*"))) for folder in _class_folders(path)}
    by_class = {name: files for name, files in by_class.items() if files}
    files = [file for found in by_class.values() for file in found]
    return Listed(tuple(by_class), files, [label for label, found in enumerate(by_class.values()) for _ in found])
