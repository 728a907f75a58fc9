"""Pictures and labels as uint8 tensors, from whatever form the data set has on disk.

Four forms are known, told apart by what is there: torchvision's CIFAR files, Hugging Face parquet files, class folders
(`train/<class>/*.jpg` beside `test/` or `val/`), and a tar archive of class folders, which is read by stream and never
unpacked. Whatever is wrong with the data ends in a `DataError` of one line. Position tasks (`tasks.py`) need no data.
"""

import math
import os
import socket
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torchvision.datasets.utils import download_url

from visionpos.training.data import decoded
from visionpos.training.data.folders import Listed
from visionpos.training.data.readers import CIFAR, SPLITS, Samples, decode, read
from visionpos.training.errors import DataError

__all__ = ["Pictures", "Shape", "load_listed", "load_pictures"]

_NUM_CLASSES = {"cifar10": 10, "cifar100": 100}
_DOWNLOAD_TIMEOUT = 30  # seconds without an answer from a download host


class Shape(NamedTuple):
    """Say how pictures are brought to one size: to (H, W), squashed, or as the centre of which `crop_pct` is kept."""

    size: tuple[int, int] | None
    crop_pct: float | None

    @property
    def text(self) -> str:
        """Return it as a part of a file's name: empty, `-32x48` or `-32x48-crop0.9`."""
        size = "" if self.size is None else f"-{self.size[0]}x{self.size[1]}"
        return size if self.crop_pct is None else f"{size}-crop{self.crop_pct}"

    def apply(self, image: Image.Image) -> Image.Image:
        """Return a picture at this size, bicubic; Pillow's is always antialiased."""
        if self.size is None:
            return image
        height, width = self.size
        if self.crop_pct is None:
            return image.resize((width, height), Image.Resampling.BICUBIC)
        scale = self.crop_pct * min(image.width / width, image.height / height)  # pixels of the source in one of ours
        left, top = (image.width - scale * width) / 2, (image.height - scale * height) / 2
        box = left, top, left + scale * width, top + scale * height
        return image.resize((width, height), Image.Resampling.BICUBIC, box)


