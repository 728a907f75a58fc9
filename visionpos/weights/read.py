"""Files of weights: what is in them, as a state dict, and the configuration beside them."""

from __future__ import annotations

import json
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

WHOLE, SHARDED = "model.safetensors", "model.safetensors.index.json"


def read_weights(weights: str | Path | Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the state dict in a file, or in a directory that Hugging Face or timm saved a model in.

    Args:
        weights: a .safetensors or .npz file, a directory with model.safetensors, in one piece or in several, or a
            state dict, which is returned as it is.

    Raises:
        ValueError: another kind of file, which could run code when it is read, a damaged one, or none.
    """
    if isinstance(weights, Mapping):
        return weights
    if not isinstance(weights, (str, Path)):
        raise ValueError(f"weights must be a path or a state dict, got {type(weights).__name__}")
    path = Path(weights)
    if path.is_dir() and path.suffix not in _READERS:
        found = next((path / name for name in (WHOLE, SHARDED) if (path / name).is_file()), None)
        if found is None:
            raise ValueError(f"{str(weights)!r} is a directory without {WHOLE}")
        path = found
    if path.name == SHARDED:
        files = sorted(set(read_json(path).get("weight_map", {}).values()))
        return {key: value for file in files for key, value in read_weights(path.parent / Path(file).name).items()}
    if path.suffix not in _READERS:
        raise ValueError(
            f"only .safetensors and .npz files and directories are loaded, got {str(weights)!r}: a pickle can run code "
            "when it is read; of one that you trust, pass the state dict: torch.load(path, weights_only=True)"
        )
    try:
        return _READERS[path.suffix](path)
    except (SafetensorError, zipfile.BadZipFile, zlib.error, OSError, ValueError, EOFError) as error:
        found = "is a directory" if path.is_dir() else f"cannot be read as {path.suffix[1:]}: {error}"
        raise ValueError(f"{str(path)!r} {found}") from error


def read_config(weights: Any) -> dict[str, Any]:
    """Return what config.json says beside weights; empty where there is none, or where weights are no path."""
    if not isinstance(weights, (str, Path)):
        return {}
    path = Path(weights) / "config.json" if Path(weights).is_dir() else Path(weights).parent / "config.json"
    return read_json(path) if path.is_file() else {}


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file.

    Raises:
        ValueError: no JSON, or no object.
    """
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{str(path)!r} cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{str(path)!r} must hold an object, got {type(content).__name__}")
    return content


def _read_npz(path: Path) -> dict[str, torch.Tensor]:
    with numpy.load(path, allow_pickle=False) as arrays:
        return {key: torch.from_numpy(arrays[key]) for key in arrays.files}


_READERS = {".safetensors": load_file, ".npz": _read_npz}
