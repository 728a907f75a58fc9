"""A run, whatever is trained: start or continue, train, evaluate, log, save, until the result is written."""

import os
import platform
import sys
import time
from abc import ABC, abstractmethod
from contextlib import closing
from dataclasses import asdict
from importlib.metadata import version
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

import visionpos as vp
from visionpos.training.config.schema import Config, encoding_label
from visionpos.training.errors import CheckpointError, one_line, reporting
from visionpos.training.run import checkpoint
from visionpos.training.run.checkpoint import Checkpoint
from visionpos.training.run.distributed import Distributed
from visionpos.training.run.engine import Trainer, pick_device
from visionpos.training.run.listed import keep_split
from visionpos.training.run.objective import Objective
from visionpos.training.run.profile import profile
from visionpos.training.run.record import RunDirectory, flat, write_json
from visionpos.training.run.source import Source, open_source
from visionpos.training.run.start import adopt_statistics

__all__ = ["TrainingTask", "duration", "execute", "resolved_encodings", "versions"]


class TrainingTask(ABC):
    """Say what one kind of training has of its own."""

    @abstractmethod
    def check(self, config: Config) -> None:
        """Raise ConfigError for a mistake, before any picture is read."""

    @abstractmethod
    def build(self, config: Config, source: Source, device: torch.device) -> tuple[nn.Module, Objective]:
        """Return the model and what it learns."""

    @abstractmethod
    def summary(self, config: Config, trainer: Trainer) -> dict[str, Any]:
        """Return what the result says beyond what all tasks say."""

    @abstractmethod
    def headline(self, result: dict[str, Any]) -> str:
        """Return a finished run in one line."""

    def on_evaluate(self, trainer: Trainer, run: RunDirectory) -> None:  # noqa: B027
        """Record more at an evaluation; every process comes here, and the first one writes."""

    def on_end(self, trainer: Trainer, run: RunDirectory) -> None:  # noqa: B027
        """Write more before the result; every process comes here, and the first one writes."""


def execute(task: TrainingTask, config: Config) -> dict[str, Any]:
    """Train as configured, or continue, and return the result, which is also in the run directory.

    Raises:
        ConfigError: a mistake in the configuration, or a run directory that is another run's or in use.
        Interrupted: a signal stopped it, and everything is saved.
        CheckpointError: a file cannot be written, or no checkpoint of the run can be read.
        NonFiniteError: a loss, a gradient or a weight is not finite.
    """
    config = adopt_statistics(config)
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # which cuBLAS needs for it, from its first product
        torch.use_deterministic_algorithms(True)
    distributed = Distributed(pick_device(config.device))
    distributed.check(config)
    task.check(config)
    if config.profile is not None:
        return profile(open_trainer(task, config, distributed), config.profile)
    run = RunDirectory(config)
    if run.result is not None:
        with reporting(f"{run.path / 'result.json'} is damaged"):
            headline = task.headline(run.result)
        distributed.print0(one_line(f"{run.path} is finished: {headline}"))
        return run.result
    with distributed.answering():
        trainer = open_trainer(task, config, distributed)
        with run.locked(distributed), trainer.stop.listening():
            found = checkpoint.load(run.checkpoints, warn=distributed.is_main)
            resume(trainer, run, found)
            distributed.print0(f"{run.path}: {start_line(config, trainer)}")
            result = RunLoop(task, trainer, run, config, found).run_to_end()
    distributed.print0(one_line(f"{run.path}: {task.headline(result)}"))
    return result


def open_trainer(task: TrainingTask, config: Config, distributed: Distributed) -> Trainer:
    """Return everything that training needs, at its start."""
    source = open_source(config.data, config.recipe, config.seed, distributed)
    torch.manual_seed(config.seed)
    return Trainer(*task.build(config, source, distributed.device), config, distributed)


def start_line(config: Config, trainer: Trainer) -> str:
    """Return what is about to be trained: encoding, model, data, device."""
    where = surroundings(trainer)
    device = f"{where['device']}, {where['threads']} threads" if trainer.device.type == "cpu" else where["device"]
    processes = f" x {where['processes']}" if where["processes"] > 1 else ""
    data, size = trainer.source.metadata, "x".join(map(str, trainer.source.metadata["image_size"]))
    pictures = f"{data['train_size']} pictures" if data["train_size"] else "new pictures"
    if not data.get("resident", True):
        pictures += " through loader processes"
    return (
        f"{encoding_label(config.encoding)} in {config.model.name}, {count(trainer.model):,} parameters; "
        f"{config.data.name}, {pictures} of {size}; {trainer.total} steps of {config.recipe.batch_size} on "
        f"{device}{processes}"
    )