@dataclass(frozen=True, eq=False)
class Pictures:
    """Hold a split of a data set in memory.

    Attributes:
        images: (N, C, H, W) uint8.
        labels: (N,) int64, indices into `classes`.
        classes: the names of the classes.
    """

    images: torch.Tensor
    labels: torch.Tensor
    classes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: torch.device | str) -> "Pictures":
        """Return the same pictures on another device."""
        return replace(self, images=self.images.to(device), labels=self.labels.to(device))

    def take(self, index: torch.Tensor) -> "Pictures":
        """Return the pictures of some rising indices."""
        index = index.to(self.labels.device)
        return replace(self, images=self.images[index], labels=self.labels[index])

    def mean_std(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Return mean and standard deviation of each of the C channels, in [0, 1], from exact sums over all pixels."""
        means, stds = [], []
        for channel in self.images.unbind(1):
            counts = torch.bincount(channel.flatten(), minlength=256).tolist()  # how many pixels have each value
            pixels = sum(counts)
            total = sum(value * count for value, count in enumerate(counts))
            squares = sum(value**2 * count for value, count in enumerate(counts))
            means.append(total / (255 * pixels))
            stds.append(math.sqrt(pixels * squares - total**2) / (255 * pixels))
        return tuple(means), tuple(stds)


def load_pictures(
    name: str | Path,
    split: str,
    root: str | Path = "data",
    size: tuple[int, int] | None = None,
    download: bool = False,
    crop_pct: float | None = None,
) -> Pictures:
    """Load one split of a data set as RGB, in sorted order, its labels numbered by sorted class name.

    Args:
        name: "cifar10" or "cifar100", found under `root` in any of the four forms (the lossless files first, then
            `root/cifar10`, `root/cifar10.tar.xz` and the like, then `root` itself); or the path of a folder or archive.
        split: "train" or "test".
        root: where the named data sets lie.
        size: (H, W) to resize to, bicubic with antialiasing; without it all pictures must have one size.
        download: fetch a missing CIFAR archive into `root` with torchvision.
        crop_pct: keep the aspect ratio: cut the centre out of a picture in which `size` is this share of a side.

    Raises:
        DataError: If the data are missing, damaged, of mixed sizes, or their splits have different classes.
    """
    if split not in SPLITS:
        raise DataError(f"unknown split {split!r}, expected one of {', '.join(SPLITS)}")
    if size is not None and (len(size) != 2 or min(size) < 1):
        raise DataError(f"size must be (height, width), at least 1 pixel each, got {size}")
    name, root, shape = str(name), Path(root), Shape(size, crop_pct)
    found, problem = _find(name, root, split, shape), ""
    if found is None and download and name in CIFAR:
        problem = _download(name, root)
        found = _find(name, root, split, shape)
    if found is None:
        raise DataError(_missing(name, root, problem))
    return found


def load_listed(listed: Listed, size: tuple[int, int] | None = None, crop_pct: float | None = None) -> Pictures:
    """Return the pictures of files in memory, at a size as in `load_pictures`."""
    each = zip(listed.files, listed.labels, strict=True)
    samples = ((f"{file} (picture {n})", label, decode(str(file), file)) for n, (file, label) in enumerate(each))
    return Pictures(*_stack(samples, Shape(size, crop_pct)), listed.classes)


def _stack(samples: Samples, shape: Shape) -> tuple[torch.Tensor, torch.Tensor]:
    """Return images (N, C, H, W) uint8 and labels (N,) int64."""
    images, labels = [], []
    for where, label, image in samples:
        pixels = np.asarray(shape.apply(image))
        if images and pixels.shape != images[0].shape:
            sizes = " but the first one ".join(f"{one.shape[0]} x {one.shape[1]}" for one in (pixels, images[0]))
            raise DataError(f"picture {where} is {sizes} (height x width); data.size: [height, width] resizes all")
        images.append(pixels)
        labels.append(label)
    if not images:
        raise DataError("the data hold no pictures")
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous(), torch.tensor(labels)


def _find(name: str, root: Path, split: str, shape: Shape) -> Pictures | None:
    """Return the pictures of the first place that has any; those of an archive are decoded once and kept beside it."""
    for path in _places(name, root):
        kept = decoded.load(path, split, shape.text) if path.is_file() else None
        if kept is None and (found := read(path, split)) is not None:
            kept = *_stack(found[1], shape), found[0]
            if path.is_file():
                decoded.save(path, split, shape.text, kept)
        if kept is not None:
            pictures = Pictures(*kept)
            if len(pictures.classes) != _NUM_CLASSES.get(name, len(pictures.classes)):
                raise DataError(f"{path} holds {len(pictures.classes)} classes, but {name} has {_NUM_CLASSES[name]}")
            return pictures
    return None


def _places(name: str, root: Path) -> list[Path]:
    """Return where the data may lie, in order of preference."""
    kinds = [CIFAR[name]] if name in CIFAR else list(CIFAR.values())
    folders = [root, root / name] if name in CIFAR else [Path(name)]
    original = [folder / part for folder in folders for kind in kinds for part in (kind.base_folder, kind.filename)]
    archives = [root / (name + suffix) for suffix in (".tar.xz", ".tar.gz", ".tgz", ".tar") if name in CIFAR]
    return original + folders[1:] + archives + folders[:1]


def _missing(name: str, root: Path, problem: str) -> str:
    """Return what was tried, and what to do about it; `problem` is what came of a download."""
    advice = "; the position tasks (locate, direction, leftmost, jigsaw, count) need no download"
    if name not in CIFAR:
        return (
            f"no pictures at {name!r}: it is neither {' nor '.join(CIFAR)}, nor a folder with train/<class>/ and test/ "
            f"or val/, nor one with *train*.parquet and *test*.parquet, nor a .tar, .tar.gz or .tar.xz{advice}"
        )
    kind, retry = CIFAR[name], "" if problem else ", or set data.download: true"
    return (
        f"{problem}{name} not found: looked in {root} for {kind.base_folder}/, {kind.filename}, {name}/, {name}.tar.xz "
        f"(or .gz, .tar), train/ and test/, and *.parquet; put {kind.filename} (md5 {kind.tgz_md5}, from {kind.url}) "
        f"into {root}{retry}{advice}"
    )


def _download(name: str, root: Path) -> str:
    """Fetch a CIFAR archive with torchvision, whole or not at all; return what went wrong, if anything."""
    kind, before = CIFAR[name], socket.getdefaulttimeout()
    socket.setdefaulttimeout(_DOWNLOAD_TIMEOUT)
    try:
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=root) as folder:
            download_url(kind.url, folder, kind.filename, kind.tgz_md5)
            os.replace(Path(folder) / kind.filename, root / kind.filename)
    except Exception as error:  # whatever the network, the host or the disk comes up with
        return f"download of {kind.url} failed ({error}); "
    finally:
        socket.setdefaulttimeout(before)
    return ""
