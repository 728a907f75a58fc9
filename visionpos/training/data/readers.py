"""The forms a data set has on disk, and one reader for each: classes, and the pictures of a split in sorted order.

Files are data to judge: archives of pictures are read by stream and never unpacked, sizes are checked before anything
is decoded, and whatever is wrong ends in a `DataError`. `visionpos.training.data.datasets` is the way in.
"""

import gzip
import io
import json
import lzma
import tarfile
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from PIL import Image, ImageOps, UnidentifiedImageError
from torchvision.datasets import CIFAR10, CIFAR100
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.datasets.utils import check_integrity, extract_archive

from visionpos.training.data.names import CIFAR_NAMES
from visionpos.training.errors import DataError

CIFAR = dict(zip(CIFAR_NAMES, (CIFAR10, CIFAR100), strict=True))
SPLITS = {"train": ("train",), "test": ("test", "val")}  # the names of a split's folder, in order of preference

_OPENERS = {".tar": open, ".xz": lzma.open, ".gz": gzip.open, ".tgz": gzip.open}
_FORMATS = ("PNG", "JPEG", "WEBP", "BMP")
_LARGEST_FILE = 64 * 2**20  # bytes of one picture in an archive
_MOST_CLASSES = 2**20  # whose names a parquet file does not give
_IMAGE_COLUMNS = ("img", "image")
_LABEL_COLUMNS = ("label", "fine_label", "labels")

Samples = Iterator[tuple[str, int, Image.Image]]  # where the picture is from, its label, the picture as RGB


def read(path: Path, split: str) -> tuple[tuple[str, ...], Samples] | None:
    """Return the classes and the samples of a split, or None if there are no data at this path.

    Raises:
        DataError: At once or while the samples are drawn, if the data are damaged or not what they should be.
    """
    for kind in CIFAR.values():
        if path.name in (kind.base_folder, kind.filename) and path.exists():
            return _read_cifar(path, kind, split)
    if path.is_file():
        return _read_archive(path, split)
    tables = {table for name in ("", "data", "plain_text", path.name) for table in (path / name).glob("*.parquet")}
    folders = [path / name for names in SPLITS.values() for name in names if (path / name).is_dir()]
    if tables and folders:
        raise DataError(f"{path} holds both parquet files and class folders: give each a folder of its own")
    if tables:
        return _read_parquet(path, sorted(tables), split)
    if folders:
        tops = (top for folder in folders for top in folder.iterdir())  # these may be links, folders below may not
        files = (file for top in tops for file in top.rglob("*") if file.is_file())
        return _class_folders(path, {file.relative_to(path).parts: file for file in files}, split)
    return None


def _read_cifar(path: Path, kind: type[CIFAR10], split: str) -> tuple[tuple[str, ...], Samples]:
    """Read torchvision's CIFAR from its archive or the folder in it; torchvision checks each file's md5."""
    if path.is_file():
        if not check_integrity(path, kind.tgz_md5):
            raise DataError(f"{path} is damaged or incomplete, its md5 must be {kind.tgz_md5}: fetch it again")
        with tempfile.TemporaryDirectory() as folder:
            extract_archive(path, folder)
            return _read_cifar(Path(folder) / kind.base_folder, kind, split)
    with _reporting(f"{path} is damaged, put {kind.filename} (md5 {kind.tgz_md5}) in its place"):
        data = kind(path.parent, train=split == "train")
    samples = zip(data.data, data.targets, strict=True)
    return tuple(data.classes), ((f"{path} picture {n}", y, Image.fromarray(x)) for n, (x, y) in enumerate(samples))


