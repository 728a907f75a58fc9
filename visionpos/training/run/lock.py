"""One worker at a time in a directory: a lock that the system drops when its holder ends, however that happens.

It is a POSIX record lock on the file `lock` in the directory: known to all machines that share the disk, as far as the
disk's file system passes locks on (NFS does), not inherited by child processes, and gone with a process that is killed.
The file itself stays, and says who had it last.
"""

import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from visionpos.training.errors import ConfigError

__all__ = ["hold", "holder"]

_ours: set[Path] = set()  # their files must not be opened again: closing one anywhere in the process drops the lock


@contextmanager
def hold(directory: Path) -> Iterator[bool]:
    """Lock a directory, made if need be, for the block; give False, without waiting, if another process has it.

    Within the block the same process may ask again, and gets it.

    Raises:
        ConfigError: the directory cannot be written, or its file system has no locks.
    """
    path = directory.resolve() / "lock"
    file = None if path in _ours else _locked(path)
    if file is None:
        yield path in _ours
        return
    with file:
        _ours.add(path)
        try:
            yield True
        finally:
            _ours.discard(path)


def holder(directory: Path) -> str | None:
    """Return who has locked a directory, as `pid 123 on host`; None if nobody has."""
    path = directory.resolve() / "lock"
    if path in _ours:
        return f"pid {os.getpid()} on {socket.gethostname()}"
    try:
        with path.open() as file:
            try:
                fcntl.lockf(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except (BlockingIOError, PermissionError):
                return file.read().strip()
    except OSError:
        pass
    return None


def _locked(path: Path) -> TextIO | None:
    """Return the lock file, open and locked; None if another process has it."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("a")
    except OSError as error:
        raise ConfigError(f"output: cannot write to {path.parent}: {error}") from None
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        file.truncate(0)
        os.write(file.fileno(), f"pid {os.getpid()} on {socket.gethostname()}\n".encode())
    except (BlockingIOError, PermissionError):  # POSIX allows either
        file.close()
        return None
    except OSError as error:
        file.close()
        raise ConfigError(f"output: {path.parent} cannot be locked: {error}; choose a disk with file locks") from None
    return file
