"""Checkpoints that survive a crash at any moment, and are read only when every byte of them is right.

A checkpoint is a directory `step-00001234` of safetensors files, `state.json`, and `manifest.json` with the size and
sha256 of each. It is written aside, fsynced, and renamed into place, so that a step directory is complete or absent.
There is no pointer to the latest one: it is found by verifying manifests, newest first. Nothing is ever pickled.
"""

import hashlib
import json
import os
import shutil
import sys
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from visionpos.training.errors import CheckpointError

__all__ = ["Checkpoint", "load", "save"]

MANIFEST_FILE = "manifest.json"
STATE_FILE = "state.json"


@dataclass
class Checkpoint:
    """Hold what `load` found: the tensors by file name (without `.safetensors`), and the scalars."""

    step: int
    tensors: dict[str, dict[str, Tensor]]
    state: dict[str, Any]

    @property
    def metadata(self) -> dict[str, Any]:
        """Return what the run's source says of its data, as `Source.metadata`; on disk it is called `facts`."""
        if "facts" not in self.state:
            raise CheckpointError(f"the checkpoint of step {self.step} was saved by another version of this program")
        return self.state["facts"]


def save(
    root: Path, step: int, tensors: Mapping[str, Mapping[str, Tensor]], state: dict[str, Any], keep: int = 2
) -> Path:
    """Write the checkpoint of `step` under `root`, remove all but the newest `keep`, and return its directory."""
    final, aside = root / f"step-{step:08d}", _temporary(root)
    try:
        aside.mkdir(parents=True)
        contents = {f"{name}.safetensors": safetensors.torch.save(_portable(group)) for name, group in tensors.items()}
        contents[STATE_FILE] = json.dumps(state, indent=1, allow_nan=False).encode()
        for name, content in contents.items():
            _write(aside / name, content)
        files = {name: {"size": len(content), "sha256": _sha256(content)} for name, content in contents.items()}
        _write(aside / MANIFEST_FILE, json.dumps({"step": step, "files": files}, indent=1).encode())
        _sync_directory(aside)
        if final.exists():  # one that failed to verify, or that a signal had saved before the evaluation of its step
            _set_aside(final)
        os.rename(aside, final)
        _sync_directory(root)
        _read(final)
        _prune(final, keep)
    except OSError as error:
        shutil.rmtree(aside, ignore_errors=True)
        raise CheckpointError(
            f"cannot save step {step} under {root}: {error}; older checkpoints are untouched"
        ) from None
    return final


def load(root: Path, warn: bool = True) -> Checkpoint | None:
    """Return the newest checkpoint that verifies, with one warning line if newer ones do not; None if there are none.

    Args:
        root: Where `save` has written.
        warn: False for those of several processes that leave the line to another.

    Raises:
        CheckpointError: there are checkpoints, and none of them verifies.
    """
    directories = _steps(root)
    faults = []
    for directory in reversed(directories):
        try:
            checkpoint = _read(directory)
        except CheckpointError as fault:
            faults.append(str(fault))
            continue
        if faults and warn:
            print(f"warning: using {directory.name}, because {'; '.join(faults)}", file=sys.stderr)
        return checkpoint
    if faults:
        raise CheckpointError(f"no checkpoint under {root} can be read: {'; '.join(faults)}")
    return None


def _read(directory: Path) -> Checkpoint:
    """Read one checkpoint directory; the bytes that are verified are the bytes that are used."""
    try:
        manifest = json.loads((directory / MANIFEST_FILE).read_bytes())
        contents = {name: _verified(directory, name, **entry) for name, entry in manifest["files"].items()}
        state = json.loads(contents.pop(STATE_FILE))
        if directory.name != f"step-{manifest['step']:08d}":
            raise CheckpointError(f"{directory.name} holds the manifest of step {manifest['step']}")
        tensors = {name.removesuffix(".safetensors"): safetensors.torch.load(data) for name, data in contents.items()}
        if not isinstance(state, dict):
            raise CheckpointError(f"{directory.name}/{STATE_FILE} holds no state")
        weights = {**tensors.get("model", {}), **tensors.get("ema", {})}
        if bad := [name for name, tensor in weights.items() if not tensor.isfinite().all()]:
            raise CheckpointError(f"{directory.name} holds weights that are not finite ({bad[0]})")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        raise CheckpointError(f"{directory.name} is damaged ({type(error).__name__}: {error})") from None
    return Checkpoint(manifest["step"], tensors, state)


def _verified(directory: Path, name: str, size: int, sha256: str) -> bytes:
    """Return the bytes of a file of a checkpoint; CheckpointError if they are not those that were written."""
    if Path(name).name != name:
        raise CheckpointError(f"{directory.name}/{MANIFEST_FILE} names a file elsewhere: {name!r}")
    content = (directory / name).read_bytes()
    if len(content) != size:
        raise CheckpointError(f"{directory.name}/{name} has {len(content)} bytes, {size} were written")
    if _sha256(content) != sha256:
        raise CheckpointError(f"{directory.name}/{name} is not what was written (sha256 differs)")
    return content


def _prune(newest: Path, keep: int) -> None:
    """Remove all but the newest `keep`, the newer ones that `load` has passed over, and what a crash left behind."""
    root = newest.parent
    kept = [directory for directory in _steps(root) if directory <= newest][-keep:]
    for directory in _steps(root):
        if directory not in kept:
            _set_aside(directory)
    for leftover in root.glob(".tmp-*"):
        shutil.rmtree(leftover, ignore_errors=True)


def _set_aside(directory: Path) -> None:
    """Rename what is to be removed, so that no half of a checkpoint is ever seen."""
    os.rename(directory, _temporary(directory.parent))


def _temporary(root: Path) -> Path:
    """Return a new name for what is being written or removed."""
    return root / f".tmp-{os.getpid()}-{uuid.uuid4().hex}"


def _steps(root: Path) -> list[Path]:
    """Return the directories of checkpoints, oldest first."""
    return sorted(path for path in root.glob("step-*") if path.is_dir())


def _portable(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return contiguous copies on the CPU, because safetensors refuses tensors that share memory."""
    return {name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}


def _sha256(content: bytes) -> str:
    """Return the SHA-256 of some bytes."""
    return hashlib.sha256(content).hexdigest()


def _write(path: Path, content: bytes) -> None:
    """Write a file and wait until it is on the disk."""
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _sync_directory(path: Path) -> None:
    """Wait until a directory's entries are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
