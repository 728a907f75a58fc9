"""A run directory: what was asked for, what happened, and the result.

    config.yaml     the complete configuration; `--config RUN/config.yaml` repeats the run
    log.jsonl       one line per evaluation
    events.out...   the same for TensorBoard, and the training loss in between
    checkpoints/    see checkpoint.py
    result.json     written when the run is finished, and only then
    reconstruction/ pretraining only: one picture per evaluation

Every file but the logs is written aside and renamed, so that it is there in full or not at all.
"""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker, get_available_trackers
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from torchvision.utils import save_image

from visionpos.training.config.command_line import config_class, parse, read_fields
from visionpos.training.config.schema import Config
from visionpos.training.errors import ConfigError, one_line, reporting
from visionpos.training.files import written_aside
from visionpos.training.run import checkpoint
from visionpos.training.run.checkpoint import Checkpoint
from visionpos.training.run.distributed import Distributed
from visionpos.training.run.lock import hold, holder

__all__ = ["RESULT_KEYS", "RunDirectory", "flat", "open_run", "read_json", "write_json", "write_tensors", "write_whole"]

RESULT_KEYS = ("final", "seconds", "seed", "config")  # of a finished run, whatever was trained

CHANGEABLE_FIELDS = (
    "output",
    "resume",
    "device",
    "parallel",
    "log_every",
    "profile",
    "threads",
    "deterministic",
    "tracker",
)  # of a weight, the last bits at most


