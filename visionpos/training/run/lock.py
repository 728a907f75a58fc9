"""One worker at a time in a directory: a lock that the system drops when its holder ends, however that happens.

It is filelock's on the file `lock` in the directory, the operating system's own on Linux, macOS and Windows: known to
all machines that share the disk, as far as its file system passes locks on, not inherited by child processes, and gone
with a process that is killed. `lock.holder` beside it stays, and says who had it last.
"""

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from visionpos.training.errors import ConfigError

__all__ = ["hold", "holder"]

_ours: set[Path] = set()  # the directories that this process has locked


@contextmanager
def hold(directory: Path) -> Iterator[bool]:
    """Lock a directory, made if need be, for the block; give False, without waiting, if another process has it.

    Within the block the same process may ask again, and gets it.

    Raises:
        ConfigError: the directory cannot be written, or its file system has no locks.
    """
    directory = directory.resolve()
    lock = None if directory in _ours else _locked(directory)
    if lock is None:
        yield directory in _ours
        return
    _ours.add(directory)
    try:
        yield True
    finally:
        _ours.discard(directory)
        lock.release()


def holder(directory: Path) -> str | None:
    """Return who has locked a directory, as `pid 123 on host`; None if nobody has."""
    directory = directory.resolve()
    if directory in _ours:
        return _name()
    if not (directory / "lock").exists():
        return None
    try:
        with FileLock(directory / "lock", timeout=0):
            return None
    except Timeout:
        return (directory / "lock.holder").read_text().strip()
    except OSError:  # a directory of somebody else's
        return None


def _locked(directory: Path) -> FileLock | None:
    """Return the lock of a directory, held; None if another process has it."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"output: cannot write to {directory}: {error}") from None
    lock = FileLock(directory / "lock", timeout=0)
    try:
        lock.acquire()
        (directory / "lock.holder").write_text(_name() + "\n")
    except Timeout:
        return None
    except (OSError, NotImplementedError) as error:
        raise ConfigError(f"output: {directory} cannot be locked: {error}; choose a disk with file locks") from None
    return lock


def _name() -> str:
    """Return what names this process."""
    return f"pid {os.getpid()} on {socket.gethostname()}"
