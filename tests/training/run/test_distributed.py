"""Two processes train one model: the same data, gradients and weights as one, and as safe to interrupt."""

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from tests.training.run.interrupting import (
    KINDS,
    Config,
    at,
    config_of,
    differences,
    outcome,
    run,
    send,
    start,
    train,
    wait,
)
from visionpos.training.run import checkpoint
from visionpos.training.run import distributed as machinery
from visionpos.training.run.distributed import Distributed, full_tensor
from visionpos.training.run.engine import Trainer
from visionpos.training.run.objective import Classification, MaskedImages
from visionpos.training.run.source import PictureSource

ROOT = Path(__file__).parents[3]
NOWHERE = Path(os.devnull)
NO_DROPOUT = ["--model.options.drop_path_rate", "0", "--model.options.proj_drop_rate", "0"]


def free_port() -> int:
    """Below those that the system gives to outgoing connections, which could take it before it is listened to."""
    for port in random.Random().sample(range(20_000, 32_000), 100):
        with socket.socket() as listener, suppress(OSError):
            listener.bind(("127.0.0.1", port))
            return port
    raise OSError("no free port")


def run_two(
    config: Config, *changes: Callable[[int], object], texts: tuple[Path, Path] = (NOWHERE, NOWHERE)
) -> list[int]:
    """The exit codes of two processes that train together; each makes the changes, that are told its rank."""
    port = free_port()

    def action(rank: int) -> None:
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        os.environ.update({key: str(value) for key, value in place.items()})
        for change in changes:
            change(rank)
        train(config)

    return [wait(child) for child in [start(lambda rank=rank: action(rank), texts[rank]) for rank in range(2)]]


def of_rank(rank: int, change: Callable[[], object]) -> Callable[[int], object]:
    return lambda own: change() if own == rank else None


def record_steps(folder: Path) -> Callable[[int], None]:
    """A change: leave the rows and the gradients of every step, as they were before clipping."""

    def change(rank: int) -> None:
        folder.mkdir(exist_ok=True)
        update, inputs = Trainer._update, []
        for objective in (Classification, MaskedImages):
            loss = objective.loss

            def recorded(self, forward, batch, step, distributed, loss=loss):
                inputs[:] = distributed.local_rows(batch)
                return loss(self, forward, batch, step, distributed)

            objective.loss = recorded

        def saving(self, loss):
            gradients = {
                name: full_tensor(each.grad).clone(memory_format=torch.contiguous_format)
                for name, each in self.model.named_parameters()
            }
            rows = {name: each.contiguous() for name, each in zip(("images", "targets"), inputs, strict=True)}
            save_file(gradients | rows | {"loss": loss}, folder / f"{self.step}-{rank}")
            update(self, loss)

        Trainer._update = saving

    return change


def vary_sizes(rank: int) -> None:
    """A change: pictures of another size in every other step."""
    batch = PictureSource.batch

    def resized(self, step):
        images, targets = batch(self, step)
        return F.interpolate(images, size=((8, 12), (16, 8))[step % 2]), targets

    PictureSource.batch = resized


def compare(kind: str, folder: Path, flags: list[str], vary: bool) -> dict[str, float]:
    """How far apart one process and two are in losses, gradients (shares of the largest, above 1) and weights."""
    flags, changes = [*NO_DROPOUT, *flags], [vary_sizes] if vary else []
    alone = [lambda change=change: change(0) for change in (*changes, record_steps(folder / "one's"))]
    assert run(config_of(kind, folder / "one", *flags, "--parallel", "ddp"), *alone) == 0
    assert run_two(config_of(kind, folder / "two", *flags), *changes, record_steps(folder / "two's")) == [0, 0]
    apart = {"steps": 0, "loss": 0.0, "gradient": 0.0}
    for step in range(checkpoint.load(folder / "one" / "checkpoints").step):
        one = load_file(folder / "one's" / f"{step}-0")
        two = [load_file(folder / "two's" / f"{step}-{rank}") for rank in range(2)]
        for name in ("images", "targets"):
            rows = one.pop(name)
            assert all(torch.equal(rows[rank::2], each.pop(name)) for rank, each in enumerate(two))
        assert all(torch.equal(two[0][name], two[1][name]) for name in one)
        apart["loss"] = max(apart["loss"], (one.pop("loss") - two[0]["loss"]).abs().item())
        largest = max(1.0, *(gradient.abs().max().item() for gradient in one.values()))
        apart["gradient"] = max(apart["gradient"], farthest(one, two[0]) / largest)
        apart["steps"] += 1
    one, two = (without_key_biases(folder / name / "checkpoints") for name in ("one", "two"))
    return apart | {"weights": farthest(one, two)}