class RunDirectory:
    """Read and write the files of one run. A directory that holds the same run is taken up again."""

    def __init__(self, config: Config):
        self.path = Path(config.output)
        self.checkpoints = self.path / "checkpoints"
        self.config = json.loads(json.dumps(asdict(config)))  # as YAML holds it: lists for tuples
        self.writer: SummaryWriter | None = None
        self.tracker: GeneralTracker | None = None
        self._compare()

    def _compare(self) -> None:
        """Raise ConfigError unless the run that is here may be continued, and is this one."""
        with reporting(f"output: {self.path}"):  # a name that no file system takes, or a place that is closed
            if not (self.path / "config.yaml").exists():
                return
        if not self.config["resume"]:
            raise ConfigError(f"output: {self.path} holds a run already, and resume is false; choose another --output")
        there, here = flat(read_fields(self.path / "config.yaml")), flat(self.config)
        changed = [key for key in here | there if here.get(key) != there.get(key) and key not in CHANGEABLE_FIELDS]
        if changed:
            differences = ", ".join(f"{key} ({there.get(key)} there, {here.get(key)} now)" for key in changed)
            onward = f", with --init {self.path} to train its weights further" * ("init" in self.config)
            raise ConfigError(f"output: {self.path} holds another run: {differences}; choose another --output{onward}")

    @contextmanager
    def locked(self, distributed: Distributed) -> Iterator[None]:
        """Keep the directory for this run alone in the block.

        Raises:
            ConfigError: another process is training in it, or has left another run there; names that.
        """
        with hold(self.path) if distributed.is_main else nullcontext(True) as ours:
            if not ours:
                raise ConfigError(f"output: {self.path} is in use by {holder(self.path)}; choose another --output")
            self._compare()  # again: it may be there only since we looked
            yield

    @property
    def result(self) -> dict[str, Any] | None:
        """Return the result, if the run is finished."""
        path = self.path / "result.json"
        return read_json(path, *RESULT_KEYS) if path.exists() else None

    def begin(self, step: int) -> None:
        """Open the logs at a step; what they hold from later steps, which are trained again, is dropped."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            write_whole(self.path / "config.yaml", yaml.safe_dump(self.config, sort_keys=False))
            self.writer = SummaryWriter(str(self.path), purge_step=step + 1)
            self.tracker = open_tracker(self.config["tracker"], self.path, self.config)
            kept = [line for line in self.history() if line["step"] <= step]
            write_whole(self.path / "log.jsonl", "".join(json.dumps(line) + "\n" for line in kept))
        except OSError as error:
            raise ConfigError(f"output: cannot write to {self.path}: {error}") from None

    def history(self) -> list[dict[str, Any]]:
        """Return the evaluations so far; a line that a crash left unfinished is not one, nor is a blank one.

        Raises:
            ConfigError: a line is damaged.
        """
        path, found = self.path / "log.jsonl", []
        lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
        for number, line in enumerate(lines, 1):
            if line.endswith(b"\n") and line.strip():
                with reporting(f"{path}: line {number} is damaged, remove it"):
                    found.append(json.loads(line))
                    if "step" not in found[-1]:
                        raise ValueError("no evaluation")
        return found

    def scalar(self, name: str, value: float, step: int) -> None:
        """Write one point of a TensorBoard curve, from the process that writes."""
        if self.writer is not None:
            self.writer.add_scalar(name, value, step)
        if self.tracker is not None:
            self.tracker.log({name: value}, step=step)

    def log(self, line: dict[str, Any]) -> None:
        """Write one evaluation into the log and for TensorBoard."""
        with (self.path / "log.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")
            file.flush()
            os.fsync(file.fileno())
        for measure, kinds in line.items():
            for kind, splits in kinds.items() if isinstance(kinds, dict) else ():
                for split, value in splits.items():
                    self.scalar(f"{measure}/{split}/{kind}", value, line["step"])

    def close(self) -> None:
        """Flush the curves."""
        if self.writer is not None:
            self.writer.close()
        if self.tracker is not None:
            self.tracker.finish()

    def picture(self, name: str, image: Tensor, step: int) -> None:
        """Write a picture (C, H, W) in [0, 1] of a step, as PNG and for TensorBoard, from the process that writes."""
        if self.writer is None:
            return
        (self.path / name).mkdir(exist_ok=True)
        save_image(image, self.path / name / f"step-{step:08d}.png")
        self.writer.add_image(name, image, step)


def open_tracker(name: str | None, path: Path, config: dict[str, Any]) -> GeneralTracker | None:
    """Return accelerate's tracker of that name for the run at `path`, told of its configuration; None without a name.

    Raises:
        ConfigError: there is no such tracker, or it is not installed or cannot be opened.
    """
    if name is None:
        return None
    known = {str(each): tracker for each, tracker in LOGGER_TYPE_TO_CLASS.items() if str(each) != "tensorboard"}
    present = sorted(each for each in map(str, get_available_trackers()) if each in known)
    if name not in present:
        advice = f"; pip install {name}" if name in known else f", and after an installation {', '.join(sorted(known))}"
        raise ConfigError(
            f"tracker: {name!r} given; accepted here: null, {', '.join(present) or 'no other'}{advice} "
            "(TensorBoard's events are written in any case)"
        )
    kind = known[name]
    try:
        tracker = (
            kind(path.parent.name, logging_dir=str(path)) if kind.requires_logging_directory else kind(path.parent.name)
        )
        tracker.start()
        tracker.store_init_configuration({key: value for key, value in flat(config).items() if value is not None})
    except Exception as error:  # a login that is missing, a server that does not answer
        raise ConfigError(f"tracker: {name} cannot be used: {type(error).__name__}: {one_line(error)}") from None
    return tracker


def open_run(path: Path) -> tuple[Config, Checkpoint]:
    """Return the configuration of a run that exists, and its newest checkpoint; ConfigError if it has none."""
    file = path / "config.yaml"
    if not file.is_file():
        raise ConfigError(f"{path} is no run directory: it has no config.yaml")
    found = checkpoint.load(path / "checkpoints")
    if found is None:
        raise ConfigError(f"{path} has no checkpoint yet")
    return parse(["--config", str(file), "--output", str(path)], config_class(file)), found


def read_json(path: Path, *keys: str) -> Any:
    """Return the content of a JSON file; ConfigError if it is damaged, or no object with these keys."""
    with reporting(f"{path} is damaged"):
        content = json.loads(path.read_text(encoding="utf-8"))
        if missing := [key for key in keys if key not in content]:
            raise ValueError(f"no {missing[0]!r} in it")
        return content


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file in full or not at all."""
    write_whole(path, json.dumps(content, indent=1) + "\n")


def write_whole(path: Path, text: str) -> None:
    """Write a file so that it is there in full or not at all."""
    with written_aside(path) as aside:
        aside.write_text(text)


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write a safetensors file in full or not at all."""
    with written_aside(path) as aside:
        save_file(tensors, aside)


def flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested dicts by dotted names; empty dicts count too, for an encoding or options may be anything."""
    fields = {}
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            fields.update(flat(value, f"{prefix}{key}."))
        else:
            fields[prefix + key] = value
    return fields
