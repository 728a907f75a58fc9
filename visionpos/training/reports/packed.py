"""What is left of a finished run: read from its directory, or from the one small JSON file that `results/` keeps of it.

result       the content of result.json: accuracy, configuration, versions, device
evaluations  those of evaluate*.json, for each way to have coordinates: accuracies at other sizes
right        which test pictures the run got right, for each split and each evaluated size, and, as `consistency`,
             which answers a shift left as they were; in the file one bit a picture, in the order of the test set, the
             first picture in the highest bit of the first byte, in base64
"""

import base64
import datetime
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
from numpy.typing import NDArray

from visionpos.training.errors import ConfigError
from visionpos.training.run.record import RESULT_KEYS, read_json, write_json

__all__ = ["pack", "pack_study", "read_directory", "unpack", "unpack_bits"]


def pack(run: Path, file: Path) -> None:
    """Write a finished run's JSON file.

    Args:
        run: The run directory.
        file: Where to write.

    Raises:
        ConfigError: What was right, picture by picture, does not give the accuracy that was reported.
    """
    content = read_directory(run)
    right = content["right"].items()
    content["right"] = {name: base64.b64encode(np.packbits(bits.astype(bool))).decode() for name, bits in right}
    content["result"]["config"]["output"] = run.name  # where it lay on some machine is of no use to anyone else
    content["evaluations"] = [report | {"run": run.name} for report in content["evaluations"]]
    file.parent.mkdir(parents=True, exist_ok=True)
    write_json(file, content)


def pack_study(folder: Path, runs: Sequence[Path], facts: dict[str, Any]) -> None:
    """Write runs into a folder of results/, and what they are, with the date and their devices and versions.

    Args:
        folder: The folder; what its study.json says already stays, unless it is given anew.
        runs: Run directories.
        facts: For study.json: what, command, commit, question and so on.

    Raises:
        ConfigError: study.json would not say what the runs are, which command made them, and of which commit.
    """
    file = folder / "study.json"
    study = (read_json(file) if file.exists() else {}) | facts
    for needed in ("what", "command", "commit"):
        if not study.get(needed):
            raise ConfigError(f"--{needed}: not given, and not in {file}; accepted: a text for readers of the results")
    for run in runs:
        pack(run, folder / f"{run.name}.json")
    results = [read_json(path)["result"] for path in folder.glob("*.json") if path != file]
    study["date"] = datetime.date.today().isoformat()
    study["card"] = ", ".join(sorted({result["device"] for result in results}))
    study["versions"] = [dict(each) for each in sorted({tuple(result["versions"].items()) for result in results})]
    write_json(file, study)


def unpack(file: Path) -> dict[str, Any]:
    """Return the content of a run's JSON file, as `read_directory` does; ConfigError if it is none."""
    content = read_json(file)
    if not isinstance(content, dict) or not {"result", "evaluations", "right"} <= content.keys():
        raise ConfigError(f"{file} is no packed run: it needs result, evaluations and right")
    count = content["result"]["data"]["test_size"]
    return content | {"right": {name: unpack_bits(text, count) for name, text in content["right"].items()}}


def unpack_bits(text: str, count: int) -> NDArray:
    """Return (count,) bool, which pictures were right, from the text of one entry of `right`."""
    return np.unpackbits(np.frombuffer(base64.b64decode(text), np.uint8), count=count).astype(bool)


def read_directory(run: Path) -> dict[str, Any]:
    """Return a run directory's result, evaluations and what was right, (pictures,) bool by the names above.

    Raises:
        ConfigError: A file is damaged, an evaluation is of another step than the last, or what was right does not give
            the accuracy that was reported.
    """
    result = read_json(run / "result.json", *RESULT_KEYS)
    if "chance" not in result:
        raise ConfigError(f"{run} is no run of train.classify: its result has no accuracy")
    right = {f"final {split}": bits for split, bits in load(run / "predictions.safetensors").items()}
    reported = {f"final {split}": share for split, share in result["final"].items()}
    found = {file: read_json(file, "rows") for file in sorted(run.glob("evaluate*.json"))}
    for file, report in found.items():
        if report.get("step", result.get("steps")) != result.get("steps"):
            raise ConfigError(
                f"{file} is of step {report['step']}, and the run ended at step {result['steps']}: evaluate it again"
            )
        coordinates, answers = report["coordinates"], load(file.with_suffix(".safetensors"))
        for row in report["rows"] if answers else ():  # nothing kept: a mean without interval
            key, place = name_of(row), f"{row['size'][0]}x{row['size'][1]} {row['part']}"
            if f"right {key}" not in answers:
                raise ConfigError(f"{run}: the answers that are kept of its evaluation lack {key!r}")
            right[f"{coordinates} {key}"] = answers[f"right {key}"]
            reported[f"{coordinates} {key}"] = row["accuracy"]
            if "consistency" in row:
                own = next(name_of(first) for first in report["rows"] if first["part"] == row["part"])
                right[f"{coordinates} consistency {place}"] = answers[key] == answers[own]
                reported[f"{coordinates} consistency {place}"] = row["consistency"]
    for name, bits in right.items():
        if name not in reported or abs(bits.mean() - reported[name]) > 1e-6:
            raise ConfigError(f"{run}: {name!r} has {bits.mean()} right, reported are {reported.get(name)}")
    return {"result": result, "evaluations": list(found.values()), "right": right}


def name_of(row: dict[str, Any]) -> str:
    """Return how an evaluation's files call a row: `scale 24x24 test`."""
    return f"{row['how']} {row['size'][0]}x{row['size'][1]} {row['part']}"


def load(path: Path) -> dict[str, NDArray]:
    """Return the content of a safetensors file, nothing if there is none; ConfigError if it is damaged."""
    try:
        return safetensors.numpy.load_file(path) if path.exists() else {}
    except (OSError, safetensors.SafetensorError) as error:
        raise ConfigError(f"{path}: {error}") from None