def _read_archive(path: Path, split: str) -> tuple[tuple[str, ...], Samples]:
    """Read a tar of class folders, with or without one folder above them; only this split is kept in memory."""
    if path.suffix not in _OPENERS:
        raise DataError(f"{path} is not an archive of a known kind: {', '.join(_OPENERS)}")
    files, tops = {}, set()
    with _reporting(f"{path} is damaged, incomplete or no archive"), _OPENERS[path.suffix](path, "rb") as stream:
        with tarfile.open(fileobj=stream, mode="r|", tarinfo=_StrictTarInfo) as archive:
            for member in archive:
                parts = _accepted(path, member)
                depth = next((d for d, part in enumerate(parts[:2]) if any(part in s for s in SPLITS.values())), None)
                if member.isfile() and depth is not None:
                    tops.add(parts[:depth])
                    wanted = parts[depth] in SPLITS[split]
                    files[parts[depth:]] = archive.extractfile(member).read() if wanted else b""
        while stream.read(2**20):  # on to the end, where the checksum of the compression stands
            pass
    if len(tops) > 1:
        above = ", ".join("/".join(top) or "." for top in sorted(tops))
        raise DataError(f"{path} holds more than one data set: {above}")
    return _class_folders(path, files, split)


class _StrictTarInfo(tarfile.TarInfo):
    """Report a broken or missing header, which tarfile takes for the end of the archive after the first."""

    @classmethod
    def fromtarfile(cls, archive):
        """Return the next member; ReadError if its header is broken."""
        try:
            return super().fromtarfile(archive)
        except tarfile.EOFHeaderError:
            raise
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(str(error)) from error


def _accepted(path: Path, member: tarfile.TarInfo) -> tuple[str, ...]:
    """Return the names of folders and file on the path of a harmless member; DataError for any other."""
    name = PurePosixPath(member.name)
    if name.is_absolute() or ".." in name.parts:
        raise DataError(f"{path}: refused {member.name!r}, a name that leads out of the archive")
    if not (member.isfile() or member.isdir()):
        raise DataError(f"{path}: refused {member.name!r}, a link or device")
    if member.size > _LARGEST_FILE:
        raise DataError(f"{path}: refused {member.name!r}, {member.size} bytes, more than {_LARGEST_FILE}")
    return name.parts


def _class_folders(
    path: Path, files: Mapping[tuple[str, ...], Path | bytes], split: str
) -> tuple[tuple[str, ...], Samples]:
    """Return the samples among files named (folder of the split, class, ..., file).

    Hidden files are none, nor, as in torchvision's ImageFolder, those whose suffix is not that of a picture.
    """
    members = {}
    for parts in sorted(files):
        suffix = PurePosixPath(parts[-1]).suffix.lower()
        if len(parts) > 2 and not any(part.startswith(".") for part in parts) and suffix in ("", *IMG_EXTENSIONS):
            members.setdefault(parts[0], []).append(parts)
    folder = _choose(path, split, members)
    classes = {name: tuple(sorted({parts[1] for parts in found})) for name, found in members.items()}
    _check_same_classes(path, folder, classes)
    labels = {name: label for label, name in enumerate(classes[folder])}
    return classes[folder], (
        (where := f"{path}/{'/'.join(parts)} (picture {n})", labels[parts[1]], decode(where, files[parts]))
        for n, parts in enumerate(members[folder])
    )


def _read_parquet(path: Path, tables: list[Path], split: str) -> tuple[tuple[str, ...], Samples]:
    """Read Hugging Face's layout: a column of encoded pictures and a column of class numbers."""
    by_folder = {word: [table for table in tables if word in table.name] for words in SPLITS.values() for word in words}
    by_folder = {word: files for word, files in by_folder.items() if files}
    chosen = _choose(path, split, by_folder)
    classes = {word: _parquet_classes(files) for word, files in by_folder.items()}
    _check_same_classes(path, chosen, classes)
    names = classes[chosen]
    order = sorted(names, key=int if all(name.isdecimal() for name in names) else str)
    return tuple(order), _parquet_samples(by_folder[chosen], [order.index(name) for name in names])


def _parquet_samples(files: list[Path], labels: list[int]) -> Samples:
    """Yield the samples of some files, the class numbers in them replaced by `labels`."""
    for where, number, picture in _parquet_rows(files, _LABEL_COLUMNS, _IMAGE_COLUMNS):
        with _reporting(f"{where} is not a picture and a class number"):
            if not 0 <= number < len(labels):
                raise DataError(f"{where}: label {number} is not in 0 .. {len(labels) - 1}")
            sample = where, labels[number], decode(where, picture["bytes"])
        yield sample


