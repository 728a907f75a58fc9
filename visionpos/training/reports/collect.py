"""Finished runs for a report: found, held to be comparable, and put side by side."""

import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
from numpy.typing import NDArray

from visionpos.training.config.schema import encoding_label
from visionpos.training.errors import ConfigError
from visionpos.training.reports.statistics import Interval, seed_interval, two_level_bootstrap
from visionpos.training.run.record import CHANGEABLE_FIELDS, RESULT_KEYS, flat, read_json

__all__ = ["Found", "Group", "Run", "find_runs", "group_runs"]

IGNORED_FIELDS = (*CHANGEABLE_FIELDS, "seed", "encoding", "device", "data.root", "data.download")  # to comparing runs
METADATA_KEYS = ("num_classes", "image_size", "channels", "train_size", "test_size", "mean", "std")


@dataclass
class Run:
    """Hold the results of a finished run."""

    path: Path
    result: dict[str, Any]
    evaluations: list[dict[str, Any]]  # of other sizes, if there are any
    right: dict[str, NDArray]  # split of the test: (pictures,) 1 where the final model is right; empty if not recorded

    @property
    def label(self) -> str:
        """Return the short name of the run's encoding."""
        return encoding_label(self.result["config"]["encoding"])

    @property
    def splits(self) -> list[str]:
        """Return the splits that accuracy was measured on, the headline first."""
        return [name for name in self.result["final"] if name != "weights"]

    def field(self, name: str) -> Any:
        """Return a field of the configuration by its dotted name."""
        value = self.result["config"]
        for key in name.split("."):
            if not isinstance(value, dict) or key not in value:
                raise ConfigError(f"--vary: the runs have no field {name!r}")
            value = value[key]
        return value


@dataclass
class Found:
    """Hold the runs of a report, and what their sweeps say of them."""

    runs: list[Run]
    unfinished: list[Path]
    varied: list[str]  # fields that are varied on purpose
    tuned: list[str]  # fields that are chosen for each encoding


@dataclass
class Group:
    """Hold the runs of one encoding with one setting of the varied fields, seed by seed."""

    label: str
    setting: dict[str, Any]
    runs: dict[int, Run]

    def accuracy(self, split: str) -> tuple[Interval, str]:
        """Return the mean accuracy on a split of the test with its interval, and what the interval is drawn from."""
        return interval(self.runs.values(), split)

    def difference(self, baseline: "Group", split: str) -> dict[str, Any] | None:
        """Return the paired difference to the baseline on the seeds that both have; None if there are none."""
        seeds = [seed for seed in self.runs if seed in baseline.runs]
        if not seeds:
            return None
        pairs = [(self.runs[seed], baseline.runs[seed]) for seed in seeds]
        each = [a.result["final"][split] - b.result["final"][split] for a, b in pairs]
        if all(split in run.right for pair in pairs for run in pair):
            found = two_level_bootstrap(np.stack([a.right[split].astype(float) - b.right[split] for a, b in pairs]))
            basis = "seeds and pictures"
        else:
            found, basis = seed_interval(each), "seeds only"
        return {**vars(found.within(-1, 1)), "basis": basis, "per_seed": dict(zip(seeds, each, strict=True))}


def interval(runs: Collection[Run], split: str) -> tuple[Interval, str]:
    """Return the mean accuracy of runs that differ in the seed alone, and what its interval is drawn from."""
    if all(split in run.right for run in runs):
        return two_level_bootstrap(np.stack([run.right[split] for run in runs])).within(0, 1), "seeds and pictures"
    return seed_interval([run.result["final"][split] for run in runs]).within(0, 1), "seeds only"