def farthest(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    return max((value - other[name]).abs().max().item() for name, value in one.items())


def without_key_biases(folder: Path) -> dict[str, torch.Tensor]:
    """The final weights but those whose gradient is 0: AdamW makes whole steps of its rounding."""
    weights = checkpoint.load(folder).tensors["model"]
    for name, bias in weights.items():
        if name.endswith("qkv.bias"):
            bias.chunk(3)[1].zero_()
    return weights


SHARDED = ["--parallel", "fsdp"]
LOADED = ["--data.memory", "0", "--data.workers", "0", "--data.size", "[8, 12]", "--recipe.lr", "1e-3"]
SIZES = ["--model.options.dynamic_img_size", "true", "--encoding", "{name: rope_axial, extrapolate: false}"]


@pytest.mark.parametrize(
    ("kind", "flags", "vary"),
    [
        ("task", [], False),
        ("pictures", SIZES, True),
        ("mae", [], False),
        ("task", SHARDED, False),
        pytest.param("pictures", LOADED, False, marks=pytest.mark.slow),
        pytest.param("pictures", [*SHARDED, *SIZES], True, marks=pytest.mark.slow),
        pytest.param("mae", SHARDED, False, marks=pytest.mark.slow),
    ],
)
def test_two_processes_do_what_one_does(kind, flags, vary, fresh, tmp_path):
    apart = fresh(compare, kind, tmp_path, flags, vary)
    assert apart.pop("steps") >= 10
    assert max(apart.values()) < 1e-6, apart


def watch(folder: Path, text: Path) -> Callable[[int], None]:
    """A change: write down what a process that must not write opens for writing in the run."""

    def change(rank: int) -> None:
        def hook(event: str, args: tuple) -> None:
            writes = event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR)
            if (writes or event in ("os.mkdir", "os.rename")) and str(folder) in str(args[0]):
                with os.fdopen(os.open(text, os.O_WRONLY | os.O_APPEND | os.O_CREAT), "w") as file:
                    file.write(f"{rank} {event} {args[0]}\n")

        sys.addaudithook(hook)

    return change


def writers(folder: Path) -> set[str]:
    assert run_two(config_of("task", folder / "run"), watch(folder / "run", folder / "writes")) == [0, 0]
    assert json.loads((folder / "run" / "result.json").read_text())["processes"] == 2
    return {line.split()[0] for line in (folder / "writes").read_text().splitlines()}


def test_only_the_first_writes(fresh, tmp_path):
    assert fresh(writers, tmp_path) == {"0"}


def interrupt(folder: Path, kind: str, *flags: str) -> tuple[list[list[int]], list[str], float, list[str]]:
    """Two processes that are killed and stopped, both or one of them, and continued."""
    assert run_two(config_of(kind, folder / "whole", *flags)) == [0, 0]
    config, codes = config_of(kind, folder / "run", *flags), []
    stop, kill = send(signal.SIGTERM), send(signal.SIGKILL)
    changes = [
        of_rank(1, at("after backward", 3, kill)),
        of_rank(0, at("before fsync", 4, kill)),
        lambda rank: at("after backward", 2, stop)(),
        of_rank(1, at("after backward", 1, stop)),
    ]
    texts, said = (folder / "text of 0", folder / "text of 1"), []
    for change in changes:
        codes.append(run_two(config, change, texts=texts))
        said += [text.read_text() for text in texts]
    assert run_two(config) == [0, 0]
    return codes, said, differences(outcome(folder / "run"), outcome(folder / "whole"))


SLOW = [("task", []), ("mae", []), ("pictures", LOADED), ("task", SHARDED), ("pictures", SHARDED), ("mae", SHARDED)]


@pytest.mark.parametrize(
    ("kind", "flags"),
    [("pictures", []), *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW)],
)
def test_two_processes_are_killed_and_stopped_and_end_bit_identical(kind, flags, fresh, tmp_path):
    (first, second, third, fourth), said, different = fresh(interrupt, tmp_path, kind, *flags)
    assert first[1] == second[0] == -signal.SIGKILL, said
    assert 0 not in (first[0], second[1])
    assert third == fourth == [143, 143], said
    assert different == []


def change_hands(folder: Path) -> tuple[list[bool], float, str]:
    """A run that two processes share out, one continues alone and two end with the whole model each."""
    assert run(config_of("pictures", folder / "whole", *NO_DROPOUT)) == 0
    shared, alone = (config_of("pictures", folder / "run", *NO_DROPOUT, *flags) for flags in (SHARDED, []))
    stop, text = send(signal.SIGTERM), folder / "text"
    assert run_two(shared, lambda rank: at("after backward", 4, stop)()) == [143, 143]
    files = [checkpoint.load(folder / "run" / "checkpoints").tensors]
    assert run(alone, at("after backward", 3, stop), text=text) == 143
    files.append(checkpoint.load(folder / "run" / "checkpoints").tensors)
    assert run_two(alone) == [0, 0]
    forms = [
        {(kind, name, each.shape, each.dtype) for kind in file for name, each in file[kind].items()} for file in files
    ]
    one, other = (without_key_biases(folder / name / "checkpoints") for name in ("whole", "run"))
    return [forms[0] == forms[1], len(forms[0]) > 100], farthest(one, other), text.read_text()


