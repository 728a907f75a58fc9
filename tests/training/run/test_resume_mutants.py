"""Resuming done wrong, in every way we could think of: each must show in what a run leaves."""

import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from timm.utils import ModelEmaV3

from tests.training.run.interrupting import KILL, Config, at, config_of, differences, outcome, run, send
from visionpos.training.run import engine, objective, source
from visionpos.training.run.checkpoint import Checkpoint
from visionpos.training.run.engine import Trainer
from visionpos.training.run.record import RunDirectory
from visionpos.training.run.source import PictureSource


def restored(edit: Callable[[Checkpoint, Trainer], None]) -> Callable[[], None]:
    """A checkpoint that is changed on its way back; the trainer is as it starts."""

    def change() -> None:
        restore = Trainer.restore

        def wrong(self, found):
            edit(found, self)
            restore(self, found)

        Trainer.restore = wrong

    return change


def moments(*keys: str) -> Callable[[], None]:
    """What the optimiser holds under some keys is zero."""

    def edit(found: Checkpoint, trainer: Trainer) -> None:
        held = found.tensors["optimizer"]
        held |= {name: torch.zeros_like(value) for name, value in held.items() if name.rpartition(".")[2] in keys}

    return restored(edit)


def state(key: str, value: Callable[[Any], Any]) -> Callable[[], None]:
    return restored(lambda found, trainer: found.state.update({key: value(found.state[key])}))


def tensors(key: str, value: Callable[[Checkpoint, Trainer], dict]) -> Callable[[], None]:
    return restored(lambda found, trainer: found.tensors.update({key: value(found, trainer)}))


def from_the_resume(owner: Any, name: str, position: int) -> Callable[[], None]:
    """An argument of a function that counts from the first time it is called, and not from the start of the run."""

    def change() -> None:
        function, first = getattr(owner, name), []

        def wrong(*args):
            first.append(args[position])
            counted = args[position] - first[0] + (owner is ModelEmaV3)
            return function(*args[:position], counted, *args[position + 1 :])

        setattr(owner, name, wrong)

    return change


def stream_from_the_resume(owner: Any, kind: str) -> Callable[[], None]:
    """A random stream whose step counts from the resume."""

    def change() -> None:
        stream, first = owner.stream, []

        def wrong(*key):
            if key[0] == kind and isinstance(key[-1], int):
                step = key[2]
                first.append(step)
                key = (*key[:2], step - first[0], *key[3:])
            return stream(*key)

        owner.stream = wrong

    return change


def seeded_once() -> None:
    seed, seeds = engine.seed_layers, []
    engine.seed_layers = lambda *given: seeds or seeds.append(seed(*given))


def schedule_from_the_resume() -> None:
    cosine = engine.cosine_schedule

    def wrong(*args):
        schedule = cosine(*args)
        from_the_resume(schedule, "step_update", 0)()
        return schedule

    engine.cosine_schedule = wrong


def lines_kept() -> None:
    begin = RunDirectory.begin
    RunDirectory.begin = lambda self, step: begin(self, 10**6)


# Of these an uninterrupted run knows nothing.
RESTORING = {
    "moments of the optimiser not restored": moments("exp_avg", "exp_avg_sq"),
    "first moment not restored": moments("exp_avg"),
    "second moment not restored": moments("exp_avg_sq"),
    "step counts of the optimiser not restored": moments("step"),
    "weights not restored": tensors("model", lambda found, trainer: trainer.model.state_dict()),
    "averaged weights not restored": tensors("ema", lambda found, trainer: trainer.ema.module.state_dict()),
    "averaged weights are the weights": tensors("ema", lambda found, trainer: found.tensors["model"]),
    "weights are the averaged weights": tensors("model", lambda found, trainer: found.tensors["ema"]),
    "a step is left out": state("step", lambda step: step + 1),
    "a step is done twice": state("step", lambda step: step - 1),
    "losses since the last line forgotten": state("losses", lambda losses: []),
    "the last line forgotten": state("line", lambda line: {}),
    "order counted from the resume": from_the_resume(PictureSource, "rows", 1),
    "average counted from the resume": from_the_resume(ModelEmaV3, "update", 2),
    "schedule counted from the resume": schedule_from_the_resume,
    "augmentation counted from the resume": stream_from_the_resume(source, "augmentation"),
    "dropout counted from the resume": stream_from_the_resume(engine, "dropout"),
}
EVERYWHERE = {"dropout seeded at the start only": seeded_once}


def interrupted(config: Config, *changes: Callable[[], object]) -> dict[str, Any]:
    """What a run leaves that is stopped between two evaluations and continued, the exit code too."""
    assert run(config, *changes, at("after backward", 5, send(signal.SIGTERM))) == 128 + signal.SIGTERM
    return {"code": run(config, *changes)} | outcome(Path(config.output))


def look_at(kind: str, mutants: dict[str, Callable[[], None]], everywhere: bool, folder: Path) -> dict[str, list[str]]:
    """In what a run continued by each mutant differs from one that it did not interrupt."""
    assert run(config_of(kind, folder / "whole")) == 0
    whole, found = {"code": 0} | outcome(folder / "whole"), {}
    for name, change in mutants.items():
        if everywhere:
            assert run(config_of(kind, folder / f"{name}, whole"), change) == 0
            whole = {"code": 0} | outcome(folder / f"{name}, whole")
        found[name] = differences(interrupted(config_of(kind, folder / name), change), whole)
    return found


def look_at_pictures(folder: Path) -> dict[str, list[str]]:
    right = {"nothing wrong": lambda: None}
    return look_at("pictures", right | RESTORING, False, folder) | look_at("pictures", EVERYWHERE, True, folder / "all")


@pytest.mark.slow
def test_every_wrong_way_to_resume_is_noticed(fresh, tmp_path):
    (tmp_path / "all").mkdir()
    found = fresh(look_at_pictures, tmp_path)
    assert found.pop("nothing wrong") == []
    assert [name for name, parts in found.items() if not parts] == []
    assert len(found) >= 18


def look_at_masks(folder: Path) -> dict[str, list[str]]:
    return look_at("mae", {"masks counted from the resume": stream_from_the_resume(objective, "mask")}, False, folder)


def test_masks_that_start_anew_are_noticed(fresh, tmp_path):
    assert all(fresh(look_at_masks, tmp_path).values())


def keep_lines(folder: Path) -> list[str]:
    """Killed between a line of the log and its checkpoint, and the line is not dropped."""
    assert run(config_of("task", folder / "whole")) == 0
    config = config_of("task", folder / "run")
    assert run(config, at("after a line of the log", 2, KILL)) == -signal.SIGKILL
    assert run(config, lines_kept) == 0
    return differences(outcome(folder / "run"), outcome(folder / "whole"))


def test_lines_that_are_written_twice_are_noticed(fresh, tmp_path):
    assert fresh(keep_lines, tmp_path) == ["log"]
