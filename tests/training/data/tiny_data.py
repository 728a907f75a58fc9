"""Tiny data sets in every form, for the tests of loading pictures."""

import io
import json
import pickle
import random
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets import CIFAR10
from torchvision.datasets.utils import calculate_md5

from visionpos.training.data.datasets import load_pictures
from visionpos.training.errors import DataError

CLASSES = ("ant", "bee", "cow")
COUNTS = {"train": 4, "test": 2}  # a class
HEIGHT, WIDTH = 5, 7


def png(pixels, kind="PNG"):
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, kind)
    return stream.getvalue()


def tiny(seed=0):
    """{split: (pixels (N, H, W, 3), labels (N,))}, classes one after the other."""
    rng = np.random.default_rng(seed)
    labels = {split: np.repeat(range(len(CLASSES)), count) for split, count in COUNTS.items()}
    return {split: (rng.integers(0, 256, (len(y), HEIGHT, WIDTH, 3), np.uint8), y) for split, y in labels.items()}


def files(test="test"):
    """{name below the data set's folder: content} of the tiny data as class folders."""
    result = {}
    for split, (pixels, labels) in tiny().items():
        for n, (image, label) in enumerate(zip(pixels, labels, strict=True)):
            folder = test if split == "test" else split
            result[f"{folder}/{CLASSES[label]}/{n:04d}.png"] = png(image)
    return result


def write_folder(path, content):
    for name, data in content.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(data)
    return path


def write_tar(path, content, top="", **extra):
    """An archive in random member order; `extra` are fields of one more, empty, member."""
    path.parent.mkdir(parents=True, exist_ok=True)
    kind = {".xz": "xz", ".gz": "gz", ".tgz": "gz", ".tar": ""}[path.suffix]
    with tarfile.open(path, f"w:{kind}") as archive:
        for name in random.Random(0).sample(sorted(content), len(content)):
            member = tarfile.TarInfo(top + name)
            member.size = len(content[name])
            archive.addfile(member, io.BytesIO(content[name]))
        if extra:
            member = tarfile.TarInfo()
            for field, value in extra.items():
                setattr(member, field, value)
            archive.addfile(member)
    return path


def write_parquet(path, names=CLASSES, image="img", label="label", splits=("train", "test"), shift=0, picture=None):
    """Two parquet files a split; `shift` is added to the labels, `picture` stands in for each picture."""
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    path.mkdir(parents=True, exist_ok=True)
    for split in splits:
        pixels, labels = tiny()[split]
        pictures = [{"bytes": png(each), "path": f"{n}.png"} for n, each in enumerate(pixels)]
        pictures = [picture] * len(labels) if picture else pictures
        table = pyarrow.table({image: pictures, label: [int(each) + shift for each in labels], "unused": labels})
        if names:
            info = {"info": {"features": {label: {"names": list(names), "_type": "ClassLabel"}}}}
            table = table.replace_schema_metadata({"huggingface": json.dumps(info)})
        half = len(labels) // 2
        parquet.write_table(table[:half], path / f"{split}-00000-of-00002.parquet")
        parquet.write_table(table[half:], path / f"{split}-00001-of-00002.parquet")
    return path


def assert_tiny(pictures, split, classes=CLASSES):
    pixels, labels = tiny()[split]
    assert pictures.classes == classes
    assert pictures.images.dtype == torch.uint8
    assert pictures.images.is_contiguous()
    assert torch.equal(pictures.images, torch.from_numpy(pixels).permute(0, 3, 1, 2))
    assert pictures.labels.dtype == torch.int64
    assert pictures.labels.tolist() == labels.tolist()
    assert len(pictures) == len(labels)


def error_of(*args, **kwargs):
    """The line a call ends in."""
    with pytest.raises(DataError) as caught:
        load_pictures(*args, **kwargs)
    line = str(caught.value)
    assert line.isprintable()
    assert line
    return line


def write_cifar(root, kind, monkeypatch):
    """Two pictures a file in torchvision's own form, and the checksums torchvision asks for; returns the classes."""
    key, number = ("labels", 10) if kind is CIFAR10 else ("fine_labels", 100)
    classes = [f"class {n:02d}" for n in range(number)]
    folder = root / kind.base_folder
    folder.mkdir(parents=True)

    def write(file, content):
        (folder / file).write_bytes(pickle.dumps(content))
        return calculate_md5(folder / file)

    for split in ("train", "test"):
        listed = []
        for n, (file, _) in enumerate(getattr(kind, f"{split}_list")):
            pixels = np.random.default_rng(n).integers(0, 256, (2, 3072), np.uint8)
            listed.append([file, write(file, {"data": pixels, key: [n, 9]})])
        monkeypatch.setattr(kind, f"{split}_list", listed)
    meta = kind.meta | {"md5": write(kind.meta["filename"], {kind.meta["key"]: classes})}
    monkeypatch.setattr(kind, "meta", meta)
    return tuple(classes)


def pack_cifar(root, kind, path, monkeypatch):
    """The archive of what `write_cifar` left under `root`, in the folder `path`."""
    path.mkdir()
    with tarfile.open(path / kind.filename, "w:gz") as archive:
        archive.add(root / kind.base_folder, kind.base_folder)
    monkeypatch.setattr(kind, "tgz_md5", calculate_md5(path / kind.filename))
    return path
