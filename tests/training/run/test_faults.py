"""What goes wrong around a run: full disks, odd paths, two runs in one place, another machine."""

import os
import resource
import shutil
import signal
import socket
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.autograd import DeviceType

from tests.training.run.interrupting import (  # fmt: skip
    at,
    config_of,
    differences,
    forked,
    outcome,
    run,
    send,
    start,
    train,
    wait,
)
from tests.training.tiny_run import task_config
from visionpos.training.errors import ConfigError, run_command
from visionpos.training.run import checkpoint, classification, loop
from visionpos.training.run.distributed import Distributed
from visionpos.training.run.engine import Trainer
from visionpos.training.run.profile import PHASES, host_time, kernel_time
from visionpos.training.run.record import RunDirectory

STOP = at("after backward", 3, send(signal.SIGTERM))


def fill_the_disk(folder: Path, sizes: list[int]) -> list[tuple[int, str, int, list[str]]]:
    """Runs that are stopped at step 3, continued with files of at most some bytes, and then without that limit."""
    assert run(config_of("task", folder / "whole")) == 0
    assert run(config_of("task", folder / "stopped"), STOP) == 143
    whole, found = outcome(folder / "whole"), []
    for size in sizes:
        shutil.copytree(folder / "stopped", folder / f"{size}")
        config, text = config_of("task", folder / f"{size}"), folder / f"{size}.txt"
        os.mkfifo(text)  # for the limit is not on what a run says
        said = os.open(text, os.O_RDWR | os.O_NONBLOCK)
        code = run(config, lambda size=size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size)), text=text)
        last = os.read(said, 2**16).decode().partition("continuing after step 3 of 10\n")[2]
        os.close(said)
        names = [path.name for path in (folder / f"{size}" / "checkpoints").iterdir()]
        assert all(name.startswith("step-") for name in names), names
        step = checkpoint.load(folder / f"{size}" / "checkpoints").step
        assert run(config) == 0
        found.append((code, last, step, differences(outcome(folder / f"{size}"), whole)))
    return found


SIZES = [300, 1500, 2500, 9_000, 20_000, 40_000]


@pytest.mark.parametrize("sizes", [SIZES, pytest.param(range(400, 50_000, 1000), marks=pytest.mark.slow)])
def test_a_full_disk_is_one_line_and_costs_nothing(sizes, fresh, tmp_path):
    for size, (code, text, step, different) in zip(sizes, fresh(fill_the_disk, tmp_path, list(sizes)), strict=True):
        assert code in (2, 3), size
        start, *progress, error = text.splitlines()  # what it trains, then why no more
        assert start.startswith(f"{tmp_path}"), text
        assert error.startswith("error: "), text
        assert "File too large" in error, size
        assert all(line.startswith("step ") for line in progress), text
        assert step >= 3
        assert different == [], size


def test_places_that_cannot_be_written_are_one_line(tmp_path, capsys):
    (tmp_path / "file").touch()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoints").touch()
    for place, code in ((tmp_path / "file", 2), (tmp_path / "file" / "run", 2), (tmp_path / "run", 3)):
        config = config_of("task", place) if place.parent.is_dir() else task_config(tmp_path, "--output", str(place))
        assert run_command(lambda config=config: train(config)) == code
        error = capsys.readouterr().err
        assert error.startswith("error: ")
        assert error.count("\n") == 1
        assert str(place) in error


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser may write anywhere")
def test_a_read_only_place_is_one_line(tmp_path, capsys):
    config = config_of("task", tmp_path / "closed" / "run")
    (tmp_path / "closed").chmod(0o500)
    assert run_command(lambda: train(config)) == 2
    assert capsys.readouterr().err.startswith("error: output: cannot write to ")


def move(folder: Path, name: str) -> list[str]:
    """A run that is stopped, moved to a place of that name, and continued there."""
    assert run(config_of("task", folder / "whole")) == 0
    assert run(config_of("task", folder / "here"), STOP) == 143
    os.rename(folder / "here", folder / name)
    assert run(config_of("task", folder / name)) == 0
    return differences(outcome(folder / name), outcome(folder / "whole"))


@pytest.mark.parametrize("name", ["Läufe mit 'Lücken' und [Größe] 日本 🙂", "x" * 200])
def test_a_run_may_be_moved_to_any_place(name, fresh, tmp_path):
    assert fresh(move, tmp_path, name) == []


