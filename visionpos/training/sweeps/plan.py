"""The runs of a sweep, and in which order they can be done.

They lie in the sweep's directory, one directory for each encoding, setting and seed; trials of tuning in `tune` below
it, each like any other run, with `best.json` for what they led to.
"""

import functools
import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from visionpos.training.config.command_line import parse
from visionpos.training.config.ranges import is_file
from visionpos.training.config.schema import Config, changed, encoding_label, file_name
from visionpos.training.errors import ConfigError, reporting
from visionpos.training.run.build import check_model, pretrained_encoder
from visionpos.training.run.evaluation import parse_size
from visionpos.training.run.lock import hold
from visionpos.training.run.record import RunDirectory, read_json, write_json
from visionpos.training.run.start import adopt_statistics
from visionpos.training.sweeps.sweep_file import FIELDS_OF_SWEEP, Sweep, Tune, read_sweep
from visionpos.training.sweeps.tune import Grid, Outcome, Search, Settings

__all__ = ["Job", "Plan", "open_plan"]


@dataclass
class Job:
    """Hold one run. Its directory is all there is to know about how far it is.

    Args:
        path: The run directory.
        config: The run, as soon as its settings are known.
        evaluate: Arguments of `evaluate` for when it is trained; none for a trial.
        problem: Why it will never be known.
    """

    path: Path
    config: Config | None = None
    evaluate: dict[str, list[tuple[int, int]]] = field(default_factory=dict)
    problem: str | None = None

    @property
    def finished(self) -> bool:
        """Return whether it is trained, and evaluated if that is asked for."""
        needed = ["result.json", *(["evaluate.json", "evaluate_extrapolated.json"] if self.evaluate else [])]
        return all((self.path / name).exists() for name in needed)

    @property
    def is_known(self) -> bool:
        """Return whether it can be tried: its settings are known, or why they never will be."""
        return self.config is not None or self.problem is not None

    @property
    def error(self) -> dict[str, Any] | None:
        """Return what went wrong when it was last tried."""
        path = self.path / "error.json"
        return read_json(path, "error") if path.exists() else None


IsDone = Callable[[Job], bool]  # whether a job will not be tried again: finished or failed