def _parquet_classes(files: list[Path]) -> tuple[str, ...]:
    """Return the names of classes 0, 1, ... in Hugging Face's metadata; without them the numbers themselves."""
    with _reporting(f"{files[0]} is damaged or not in Hugging Face's layout"):
        schema = _pyarrow_parquet().read_schema(files[0])
        info = json.loads((schema.metadata or {}).get(b"huggingface", b"{}")).get("info", {})
        names = info.get("features", {}).get(_column(schema.names, _LABEL_COLUMNS), {}).get("names")
        if not names:
            largest = max(label for _, label in _parquet_rows(files, _LABEL_COLUMNS))
            if largest >= _MOST_CLASSES:
                raise DataError(
                    f"{files[0]}: label {largest} is not below {_MOST_CLASSES}, the most classes there may be"
                )
            names = range(1 + largest)
        return tuple(map(str, names))


def _parquet_rows(files: list[Path], *columns: tuple[str, ...]) -> Iterator[tuple]:
    """Yield where each row is from, and its values in the columns, each given by the names it may have."""
    for file in files:
        with _reporting(f"{file} is damaged or not in Hugging Face's layout"), open(file, "rb") as stream:
            table = _pyarrow_parquet().ParquetFile(stream)
            names = [_column(table.schema_arrow.names, each) for each in columns]
            rows = (row for batch in table.iter_batches(1024, columns=names) for row in batch.to_pylist())
            for n, row in enumerate(rows):
                yield f"{file} (row {n})", *(row[name] for name in names)


def _pyarrow_parquet():
    """Return `pyarrow.parquet`; DataError if it is not installed."""
    try:
        import pyarrow.parquet
    except ImportError:
        raise DataError("parquet files need pyarrow: pip install pyarrow") from None
    return pyarrow.parquet


def _column(present: Iterable[str], names: tuple[str, ...]) -> str:
    """Return the first of the names that is a column; DataError if none is."""
    column = next((name for name in names if name in present), None)
    if column is None:
        raise DataError(f"a parquet file needs a column {' or '.join(names)}, but has {', '.join(present)}")
    return column


def _choose(path: Path, split: str, present: Iterable[str]) -> str:
    """Return the folder, or the word in a file's name, that stands for a split."""
    chosen = next((name for name in SPLITS[split] if name in present), None)
    if chosen is None:
        wanted, there = " or ".join(SPLITS[split]), ", ".join(present) or "none at all"
        raise DataError(f"{path} has no {wanted} pictures in class folders or parquet files; it has {there}")
    return chosen


def _check_same_classes(path: Path, chosen: str, classes: Mapping[str, tuple[str, ...]]) -> None:
    """Raise DataError if the splits have different classes."""
    for other in classes:
        if classes[other] != classes[chosen]:
            differ = sorted(set(classes[other]) ^ set(classes[chosen]))
            what = f"only one has {', '.join(differ[:5])}" if differ else "their order differs"
            raise DataError(f"{path}: {chosen} and {other} have different classes, {what}")


def decode(where: str, source: Path | bytes) -> Image.Image:
    """Return one file as an RGB picture, upright as its EXIF says, its format and size checked first."""
    with _reporting(f"cannot read picture {where}"):
        try:
            content = source.read_bytes() if isinstance(source, Path) else source
            image = Image.open(io.BytesIO(content), formats=_FORMATS)
        except UnidentifiedImageError:
            raise DataError(f"cannot read picture {where}: not one of {', '.join(_FORMATS)}") from None
        with image:
            if image.width * image.height > Image.MAX_IMAGE_PIXELS:
                raise DataError(f"cannot read picture {where}: {image.width} x {image.height} pixels are too many")
            if image.mode[0] in "IF":
                raise DataError(f"cannot read picture {where}: more than 8 bits per channel")
            return ImageOps.exif_transpose(image).convert("RGB")


@contextmanager
def _reporting(problem: str):
    """Turn whatever a library raises about bad data into a DataError of one line."""
    try:
        yield
    except DataError:
        raise
    except Exception as error:
        raise DataError(f"{problem}: {str(error) or type(error).__name__}") from error