def test_a_checkpoint_is_the_same_files_whoever_shares_the_model(fresh, tmp_path):
    forms, apart, text = fresh(change_hands, tmp_path)
    assert all(forms)
    assert apart < 1e-6
    assert "not to the last bit: processes (2 there, 1 now)\n" in text


def spoil(folder: Path) -> tuple[list[int], list[str]]:
    """A loss that is infinite in one process, with a gradient that is not."""

    def change() -> None:
        loss = Classification.loss
        Classification.loss = lambda self, f, batch, step, distributed: (
            loss(self, f, batch, step, distributed) + (torch.inf if step == 4 else 0)
        )

    texts = folder / "text of 0", folder / "text of 1"
    codes = run_two(config_of("task", folder / "run"), of_rank(1, change), texts=texts)
    return codes, [text.read_text() for text in texts]


def test_a_loss_that_is_not_finite_in_one_process_stops_both(fresh, tmp_path):
    codes, texts = fresh(spoil, tmp_path)
    assert codes == [4, 4]
    assert all("not finite at step 5 of 10" in text for text in texts)


def freeze(folder: Path) -> tuple[list[int], list[str], int]:
    """Two processes of which one stops in the middle of a step, and sleeps until the other has given up."""
    machinery.TIMEOUT = timedelta(seconds=5)

    def change() -> None:
        loss = Classification.loss
        Classification.loss = lambda self, f, batch, step, team: (
            time.sleep(15 if step == 5 else 0),
            loss(self, f, batch, step, team),
        )[1]

    texts = folder / "text of 0", folder / "text of 1"
    config = config_of("task", folder / "run")
    codes = run_two(config, of_rank(1, change), texts=texts)
    return codes, [text.read_text() for text in texts], checkpoint.load(folder / "run" / "checkpoints").step


@pytest.mark.slow
def test_a_frozen_process_ends_the_others_with_one_line(fresh, tmp_path):
    codes, texts, step = fresh(freeze, tmp_path)
    assert codes == [3, 3]
    for text in texts:
        assert text.count("error: ") == 1
        assert "Traceback" not in text
        assert "error: another process has ended, or does not answer for 5 s; run again to continue" in text
    assert 0 < step <= 5


def test_shares_are_equal_and_all_of_it():
    members = [object.__new__(Distributed) for _ in range(2)]
    for rank, distributed in enumerate(members):
        distributed.rank, distributed.size = rank, 2
    rows = torch.arange(8), torch.arange(16).view(8, 2)
    shares = [distributed.local_rows(rows) for distributed in members]
    assert [share[0].tolist() for share in shares] == [[0, 2, 4, 6], [1, 3, 5, 7]]
    assert torch.equal(torch.cat([share[1] for share in shares]).sort(0).values, rows[1])


def torchrun(folder: Path, *flags: str) -> subprocess.Popen:
    """The command under torchrun, two processes, of a run that takes a while."""
    config_of("pictures", folder / "run")  # writes the pictures and the file
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        "2",
        "--master-port",
        f"{free_port()}",
    ]
    command += ["-m", "train.classify", "--config", str(folder / "tiny.yaml"), *KINDS["pictures"][1], *flags]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )


def wait_for(path: Path, process: subprocess.Popen) -> None:
    while not path.exists():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.1)


def workers_of(process: subprocess.Popen) -> list[int]:
    return [int(number) for number in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]


@pytest.mark.slow
def test_torchrun_stops_resumes_and_ends_when_a_process_is_killed(tmp_path):
    long = ["--recipe.epochs", "400", "--recipe.eval_every", "100"]
    checkpoints = tmp_path / "run" / "checkpoints"
    flags = [*long, "--output", str(tmp_path / "run")]
    process = torchrun(tmp_path, *flags)
    wait_for(tmp_path / "run" / "log.jsonl", process)
    time.sleep(2)
    process.send_signal(signal.SIGTERM)
    _, error = process.communicate(timeout=300)
    assert process.returncode != 0
    stopped = max(checkpoints.iterdir()).name
    assert f"stopped by SIGTERM after step {int(stopped.removeprefix('step-'))}, which is saved" in error
    process = torchrun(tmp_path, *flags)
    while not checkpoints.exists() or max(checkpoints.glob("step-*")).name == stopped:
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.1)
    os.kill(workers_of(process)[-1], signal.SIGKILL)
    process.communicate(timeout=300)
    assert process.returncode != 0
    process = torchrun(tmp_path, *flags)
    assert (process.communicate(), process.returncode)[1] == 0
    process = torchrun(tmp_path, *long, "--output", str(tmp_path / "whole"))
    assert (process.communicate(), process.returncode)[1] == 0
    assert not differences(outcome(tmp_path / "run"), outcome(tmp_path / "whole"))