@dataclass
class Cell:
    """Hold one encoding with one setting of the varied fields: its trials, and its runs with what they led to."""

    name: str
    folder: Path
    flags: tuple[str, ...]
    tune: Tune
    tuner: Grid | Search | None
    evaluate: dict[str, list[tuple[int, int]]]

    def config(self, settings: Settings, seed: int, path: Path) -> Config:
        """Return the configuration of a run in `path` with these settings."""
        return adopt_statistics(replace(configure(self.flags + as_flags(settings)), seed=seed, output=str(path)))

    def trial_config(self, settings: Settings, path: Path) -> Config:
        """Return the configuration of a trial in `path` of these settings."""
        fixed = {**self.tune.settings, "data.validation": self.tune.validation}
        return self.config({**settings, **fixed}, self.tune.seed, path)

    @property
    def trial_folder(self) -> Path:
        """Return the directory of the trials."""
        return self.folder / "tune" / self.name

    def trial(self, number: int) -> Job:
        """Return a trial, without a configuration while its settings are not known."""
        path, settings = self.trial_folder / f"trial-{number:02d}", self.tuner.settings(number)
        if settings is None:
            return Job(path)
        return Job(path, self.trial_config(settings, path))

    def trials(self, is_done: IsDone | None) -> Iterator[Job]:
        """Yield all trials; with `is_done`, Optuna is asked for settings that are not known yet."""

        def outcome(number: int) -> Outcome:
            """Return whether a trial is done, and its accuracy."""
            trial = self.trial(number)
            return is_done(trial), accuracy_of(trial)

        for number in range(self.tuner.count):
            if is_done and self.tuner.settings(number) is None:
                with hold(self.trial_folder) as ours:
                    if ours:
                        self.tuner.propose(outcome)
            yield self.trial(number)

    def best(self, is_done: IsDone) -> Settings | None:
        """Return the settings to run with, chosen once and for good when all trials are done; None until then.

        Raises:
            ConfigError: no trial has finished, or the choice that is there was made in another way.
        """
        if self.tuner is None:
            return {}
        path = self.trial_folder / "best.json"
        trials = [self.trial(number) for number in range(self.tuner.count)]
        if not path.exists() and all(trial.config and is_done(trial) for trial in trials):
            with hold(self.trial_folder) as ours:
                if ours and not path.exists():
                    write_json(path, self._choose(trials))
        if not path.exists():
            return None
        chosen = read_json(path, "settings", "trial", "trials")
        with reporting(f"{path} is damaged"):
            if len(chosen["trials"]) != len(trials):
                raise ConfigError(
                    f"tune: {path} is a choice of {len(chosen['trials'])} trials; choose another --output"
                )
            trial = trials[chosen["trial"]]
        if trial.config is None:
            raise ConfigError(
                f"--storage: Optuna's journal does not know {trial.path.name}, which {path} has chosen; put the "
                "journal back, or choose another --output"
            )
        RunDirectory(trial.config)  # raises if that trial was another run
        return chosen["settings"]

    def _choose(self, trials: list[Job]) -> dict[str, Any]:
        """Return the trial with the highest accuracy, the first of several; ConfigError if none has finished."""
        rows = [{**self.tuner.settings(number), "accuracy": accuracy_of(job)} for number, job in enumerate(trials)]
        finished = [number for number, row in enumerate(rows) if row["accuracy"] is not None]
        if not finished:
            raise ConfigError(f"tune: no trial in {self.trial_folder} has finished")
        best = max(finished, key=lambda number: rows[number]["accuracy"])
        return {"settings": self.tuner.settings(best), "trial": best, "trials": rows}

    def final(self, seed: int, is_done: IsDone) -> Job:
        """Return the run of one seed."""
        path = self.folder / f"{self.name}-seed{seed}"
        try:
            settings = self.best(is_done)
        except ConfigError as error:
            return Job(path, problem=str(error))
        return Job(path, None if settings is None else self.config(settings, seed, path), self.evaluate)


@dataclass
class Plan:
    """Hold a sweep with its runs."""

    sweep: Sweep
    folder: Path
    cells: list[Cell]

    @property
    def devices(self) -> set[str]:
        """Return what the runs ask for to compute on."""
        return {configure(cell.flags).device for cell in self.cells}

    def jobs(self, is_done: IsDone, ask: bool = False) -> Iterator[Job]:
        """Yield every run in the order in which to take them: trials first, then seed by seed, each with all encodings.

        Args:
            is_done: Says whether a job is finished or failed.
            ask: Let Optuna choose settings for the next trials.
        """
        for cell in self.cells:
            if cell.tuner is not None and not (cell.trial_folder / "best.json").exists():
                yield from cell.trials(is_done if ask else None)
        for seed in self.sweep.seeds:
            for cell in self.cells:
                yield cell.final(seed, is_done)


def accuracy_of(trial: Job) -> float | None:
    """Return a trial's accuracy on the held-out pictures, by the weights that count; None if it is not finished."""
    if not trial.finished:
        return None
    path = trial.path / "result.json"
    with reporting(f"{path} is damaged"):
        return read_json(path)["final"]["validation"]


@functools.cache
def configure(flags: tuple[str, ...]) -> Config:
    """Return the configuration of these flags; its groups are shared by all runs that have them in common."""
    return parse(flags)


def as_flags(settings: Settings) -> tuple[str, ...]:
    """Return settings as flags of a command line."""
    texts = {key: value if isinstance(value, str) else json.dumps(value) for key, value in settings.items()}
    return tuple(part for key, text in texts.items() for part in (f"--{key}", text))


