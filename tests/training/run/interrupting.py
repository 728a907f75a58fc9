"""Tiny runs in forked processes that are killed, stopped or changed at a chosen moment.

Forking needs a process that has imported torch and started no thread: the fixture `fresh` of conftest.py. A child is
thrown away after its run, so what is changed in it is never put back.
"""

import json
import os
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

import visionpos as vp
from tests.training.scripts.test_pretrain_mae import pretrain_config
from tests.training.tiny_run import picture_config, task_config
from visionpos.training.config.schema import Config, PretrainConfig
from visionpos.training.errors import run_command
from visionpos.training.run import checkpoint, classification, pretraining, record, source
from visionpos.training.run.engine import Trainer
from visionpos.training.run.record import RunDirectory

AUGMENTED = ["--recipe.auto_augment", "trivial", "--recipe.re_prob", "0.5"]
MIXED = ["--recipe.mixup_alpha", "0.4", "--recipe.cutmix_alpha", "1.0"]
DROPPED = ["--model.options.drop_path_rate", "0.3", "--model.options.proj_drop_rate", "0.2"]
KINDS: dict[str, tuple[Callable[..., Config], list[str]]] = {
    "task": (task_config, [*DROPPED, "--recipe.steps", "10", "--encoding", "learned+rope_axial"]),
    "pictures": (picture_config, [*AUGMENTED, *MIXED, "--recipe.epochs", "4", "--encoding", "rope_axial"]),
    "mae": (
        pretrain_config,
        [*AUGMENTED, "--recipe.epochs", "4", "--recipe.ema_decay", "0.9", "--encoding", "alibi2d"],
    ),
}


def prepare() -> None:
    """Make this process one to fork from, and evaluations short."""
    torch.set_num_threads(1)
    vp.supported_hosts()  # imports every family, or every child does
    tqdm.get_lock()  # or every child leaves one behind
    source.EVALUATION_TASK_SIZE = source.EVALUATION_BATCH_SIZE = 16


def config_of(kind: str, output: Path, *flags: str) -> Config:
    """A run of that kind in `output`; its data lie beside it."""
    make, own = KINDS[kind]
    return make(output.parent, *own, "--log_every", "2", *flags, "--output", str(output))


def train(config: Config) -> None:
    """By the command that the configuration is for."""
    (pretraining if isinstance(config, PretrainConfig) else classification).train(config)


