"""The settings that a sweep tries for one encoding: all of a grid, or as many as wished chosen by Optuna.

Every encoding gets the same number of trials, each judged on training pictures held out for it. A trial is a run like
any other; Optuna remembers in its journal what it has proposed, and is told what the run directories say.
"""

import importlib.util
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

from visionpos.training.errors import ConfigError, reporting
from visionpos.training.run.source import stream

__all__ = ["Grid", "Outcome", "Search", "Settings"]

Settings = dict[str, Any]  # a configuration's fields by their dotted names
Outcome = tuple[bool, float | None]  # whether a trial is over, and its accuracy if it has not failed


class Grid:
    """Try every combination of the values that are listed for each field, the last field's varying fastest."""

    def __init__(self, values: dict[str, list[Any]]):
        self.combinations = [dict(zip(values, chosen, strict=True)) for chosen in itertools.product(*values.values())]
        self.count = len(self.combinations)

    def settings(self, number: int) -> Settings:
        """Return the settings of trial `number`."""
        return self.combinations[number]

    def propose(self, outcome: Callable[[int], Outcome]) -> None:
        """Do nothing, for all settings are known."""


class Search:
    """Let Optuna choose `count` settings between a lowest and a highest value of each field, on a logarithmic scale.

    Half of the trials are drawn at random, the rest by its TPE sampler, which learns from those that are over.

    Args:
        ranges: (lowest, highest) of each field, both above 0.
        count: Number of trials.
        storage: Optuna's journal, a file; many studies share it.
        name: Of the study.
    """

    def __init__(self, ranges: dict[str, tuple[float, float]], count: int, storage: Path, name: str):
        if importlib.util.find_spec("optuna") is None:
            raise ConfigError(
                "tune.ranges: Optuna chooses between them and is not installed (pip install 'visionpos[sweep]'); "
                "give tune.grid instead, or install it"
            )
        self.ranges, self.count, self.storage, self.name = ranges, count, storage, name
        self.known: list[Settings] = []

    def settings(self, number: int) -> Settings | None:
        """Return the settings of trial `number`, if Optuna has proposed it."""
        if number >= len(self.known) and self.storage.exists():
            self.known = [trial.params for trial in self._proposed(self.study())]
        return self.known[number] if number < len(self.known) else None

    def propose(self, outcome: Callable[[int], Outcome]) -> None:
        """Tell Optuna what is done by now, and ask it for one more trial. Only one process at a time may."""
        import optuna

        study = self.study()
        proposed = self._proposed(study)
        for number, trial in enumerate(proposed):
            done, accuracy = outcome(number)
            if done and not trial.state.is_finished():
                study.tell(trial.number, accuracy, optuna.trial.TrialState.FAIL if accuracy is None else None)
        number = len(proposed)
        if number < self.count:
            study.sampler = optuna.samplers.TPESampler(
                n_startup_trials=(self.count + 1) // 2,
                seed=stream("trial", number) % 2**32,  # the same random settings for every encoding
            )
            between = {
                key: optuna.distributions.FloatDistribution(*ends, log=True) for key, ends in self.ranges.items()
            }
            study.ask(between)

    def _proposed(self, study: Any) -> list[Any]:
        """Return the trials whose settings Optuna has all written down; a process killed as it asked leaves others."""
        return [trial for trial in study.trials if trial.params.keys() == self.ranges.keys()]

    def study(self) -> Any:
        """Return Optuna's record of the trials so far; it and the journal are made if need be."""
        import optuna
        from optuna.storages.journal import JournalFileBackend

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        advice = "remove its last line if that was cut off, or choose another --output"
        with reporting(f"--storage: {self.storage} is no journal that Optuna can use ({advice})"):
            self.storage.parent.mkdir(parents=True, exist_ok=True)
            if self.storage.exists() and self.storage.read_bytes()[-1:] not in (b"\n", b""):
                raise ValueError("its last line has no end")  # Optuna passes over it, and appends to it
            journal = optuna.storages.JournalStorage(JournalFileBackend(str(self.storage)))  # locks shared disks too
            return optuna.create_study(study_name=self.name, storage=journal, direction="maximize", load_if_exists=True)
