"""The pictures of an archive, decoded once: kept as uint8 beside it, and read in a tenth of a second from then on.

Beside `cifar10.tar.xz` lies `.cifar10.tar.xz-train.safetensors`, with the size in its name where pictures are resized:
the pictures (N, C, H, W), the labels (N,), the classes, and checksums of the archive and of its own content. A file of
another archive, or a damaged one, is not used and is written anew. Where nothing can be written, nothing is kept.
"""

import hashlib
import json
import zlib
from contextlib import suppress
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from visionpos.training.files import written_aside

FORMAT_VERSION = "2"  # of how pictures are decoded and resized: another one, another content
Decoded = tuple[Tensor, Tensor, tuple[str, ...]]  # images, labels, classes


def load(archive: Path, split: str, shape: str) -> Decoded | None:
    """Return the kept pictures of an archive; None if there are none, or not of this archive as it is now."""
    try:
        with safe_open(_beside(archive, split, shape), "pt") as file:
            kept = file.metadata() or {}
            if kept.get("version") != FORMAT_VERSION or kept.get("archive") != _checksum(archive):
                return None
            images, labels = file.get_tensor("images"), file.get_tensor("labels")
        content = images, labels, tuple(json.loads(kept["classes"]))
        return content if kept["content"] == _crc(content) else None
    except (OSError, SafetensorError, KeyError, ValueError):
        return None


def save(archive: Path, split: str, shape: str, decoded: Decoded) -> None:
    """Keep decoded pictures beside their archive, in full or not at all; where nothing can be written, do nothing."""
    images, labels, classes = decoded
    path = _beside(archive, split, shape)
    metadata = {
        "version": FORMAT_VERSION,
        "archive": _checksum(archive),
        "content": _crc(decoded),
        "classes": json.dumps(classes),
    }
    with suppress(OSError, SafetensorError), written_aside(path) as aside:
        save_file({"images": images, "labels": labels}, aside, metadata)


def _beside(archive: Path, split: str, shape: str) -> Path:
    """Return the path of the decoded pictures of a split of an archive."""
    return archive.with_name(f".{archive.name}-{split}{shape}.safetensors")


def _checksum(path: Path) -> str:
    """Return the SHA-256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def _crc(decoded: Decoded) -> str:
    """Return the CRC-32 of pictures, labels and classes."""
    images, labels, classes = decoded
    crc = zlib.crc32(json.dumps(classes).encode())
    for tensor in (images, labels):
        crc = zlib.crc32(memoryview(tensor.numpy()).cast("B"), crc)
    return f"{crc:08x}"