def duration(seconds: float) -> str:
    """Return a time in the unit that suits it: `40 s`, `12 min`, `3.5 h`."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def resume(trainer: Trainer, run: RunDirectory, found: Checkpoint | None) -> None:
    """Continue where a checkpoint was saved, with a warning if that cannot be to the bit; nothing for None."""
    distributed = trainer.distributed
    if distributed.all_reduce_max(found.step if found else 0) != (found.step if found else 0):
        raise CheckpointError(f"{run.checkpoints}: not all processes find the same checkpoint; use a shared disk")
    if found is None:
        return
    if not {"line", "seconds", "losses", "surroundings"} <= found.state.keys():
        raise CheckpointError(f"the checkpoint of step {found.step} was saved by another version of this program")
    trainer.restore(found)
    distributed.print0(one_line(f"{run.path}: continuing after step {trainer.step} of {trainer.total}"))
    there, here = flat(found.state["surroundings"]), flat(surroundings(trainer))
    changed = ", ".join(
        f"{key} ({there.get(key)} there, {here[key]} now)" for key in here if here[key] != there.get(key)
    )
    if changed and distributed.is_main:
        print(f"warning: the run continues with the same data, but not to the last bit: {changed}", file=sys.stderr)


class RunLoop:
    """Train with a log: every `eval_every` an evaluation, a log line, a checkpoint.

    Args:
        found: The checkpoint that the trainer continues from, if any.
    """

    def __init__(
        self, task: TrainingTask, trainer: Trainer, run: RunDirectory, config: Config, found: Checkpoint | None
    ):
        self.task, self.trainer, self.run, self.config = task, trainer, run, config
        state = {"line": {}, "seconds": 0.0, "losses": []} if found is None else found.state
        self.line: dict[str, Any] = state["line"]  # the last line of the log
        self.seconds: float = state["seconds"]
        self.losses: list[float] = state["losses"]  # since that line

    def run_to_end(self) -> dict[str, Any]:
        """Train, write the result, and return it.

        Raises:
            Interrupted: after a signal; everything is saved.
            CheckpointError: a file cannot be written, for want of space for instance.
        """
        trainer, run, task = self.trainer, self.run, self.task
        if trainer.distributed.is_main:
            run.begin(trainer.step)
            keep_split(run.path, trainer.source.split_record)
        try:
            with closing(run):
                self._train()
                result = common(self.config, trainer, self.line) | task.summary(self.config, trainer)
                task.on_end(trainer, run)
                if trainer.distributed.is_main:
                    write_json(run.path / "result.json", result)
        except OSError as error:
            raise CheckpointError(f"cannot write to {run.path}: {error}; the last checkpoint is untouched") from None
        trainer.distributed.barrier()
        return result

    def _train(self) -> None:
        """Do stretches of steps and evaluations in turn, until the last step has its line."""
        trainer, config = self.trainer, self.config
        between = config.recipe.eval_every * (trainer.source.steps_per_epoch or 1)
        label, quiet = encoding_label(config.encoding), not (has_terminal() and trainer.distributed.is_main)
        with tqdm(total=trainer.total, initial=trainer.step, desc=label, unit="step", disable=quiet) as bar:
            while (last := self.line.get("step", 0)) < trainer.total:
                missing = min(trainer.total, last + between) - trainer.step
                if missing:
                    self._advance(min(config.log_every, missing), bar)
                else:
                    self._evaluate()
                stopped = trainer.distributed.all_reduce_max(trainer.stop.signal)
                if stopped or not missing:
                    self._save()
                trainer.stop.raise_if(stopped, trainer.step)

    def _advance(self, steps: int, bar: tqdm) -> None:
        """Do some steps, and show the last loss."""
        trainer, started, before = self.trainer, time.perf_counter(), self.trainer.step
        self.losses += trainer.advance(steps).tolist()
        self.seconds += time.perf_counter() - started
        self.run.scalar("train/loss", self.losses[-1], trainer.step)
        self.run.scalar("train/lr", trainer.learning_rate, trainer.step)
        bar.set_postfix(loss=f"{self.losses[-1]:.3f}", refresh=False)
        bar.update(trainer.step - before)

    def _evaluate(self) -> None:
        """Write one line of the log."""
        trainer = self.trainer
        self.line = {
            "step": trainer.step,
            "epoch": trainer.epoch,
            "lr": trainer.learning_rate,
            "loss": sum(self.losses) / len(self.losses),
            trainer.objective.measure: trainer.evaluate(),
            "seconds": round(self.seconds, 2),
            "images_per_second": round(trainer.step * self.config.recipe.batch_size / self.seconds, 1),
        }
        self.losses = []
        if trainer.distributed.is_main:
            self.run.log(self.line)
        if not has_terminal():
            trainer.distributed.print0(self._progress())
        self.task.on_evaluate(trainer, self.run)

    def _progress(self) -> str:
        """Return the last line of the log for people."""
        step, total, measure = self.trainer.step, self.trainer.total, self.trainer.objective.measure
        found = ", ".join(f"{split} {value:.4f}" for split, value in self.line[measure][self.trainer.final].items())
        left = "" if step == total else f", about {duration(self.seconds / step * (total - step))} left"
        return (
            f"step {step} of {total}: loss {self.line['loss']:.4f}, {measure} {found}, {duration(self.seconds)}{left}"
        )

    def _save(self) -> None:
        """Write a checkpoint, which every process must wait for."""
        trainer, tensors = self.trainer, self.trainer.tensors()
        if trainer.distributed.is_main:
            state = {"line": self.line, "seconds": self.seconds, "losses": self.losses}
            state |= {"facts": trainer.source.metadata, "surroundings": surroundings(trainer)}
            checkpoint.save(self.run.checkpoints, trainer.step, tensors, trainer.scalars() | state)
        trainer.distributed.barrier()


def has_terminal() -> bool:
    """Return whether somebody sees the progress bar; without one, every evaluation is a line."""
    return sys.stderr.isatty()


def common(config: Config, trainer: Trainer, line: dict[str, Any]) -> dict[str, Any]:
    """Return what a table of results may want to say about any finished run."""
    measure = trainer.objective.measure
    return {
        "final": {"weights": trainer.final, **line[measure][trainer.final]},
        measure: line[measure],
        "loss": line["loss"],
        "steps": trainer.step,
        "epochs": trainer.epoch,
        "seconds": line["seconds"],
        "images_per_second": line["images_per_second"],
        "parameters": count(trainer.model),
        "seed": config.seed,
        "data": trainer.source.metadata,
        "repeats_bits": trainer.device.type == "cpu" or torch.are_deterministic_algorithms_enabled(),
        **surroundings(trainer),
        "config": asdict(config),
    }


def surroundings(trainer: Trainer) -> dict[str, Any]:
    """Return what decides the last bits of a run beside its configuration."""
    name = {"cuda": torch.cuda.get_device_name, "mps": lambda _: f"Apple GPU ({platform.machine()})"}
    return {
        "device": name.get(trainer.device.type, lambda _: f"CPU ({platform.machine()})")(trainer.device),
        "threads": torch.get_num_threads(),
        "processes": trainer.distributed.size,
        "versions": versions(),
    }


def count(model: nn.Module) -> int:
    """Return the number of parameters of a model."""
    return sum(each.numel() for each in model.parameters())


def resolved_encodings(model: nn.Module) -> list[dict[str, Any]]:
    """Return each different encoding of a model, with every option as built and the number of its modules."""
    found: list[dict[str, Any]] = []
    for encoding in vp.get_encoding(model):
        info = vp.encoding_info(encoding.name)
        named = [key for key in (*info["required"], *info["options"]) if hasattr(encoding, key)]
        options = {key: getattr(encoding, key) for key in named}
        entry = {"name": encoding.name, "place": encoding.place, **options}
        same = next((other for other in found if {**other, "modules": 0} == {**entry, "modules": 0}), None)
        if same is None:
            found.append(entry | {"modules": 1})
        else:
            same["modules"] += 1
    return found


def versions() -> dict[str, str]:
    """Return the versions of what decides the numbers."""
    return {"python": platform.python_version()} | {name: version(name) for name in ("torch", "torchvision", "timm")}