def open_plan(path: Path, overrides: Sequence[str], output: str | None, storage: str | None) -> Plan:
    """Return the plan that a sweep file describes, every configuration checked.

    Args:
        path: The file.
        overrides: Flags of `train.classify` for all runs.
        output: Directory of the runs, instead of the file's.
        storage: Optuna's journal; by default optuna.journal in the directory.

    Raises:
        ConfigError: for any mistake, in one line.
    """
    sweep = read_sweep(path)
    folder = Path(output or sweep.output or f"runs/{path.stem}")
    if storage and not sweep.tune.ranges:
        raise ConfigError(f"--storage: {storage} given, but only tune.ranges uses Optuna, and there are none")
    for given in overrides:
        name = given.removeprefix("--").partition("=")[0]
        if given.startswith("--") and name in (*FIELDS_OF_SWEEP, *sweep.vary, *sweep.tune.fields):
            raise ConfigError(f"--{name}: the sweep decides this field for every run; change it in {path}")
    base = ["--config", str(path.parent / sweep.run), *overrides]
    journal = Path(storage) if storage else folder / "optuna.journal"
    cells = []
    for values in itertools.product(*sweep.vary.values()):
        setting = dict(zip(sweep.vary, values, strict=True))
        for spec in sweep.encodings:
            if isinstance(spec, str) and is_file(path.parent / spec):
                spec = str(path.parent / spec)
            flags = (*base, *as_flags({**setting, "encoding": spec}))
            cells.append(make_cell(sweep, folder, flags, setting, journal))
    names = [f"{cell.name}-seed{seed}" for cell in cells for seed in sweep.seeds]
    if twice := {name for name in names if names.count(name) > 1}:
        raise ConfigError(f"encodings, seeds, vary: {min(twice)} is there more than once")
    check_tuning(cells[0])
    check_starts(cells, [*sweep.seeds, *([sweep.tune.seed] if sweep.tune.fields else [])])
    return Plan(sweep, folder, cells)


def make_cell(sweep: Sweep, folder: Path, flags: tuple[str, ...], setting: Settings, journal: Path) -> Cell:
    """Return the cell of these flags, its model built once to find mistakes."""
    config = configure(flags)
    for field_name in changed(config, ["parallel", "profile"]):
        given = getattr(config, field_name)
        raise ConfigError(f"{field_name}: {given} given, but a sweep trains every run, each in one process")
    check_model(config)
    name = file_name("-".join([encoding_label(config.encoding), *(f"{key}={setting[key]}" for key in setting)]))
    sizes = {
        kind: [parse_size(f"evaluate.{kind}", str(size)) for size in asked]
        for kind, asked in vars(sweep.evaluate).items()
    }
    evaluate = sizes if any(sizes.values()) else {}
    return Cell(name, folder, flags, sweep.tune, tuner_of(sweep.tune, journal, name), evaluate)


def tuner_of(tune: Tune, journal: Path, name: str) -> Grid | Search | None:
    """Return what chooses the settings of trials; None if there is nothing to choose."""
    if tune.ranges:
        return Search(tune.ranges, tune.trials, journal, name)
    return Grid(tune.grid) if tune.grid else None


def check_tuning(cell: Cell) -> None:
    """Find mistakes in the settings to be tried, which are the same for all cells."""
    if isinstance(cell.tuner, Grid):
        for number in range(cell.tuner.count):
            cell.trial(number)
    if isinstance(cell.tuner, Search):
        for end in (0, 1):
            values = {key: ends[end] for key, ends in cell.tune.ranges.items()}
            cell.trial_config(values, cell.folder)


def check_starts(cells: Sequence[Cell], seeds: Sequence[int]) -> None:
    """Find pretrained encoders that are not there, each looked for once."""
    starts = {replace(configure(cell.flags), seed=seed).start: None for cell in cells for seed in seeds}
    for start in starts:
        if start is not None:
            pretrained_encoder(start)