def continue_otherwise(folder: Path, *flags: str) -> list[str]:
    """A run whose log interval changes when it is continued, and that is evaluated more often than it says."""
    assert run(config_of("pictures", folder / "whole")) == 0
    config = config_of("pictures", folder / "run", "--log_every", "1")
    assert run(config, at("after backward", 5, send(signal.SIGTERM))) == 143
    assert run(config_of("pictures", folder / "run", "--log_every", "7"), evaluate_often) == 0
    return differences(outcome(folder / "run", ("log_every",)), outcome(folder / "whole", ("log_every",)))


def evaluate_often() -> None:
    advance, evaluate = Trainer.advance, Trainer.evaluate
    Trainer.advance = lambda self, steps: (evaluate(self), advance(self, steps))[1]
    Trainer.evaluate = lambda self: (evaluate(self), evaluate(self))[1]


def test_neither_the_log_interval_nor_evaluations_change_a_run(fresh, tmp_path):
    assert fresh(continue_otherwise, tmp_path) == []


def continue_elsewhere(folder: Path) -> tuple[str, str]:
    """What a run says that is continued as it began, and with another number of threads."""
    texts = []
    for threads in (1, 2):
        config, text = config_of("task", folder / f"{threads}"), folder / f"{threads}.txt"
        assert run(config, STOP) == 143
        assert run(config, lambda threads=threads: torch.set_num_threads(threads), text=text) == 0
        texts.append(text.read_text())
    return tuple(texts)


def test_another_number_of_threads_is_said_once(fresh, tmp_path):
    same, other = fresh(continue_elsewhere, tmp_path)
    assert "warning" not in same
    assert other.count("warning") == 1
    assert "not to the last bit: threads (1 there, 2 now)\n" in other


def test_ctrl_c_where_nothing_is_trained_yet_is_one_line(capsys):
    def interrupt() -> None:
        raise KeyboardInterrupt

    assert run_command(interrupt) == 130
    assert capsys.readouterr().err == "stopped by SIGINT\n"


def test_muon_needs_whole_matrices(tmp_path):
    with pytest.raises(ConfigError, match="parallel: fsdp given; accepted with recipe.optimizer muon, .*: ddp"):
        config_of("task", tmp_path / "run", "--parallel", "fsdp", "--recipe.optimizer", "muon")


