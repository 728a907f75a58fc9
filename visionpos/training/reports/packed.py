"""A finished run as one small JSON file: what `results/` keeps of every run of a published table.

result       the content of result.json: accuracy, configuration, versions, device
evaluations  those of evaluate*.json, for each way to have coordinates: accuracies at other sizes
right        which test pictures the run got right, for each split and each evaluated size: one bit a picture, in the
             order of the test set, the first picture in the highest bit of the first byte, in base64
"""

import base64
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
from numpy.typing import NDArray

from visionpos.training.run.record import read_json, write_json

__all__ = ["pack", "unpack_bits"]


def pack(run: Path, file: Path) -> None:
    """Write a finished run's JSON file.

    Args:
        run: The run directory.
        file: Where to write.

    Raises:
        ValueError: What was right, picture by picture, does not give the accuracy that was reported.
    """
    evaluations = {file.stem: read_json(file) for file in sorted(run.glob("evaluate*.json"))}
    right = {f"final {split}": bits for split, bits in _load(run / "predictions.safetensors").items()}
    for name, report in evaluations.items():
        tensors = _load(run / f"{name}.safetensors")
        for row in report["rows"]:
            key = f"{row['how']} {row['size'][0]}x{row['size'][1]} {row['part']}"
            right[f"{report['coordinates']} {key}"] = bits = tensors[f"right {key}"]
            if abs(bits.mean() - row["accuracy"]) > 1e-6:
                raise ValueError(f"{run}: {key!r} has {bits.mean()} right, reported are {row['accuracy']}")
    packed = {name: base64.b64encode(np.packbits(bits.astype(bool))).decode() for name, bits in right.items()}
    file.parent.mkdir(parents=True, exist_ok=True)
    result = read_json(run / "result.json")
    result["config"]["output"] = run.name  # where it lay on some machine is of no use to anyone else
    evaluations = {name: report | {"run": run.name} for name, report in evaluations.items()}
    write_json(file, {"result": result, "evaluations": list(evaluations.values()), "right": packed})


def unpack_bits(text: str, count: int) -> NDArray:
    """Return (count,) bool, which pictures were right, from the text of one entry of `right`."""
    return np.unpackbits(np.frombuffer(base64.b64decode(text), np.uint8), count=count).astype(bool)


def _load(path: Path) -> dict[str, Any]:
    return safetensors.numpy.load_file(path) if path.exists() else {}