def start(action: Callable[[], object], text: Path = Path(os.devnull)) -> int:
    """Begin a command in a process of its own, that writes to a file; returns its number."""
    child = os.fork()
    if child:
        return child
    code = 70
    try:
        descriptor = os.open(text, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        torch.set_num_threads(1)  # renews the pool that the fork broke, before several threads do so in a race
        code = run_command(action)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def wait(child: int, seconds: int = 600) -> int:
    """The exit code of a process, or minus the signal that killed it; one that hangs is killed."""
    end = time.monotonic() + seconds
    while (ended := os.waitpid(child, os.WNOHANG)) == (0, 0):
        if time.monotonic() > end:
            os.kill(child, signal.SIGKILL)
        time.sleep(0.01)
    return os.waitstatus_to_exitcode(ended[1])


def forked(action: Callable[[], object], text: Path = Path(os.devnull)) -> int:
    """The exit code of a command in a process of its own."""
    return wait(start(action, text))


def run(config: Config, *changes: Callable[[], object], text: Path = Path(os.devnull)) -> int:
    """The exit code of a run in a process of its own, in which the changes are made first."""

    def action() -> None:
        for change in changes:
            change()
        train(config)

    return forked(action, text)


def outcome(folder: Path, ignored: tuple[str, ...] = ()) -> dict[str, Any]:
    """All that a run leaves and that no interruption may change: every byte but times and the place."""
    newest = max((folder / "checkpoints").glob("step-*"))
    binary = [*newest.glob("*.safetensors"), *folder.glob("*.safetensors"), *folder.glob("reconstruction/*.png")]
    found: dict[str, Any] = {"newest": newest.name} | {path.name: path.read_bytes() for path in binary}
    texts = {"state": newest / "state.json", "result": folder / "result.json", "log": folder / "log.jsonl"}
    skipped = {"seconds", "images_per_second", "output", *ignored}
    for name, path in texts.items():
        lines = path.read_text().splitlines() if name == "log" else [path.read_text()] if path.exists() else []
        found[name] = [without(json.loads(line), skipped) for line in lines]
    return found


def without(tree: Any, keys: set[str]) -> Any:
    """JSON without some keys, at any depth."""
    if isinstance(tree, dict):
        return {key: without(value, keys) for key, value in tree.items() if key not in keys}
    return [without(value, keys) for value in tree] if isinstance(tree, list) else tree


def differences(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """The parts in which two outcomes differ."""
    return [name for name in one | other if one.get(name) != other.get(name)]


Hit = Callable[[], None]


def before(owner: Any, name: str) -> Callable[[Hit], None]:
    return around(owner, name, lambda function, hit, args, kwargs: (hit(), function(*args, **kwargs))[1])


def after(owner: Any, name: str) -> Callable[[Hit], None]:
    return around(owner, name, lambda function, hit, args, kwargs: (function(*args, **kwargs), hit())[0])


def half(owner: Any, name: str) -> Callable[[Hit], None]:
    """Of a function that writes its second argument to the file of its first."""

    def write(function, hit, args, kwargs):
        content = args[1] if isinstance(args[1], bytes) else args[1].encode()
        path = args[0].parent / ".tmp-half" / args[0].name if owner is record else args[0]
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content[: len(content) // 2])
        hit()
        return function(*args, **kwargs)

    return around(owner, name, write)


def half_a_line(function, hit, args, kwargs):
    with (args[0].path / "log.jsonl").open("a") as file:
        size = file.tell()
        file.write(json.dumps(args[1])[:40])
        file.flush()
        hit()
        file.truncate(size)
    return function(*args, **kwargs)


def half_removed(function, hit, args, kwargs):
    for path in sorted(Path(args[0]).iterdir())[:2]:
        path.unlink()
    hit()
    return function(*args, **kwargs)


def around(owner: Any, name: str, change: Callable) -> Callable[[Hit], None]:
    """What has a function call `hit` at the moment that `change` chooses."""

    def arm(hit: Hit) -> None:
        function = getattr(owner, name)
        setattr(owner, name, lambda *args, **kwargs: change(function, hit, args, kwargs))

    return arm


POINTS: dict[str, Callable[[Hit], None]] = {
    "before a step": before(Trainer, "_one_step"),
    "after backward": before(Trainer, "_update"),
    "between the weights and their average": before(Trainer, "_average"),
    "before an evaluation": before(Trainer, "evaluate"),
    "after an evaluation": after(Trainer, "evaluate"),
    "half a line of the log": around(RunDirectory, "log", half_a_line),
    "after a line of the log": after(RunDirectory, "log"),
    "before a checkpoint": before(checkpoint, "save"),
    "half a file of a checkpoint": half(checkpoint, "_write"),
    "before fsync": before(os, "fsync"),
    "before rename": before(os, "rename"),
    "after rename": after(os, "rename"),
    "while pruning": around(shutil, "rmtree", half_removed),
    "half a result, configuration or log": half(record, "write_whole"),
    "before replace": before(os, "replace"),
    "after replace": after(os, "replace"),
}


def at(point: str, number: int, action: Callable[[], object]) -> Callable[[], None]:
    """A change: act at the n-th time that a run comes to a point."""

    def change() -> None:
        remaining = number

        def hit() -> None:
            nonlocal remaining
            remaining -= 1
            if remaining == 0:
                action()

        POINTS[point](hit)

    return change


def send(*signals: int) -> Callable[[], None]:
    """An action: signals to this process."""
    return lambda: [os.kill(os.getpid(), number) for number in signals]


def count_hits(config: Config) -> dict[str, int]:
    """How often a run comes to each point, from its start to its end."""
    counts = dict.fromkeys(POINTS, 0)
    path = Path(config.output).with_suffix(".hits")

    def count(point: str) -> None:
        counts[point] += 1

    def action() -> None:
        for point, arm in POINTS.items():
            arm(lambda point=point: count(point))
        train(config)
        path.write_text(json.dumps(counts))

    assert forked(action) == 0
    return json.loads(path.read_text())


KILL = send(signal.SIGKILL)