def find_runs(paths: Sequence[Path], varied: Sequence[str]) -> Found:
    """Return all runs at the given run directories, and directly below the given sweep directories."""
    found = Found([], [], list(varied), [])
    for path in paths:
        inside = sorted(each.parent for each in path.glob("*/config.yaml"))
        if (path / "config.yaml").is_file():
            inside = [path]
        elif not inside:
            raise ConfigError(f"{path} is neither a run directory nor a directory of them: no config.yaml")
        if (path / "sweep.json").is_file():
            declared = read_json(path / "sweep.json", "vary", "tune")
            found.varied += [name for name in declared["vary"] if name not in found.varied]
            found.tuned += [name for name in declared["tune"] if name not in found.tuned]
        for each in inside:
            if (each / "result.json").is_file():
                found.runs.append(read_run(each))
            else:
                found.unfinished.append(each)
    if not found.runs:
        raise ConfigError(f"{', '.join(map(str, paths))}: no run is finished")
    return found


def read_run(path: Path) -> Run:
    """Return a run directory's results; ConfigError if they do not fit together."""
    result = read_json(path / "result.json", *RESULT_KEYS)
    if "chance" not in result:
        raise ConfigError(f"{path} is no run of train.classify: its result has no accuracy")
    names = ("evaluate.json", "evaluate_extrapolated.json")
    evaluations = [read_json(path / name, "rows") for name in names if (path / name).is_file()]
    right = {}
    if (path / "predictions.safetensors").is_file():
        try:
            right = safetensors.numpy.load_file(path / "predictions.safetensors")
        except (OSError, safetensors.SafetensorError) as error:
            raise ConfigError(f"{path / 'predictions.safetensors'}: {error}") from None
    for split, each in right.items():
        if split not in result["final"] or abs(each.mean() - result["final"][split]) > 1e-6:
            raise ConfigError(f"{path / 'predictions.safetensors'}: {split} is not what result.json says")
    return Run(path, result, evaluations, right)


def group_runs(found: Found) -> list[Group]:
    """Return the runs by encoding and setting, each seed once; ConfigError if they cannot be compared."""
    refuse_mixtures(found)
    groups: dict[str, Group] = {}
    for run in found.runs:
        setting = {name: run.field(name) for name in found.varied}
        group = groups.setdefault(json.dumps([run.label, setting]), Group(run.label, setting, {}))
        seed = run.result["seed"]
        if seed in group.runs:
            raise ConfigError(f"seed: {seed} of {run.label} is there twice: {group.runs[seed].path} and {run.path}")
        group.runs[seed] = run
    for group in groups.values():
        group.runs = dict(sorted(group.runs.items()))
        for name in found.tuned:
            if len({json.dumps(run.field(name)) for run in group.runs.values()}) > 1:
                raise ConfigError(f"{name}: differs between the seeds of {group.label}, and may only between encodings")
    return list(groups.values())


def refuse_mixtures(found: Found) -> None:
    """Raise ConfigError, naming a field, if runs differ in more than encoding, seed and what is declared."""
    free = (*IGNORED_FIELDS, *found.varied, *found.tuned)
    data_vary = any(name.startswith("data.") for name in found.varied)

    def compared(run: Run) -> dict[str, Any]:
        """Return all of a run that must be alike in the others, by name."""
        fields = flat(run.result["config"])
        fields = {key: fields[key] for key in fields if not any(key == f or key.startswith(f"{f}.") for f in free)}
        metadata = {} if data_vary else {f"data ({key})": run.result["data"].get(key) for key in METADATA_KEYS}
        kind = "CPU" if run.result["device"].startswith("CPU") else "GPU"
        return {**fields, **metadata, "final weights": run.result["final"]["weights"], "device": kind}

    first = found.runs[0]
    expected = compared(first)
    for run in found.runs[1:]:
        here = compared(run)
        for key in expected | here:
            if expected.get(key) != here.get(key):
                raise ConfigError(
                    f"{key}: {expected.get(key)} in {first.path}, {here.get(key)} in {run.path}; accepted: runs that "
                    "differ in encoding and seed, and in fields named by --vary"
                )
