"""Finished runs for a report: found, held to be comparable, and put side by side."""

import json
from collections.abc import Sequence
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from visionpos.training.config.schema import Config, Data, Model, Recipe, encoding_label
from visionpos.training.errors import ConfigError
from visionpos.training.reports.packed import read_directory, unpack
from visionpos.training.reports.statistics import CONFIDENCE_LEVEL, accuracy_interval, difference_interval
from visionpos.training.run.record import CHANGEABLE_FIELDS, flat, read_json

__all__ = ["Found", "Group", "Run", "find_runs", "group_runs"]

IGNORED_FIELDS = (*CHANGEABLE_FIELDS, "seed", "encoding", "device", "data.root", "data.download")  # to comparing runs
METADATA_KEYS = ("num_classes", "image_size", "channels", "train_size", "test_size", "mean", "std")


@dataclass
class Run:
    """Hold the results of a finished run."""

    path: Path
    result: dict[str, Any]
    evaluations: list[dict[str, Any]]  # of other sizes, if there are any
    right: dict[str, NDArray]  # what was measured, as `packed.py` names it: (pictures,) bool; lacks what was not kept

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
    study: dict[str, Any] | None = None  # study.json, if the runs are those of a folder of results/


@dataclass
class Group:
    """Hold the runs of one encoding with one setting of the varied fields, seed by seed."""

    label: str
    setting: dict[str, Any]
    runs: dict[int, Run]

    def final(self, split: str) -> dict[int, float]:
        """Return the accuracy of each seed on a split of the test."""
        return {seed: run.result["final"][split] for seed, run in self.runs.items()}

    def mean(self, split: str) -> float:
        """Return the mean accuracy of the seeds on a split of the test."""
        return float(np.mean(list(self.final(split).values())))

    def accuracy(self, key: str, shares: dict[int, float]) -> dict[str, Any]:
        """Return the mean of one accuracy of each seed, with its interval if more than one seed kept its answers.

        Args:
            key: What was measured, as in `Run.right`.
            shares: The accuracy of each seed.
        """
        content = {"mean": float(np.mean(list(shares.values()))), "low": None, "high": None, "per_seed": shares}
        if all(key in self.runs[seed].right for seed in shares):
            content |= vars(accuracy_interval(np.stack([self.runs[seed].right[key] for seed in shares])))
        return content

    def difference(
        self, baseline: "Group", key: str, shares: dict[int, float], others: dict[int, float], compared: int
    ) -> dict[str, Any] | None:
        """Return the paired difference to the baseline on the seeds that both have; None if there are none.

        `holds` says whether 0 is excluded even by the wider interval that the number of differences looked at together
        asks for (Bonferroni).

        Args:
            baseline: The runs to compare to.
            key: What was measured, as in `Run.right`.
            shares: The accuracy of each seed.
            others: Those of the baseline.
            compared: Number of differences that are looked at together.
        """
        seeds = [seed for seed in shares if seed in others]
        if not seeds:
            return None
        each = {seed: shares[seed] - others[seed] for seed in seeds}
        content = {"mean": float(np.mean(list(each.values()))), "low": None, "high": None, "holds": False}
        pairs = [(self.runs[seed].right.get(key), baseline.runs[seed].right.get(key)) for seed in seeds]
        if all(one is not None and other is not None for one, other in pairs):
            ours, theirs = map(np.stack, zip(*pairs, strict=True))
            strict = difference_interval(ours, theirs, 1 - (1 - CONFIDENCE_LEVEL) / compared)
            content |= {**vars(difference_interval(ours, theirs)), "holds": strict.excludes_zero}
        return content | {"per_seed": each}


def find_runs(paths: Sequence[Path], varied: Sequence[str]) -> Found:
    """Return all runs at the given run directories, and directly below the given sweep directories and results."""
    found = Found([], [], list(varied), [])
    for path in paths:
        inside = sorted(each.parent for each in path.glob("*/config.yaml"))
        declared = path / "sweep.json"
        if (path / "config.yaml").is_file():
            inside = [path]
        elif (path / "study.json").is_file():
            inside = sorted(set(path.glob("*.json")) - {path / "study.json"})
            found.study, declared = read_json(path / "study.json"), path / "study.json"
        elif not inside:
            raise ConfigError(f"{path} is neither a run directory nor a directory of them: no config.yaml")
        if declared.is_file():
            listed = read_json(declared)
            found.varied += [name for name in listed.get("vary", []) if name not in found.varied]
            found.tuned += [name for name in listed.get("tune", []) if name not in found.tuned]
        for each in inside:
            if each.is_file() or (each / "result.json").is_file():
                found.runs.append(read_run(each))
            else:
                found.unfinished.append(each)
    if not found.runs:
        raise ConfigError(f"{', '.join(map(str, paths))}: no run is finished")
    return found


def read_run(path: Path) -> Run:
    """Return what is left of a run, from its directory or its packed file; ConfigError if it does not fit together."""
    return Run(path, **(unpack(path) if path.is_file() else read_directory(path)))


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
        config = flat(run.result["config"])
        config = {key: config[key] for key in config if not any(key == f or key.startswith(f"{f}.") for f in free)}
        metadata = {} if data_vary else {f"data ({key})": run.result["data"].get(key) for key in METADATA_KEYS}
        kind = "CPU" if run.result["device"].startswith("CPU") else "GPU"
        return {**config, **metadata, "final weights": run.result["final"]["weights"], "device": kind}

    first, defaults = found.runs[0], default_fields()
    expected = compared(first)
    for run in found.runs[1:]:
        here = compared(run)
        for key in expected | here:
            there, own = (each.get(key, defaults.get(key)) for each in (expected, here))
            if there != own:
                raise ConfigError(
                    f"{key}: {there} in {first.path}, {own} in {run.path}; accepted: runs that "
                    "differ in encoding and seed, and in fields named by --vary"
                )


def default_fields() -> dict[str, Any]:
    """Return the default of every field that has one, by dotted name, as a run's record has it.

    A run of an earlier version lacks the fields added since, and did what they do by default.
    """
    parts = {"": Config, "model.": Model, "data.": Data, "recipe.": Recipe}
    named = {f"{prefix}{each.name}": each.default for prefix, part in parts.items() for each in fields(part)}
    return json.loads(json.dumps({name: value for name, value in named.items() if value is not MISSING}))