@pytest.mark.parametrize(
    ("flags", "processes", "line"),
    [
        (["--parallel", "fsdp"], 1, "parallel: fsdp given, but this is one process; accepted: torchrun with 2 or more"),
        (["--compile", "graphs"], 1, "compile: graphs given; accepted on this device (cpu): auto, on, off"),
        (["--device", "cuda:1"], 2, "device: 'cuda:1' given; accepted under torchrun: auto, cpu, cuda"),
        (["--recipe.batch_size", "9"], 2, "recipe.batch_size: 9 given; accepted: a multiple of the 2 processes"),
    ],
)
def test_what_these_processes_cannot_do_is_one_line_and_writes_nothing(
    flags, processes, line, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(loop, "Distributed", lambda device: processes_of(processes))
    monkeypatch.setattr(loop, "pick_device", torch.device)
    if "--compile" not in flags:
        monkeypatch.setattr(classification, "check_model", lambda config: pytest.fail("a model was built"))
    config = config_of("task", tmp_path / "run", *flags)
    assert run_command(lambda: train(config)) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {line}")
    assert error.count("\n") == 1
    assert not (tmp_path / "run").exists()


def processes_of(size: int) -> Distributed:
    """The first of that many processes, without the others."""
    distributed = object.__new__(Distributed)
    distributed.size, distributed.rank, distributed.device = size, 0, torch.device("cpu")
    return distributed


def test_a_checkpoint_of_another_version_is_one_line(tmp_path, capsys):
    config = config_of("task", tmp_path / "run")
    checkpoint.save(tmp_path / "run" / "checkpoints", 2, {"model": {"weight": torch.ones(2)}}, {"step": 2})
    assert run_command(lambda: train(config)) == 3
    assert "the checkpoint of step 2 was saved by another version" in capsys.readouterr().err


def holding(ready: int, go: int) -> Callable[[], None]:
    """A change: tell when training begins, and wait to be let go on."""

    def change() -> None:
        one_step, steps = Trainer._one_step, []

        def waiting(self):
            if not steps:
                os.write(ready, b".")
                os.read(go, 1)
            steps.append(1)
            return one_step(self)

        Trainer._one_step = waiting
        signal.alarm(120)

    return change


def second_run(folder: Path) -> tuple[int, int, str, list[str]]:
    """A run while another one trains in its directory, and after that one has been killed."""
    config, text = config_of("task", folder / "run"), folder / "text"
    (ready, said), (go, _) = os.pipe(), os.pipe()
    holder = start(lambda: (holding(said, go)(), train(config)))
    os.read(ready, 1)
    code = run(config, text=text)
    os.kill(holder, signal.SIGKILL)
    assert wait(holder) == -signal.SIGKILL
    assert run(config) == run(config_of("task", folder / "whole")) == 0
    return holder, code, text.read_text(), differences(outcome(folder / "run"), outcome(folder / "whole"))


def test_a_second_run_in_a_directory_is_refused_until_the_first_is_gone(fresh, tmp_path):
    holder, code, text, different = fresh(second_run, tmp_path)
    assert code == 2
    assert text.count("\n") == 1
    assert f"run is in use by pid {holder} on {socket.gethostname()}; choose another --output" in text
    assert different == []


def race(folder: Path, rounds: int) -> list[list[int]]:
    """The exit codes of four runs started at once in one directory, the winner waiting for the others."""
    codes = []
    for number in range(rounds):
        config = config_of("task", folder / f"{number}")
        (ready, said), (go, let_go) = os.pipe(), os.pipe()
        for _ in range(4):
            start(lambda config=config, said=said, go=go: (holding(said, go)(), train(config)))
        os.read(ready, 1)
        codes.append([os.waitstatus_to_exitcode(os.waitpid(-1, 0)[1]) for _ in range(3)])
        os.write(let_go, b".")
        codes[-1].append(os.waitstatus_to_exitcode(os.waitpid(-1, 0)[1]))
    return codes


@pytest.mark.parametrize("rounds", [2, pytest.param(20, marks=pytest.mark.slow)])
def test_of_four_runs_started_at_once_one_trains(rounds, fresh, tmp_path):
    assert fresh(race, tmp_path, rounds) == [[2, 2, 2, 0]] * rounds


def test_a_run_that_appears_between_the_look_and_the_lock_is_not_continued_as_another(tmp_path):
    first, second = (RunDirectory(task_config(tmp_path, "--recipe.lr", lr)) for lr in ("1e-3", "2e-3"))
    first.begin(0)
    first.close()
    with (
        pytest.raises(ConfigError, match=r"holds another run: recipe.lr"),
        second.locked(Distributed(torch.device("cpu"))),
    ):
        pass


def profile(folder: Path) -> tuple[int, str]:
    text = folder / "text"
    config = config_of("pictures", folder / "run", "--profile", "2")
    return forked(lambda: train(config), text), text.read_text()


def test_a_profile_says_where_the_time_goes_and_trains_nothing(fresh, tmp_path):
    code, text = fresh(profile, tmp_path)
    assert code == 0
    head, recorded, *parts = text[text.index("a step: ") :].splitlines()[:6]  # torch's profiler has lines of its own
    assert "ms" in head
    assert "images per second" in head
    assert "ERROR" not in text
    whole = float(recorded.removeprefix("a recorded step: ").partition(" ms")[0])
    assert 0 < sum(float(line.split()[1]) for line in parts) <= whole, "parts of the same pass"
    assert [line.split()[0] for line in parts] == ["batch", "forward", "backward", "update"]
    shares = [float(line.split()[-1].rstrip("%")) for line in parts]
    assert sum(shares) == pytest.approx(100, abs=0.3)
    assert not (tmp_path / "run").exists()


def test_a_profile_on_a_gpu_counts_every_kernel_once():
    """There each part has a second event, the device's annotation, and operations carry the time of their kernels."""

    def event(key, kind, host, device, annotation=False):
        times = {"cpu_time_total": host, "self_device_time_total": device}
        return SimpleNamespace(key=key, device_type=kind, is_user_annotation=annotation, **times)

    cpu, cuda = DeviceType.CPU, DeviceType.CUDA
    events = [event(name, cpu, 2000.0, 0.0, True) for name in PHASES] + [event("aten::mm", cpu, 90.0, 700.0)]
    events += [event(name, cuda, 0.0, 900.0, True) for name in PHASES] + [event("gemm", cuda, 0.0, 700.0)]
    assert host_time(events) == dict.fromkeys(PHASES, 2.0)
    assert kernel_time(events) == 0.7
