"""Files that are there in full or not at all."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["written_aside"]


@contextmanager
def written_aside(path: Path) -> Iterator[Path]:
    """Give a path to write a file to, which comes to be at `path` when the block ends, and not if it raises.

    It is in a new directory that nobody else can have made, so that no link can lead the writer elsewhere.

    Raises:
        OSError: nothing can be written there.
    """
    with tempfile.TemporaryDirectory(prefix=".tmp-", dir=path.parent) as folder:
        aside = Path(folder) / path.name
        yield aside
        with aside.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(aside, path)
