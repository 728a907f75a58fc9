"""Sweeps that Ray trains: refused in one line where it cannot be, and the same runs to the bit where it can."""

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
from safetensors.torch import load_file

from tests.training.scripts.test_sweep import NAMES, SWEEP, final, start, states, wait_for, write, write_tuned
from train.sweep import command
from visionpos.training.errors import ConfigError, run_command
from visionpos.training.sweeps import plan as sweep_plan
from visionpos.training.sweeps import worker as sweep_worker

RAY = ["--engine", "ray"]


class RayError(Exception):
    """What Ray raises for a task whose process has died too often."""


class StandIn(ModuleType):
    """Ray's functions that a sweep uses, in this process: the oldest task is done when no more are handed over."""

    exceptions = SimpleNamespace(RayError=RayError)

    def __init__(self, *nodes: dict[str, float], dies: str = "nobody"):
        self.there, self.dies = nodes, dies
        self.options: list[dict] = []
        self.waited_with = 0
        self.tasks: list[list] = []  # of all that were handed over and have not ended, at each hand-over

    def init(self, **_):
        self.open: list[tuple] = []

    def nodes(self):
        return [{"Alive": True, "Resources": node} for node in self.there] + [
            {"Alive": False, "Resources": {"CPU": 64}}
        ]

    def cluster_resources(self):
        return {name: sum(node.get(name, 0) for node in self.there) for name in ("CPU", "GPU")}

    def remote(self, **options):
        self.options.append(options)
        return lambda function: SimpleNamespace(
            options=lambda name: SimpleNamespace(remote=lambda *arguments: self.hand_over(name, function, arguments))
        )

    def hand_over(self, name, function, arguments):
        self.open.append((name, function, arguments))
        self.tasks.append([each[0] for each in self.open])
        return len(self.tasks)

    def wait(self, tasks, num_returns, timeout):
        assert (num_returns, timeout) == (len(tasks), 0)
        ended = 1 if self.waited_with == len(self.tasks) else 0
        self.waited_with = len(self.tasks)
        return tasks[:ended], tasks[ended:]

    def get(self, task):
        name, function, arguments = self.open.pop(0)
        if name == self.dies:
            raise RayError("the worker died\nunexpectedly")
        return function(*arguments)


@pytest.fixture
def stand_in(monkeypatch):
    def install(*nodes, **options):
        ray = StandIn(*nodes, **options)
        monkeypatch.setattr("importlib.util.find_spec", lambda name: ray)
        monkeypatch.setitem(sys.modules, "ray", ray)
        monkeypatch.setattr(sweep_worker, "POLL_SECONDS", 0)
        monkeypatch.delenv("RAY_ADDRESS", raising=False)
        return ray

    return install


def test_the_runs_are_those_of_the_loop_and_no_more_are_handed_over_than_there_is_room_for(tmp_path, stand_in, capsys):
    flags = write(tmp_path)
    ray = stand_in({"CPU": 3}, {"CPU": 2})
    assert command([*flags, *RAY, "--cpus", "2", "--retries", "1"]) == []
    assert "learned-init_std=0.5-seed0: 2 of 4\n" in capsys.readouterr().out
    (options,) = ray.options
    assert (options["num_cpus"], options["num_gpus"], options["max_retries"]) == (2, 0, 1)
    assert ray.tasks == [NAMES[:1], NAMES[:2], NAMES[:3], NAMES[1:4]], "two that fit, and one that waits"
    assert states(flags, capsys) == dict.fromkeys(NAMES, "finished")
    command([*flags, "--output", str(tmp_path / "loop")])
    for name in NAMES:
        assert final(tmp_path / "runs" / name) == final(tmp_path / "loop" / name)


def test_a_run_that_ray_gives_up_is_recorded_and_stops_nothing(tmp_path, stand_in, capsys):
    flags = write(tmp_path)
    stand_in({"CPU": 1}, dies=NAMES[1])
    (failed,) = command([*flags, *RAY])
    assert failed.error["error"] == "RayError: the worker died unexpectedly"
    assert states(flags, capsys) == {name: "failed" if name == NAMES[1] else "finished" for name in NAMES}


def test_settings_of_trials_are_asked_for_when_there_is_room(tmp_path, stand_in, monkeypatch):
    pytest.importorskip("optuna")
    flags = write_tuned(tmp_path, "tune: {ranges: {recipe.lr: [1e-4, 1e-2]}, trials: 3, validation: 6}")
    ray = stand_in({"CPU": 1})
    asked, propose = [], sweep_plan.Search.propose
    monkeypatch.setattr(
        sweep_plan.Search, "propose", lambda self, outcome: (asked.append(len(ray.open)), propose(self, outcome))
    )
    assert command([*flags, *RAY]) == []
    assert len(asked) == 6
    assert max(asked) == 1, "one is trained, and one waits"


MISTAKES = [
    (["--cpus", "2"], "--cpus: 2 given, but --engine loop has no use for it; accepted with --engine ray"),
    (["--gpus", "0.5"], "--gpus: 0.5 given, but --engine loop has no use for it"),
    (["--engine", "loop", "--retries", "0"], "--retries: 0 given, but --engine loop has no use for it"),
    (["--engine", "slurm"], "--engine: invalid choice: 'slurm'"),
    ([*RAY, "--cpus", "1.5"], "--cpus: 1.5 given; accepted: a whole number from 1, or a share of one above 0"),
    ([*RAY, "--cpus", "0"], "--cpus: 0 given"),
    ([*RAY, "--cpus", "nan"], "--cpus: nan given"),
    ([*RAY, "--gpus", "2"], "--gpus: 2 given; accepted: from 0 to 1, as a run is one process on one GPU"),
    ([*RAY, "--retries", "-1"], "--retries: -1 given; accepted: a whole number from 0"),
    ([*RAY, "--retries", "1.5"], "--retries: invalid int value: '1.5'"),
    (
        [*RAY, "--device", "cuda:1"],
        "device: 'cuda:1' given, but Ray chooses the GPU of a run; accepted: auto",
    ),
]


@pytest.mark.parametrize(("flags", "line"), MISTAKES)
def test_what_one_engine_has_no_use_for_is_one_line_and_leaves_nothing(flags, line, tmp_path, capsys):
    assert run_command(lambda: command([*write(tmp_path), *flags])) == 2
    error = capsys.readouterr().err
    assert line in error
    assert error.count("\n") == 1
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("nodes", "flags", "line"),
    [
        ([{"CPU": 2}, {"CPU": 3}], ["--cpus", "4"], "--cpus: 4 given; accepted: at most 3, which a node here has"),
        ([{"CPU": 2}], ["--gpus", "0.5"], "--gpus: 0.5 given; accepted: at most 0"),
        ([{"CPU": 2, "GPU": 1}], ["--device", "auto"], "--gpus: 0 given, but there are GPUs; accepted: above 0"),
    ],
)
def test_what_no_node_has_is_one_line_and_leaves_nothing(nodes, flags, line, tmp_path, stand_in):
    stand_in(*nodes)
    with pytest.raises(ConfigError, match=line):
        command([*write(tmp_path), *RAY, *flags])
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("address", ["127.0.0.1:1", "ray://127.0.0.1:1", "127.0.0.1:many"])
def test_a_cluster_that_does_not_answer_is_one_line(address, tmp_path, stand_in, monkeypatch, capsys):
    stand_in({"CPU": 1})
    monkeypatch.setenv("RAY_ADDRESS", address)
    assert run_command(lambda: command([*write(tmp_path), *RAY])) == 2
    error = capsys.readouterr().err
    assert f"--engine: ray given, but no cluster of Ray's answers (RAY_ADDRESS: {address})" in error
    assert error.count("\n") == 1
    assert not (tmp_path / "runs").exists()


def test_without_ray_the_loop_works_and_the_engine_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setitem(sys.modules, "ray", None)
    flags = write(tmp_path)
    with pytest.raises(
        ConfigError, match=r"--engine: ray given, but Ray is not installed \(pip install 'visionpos\[ray"
    ):
        command([*flags, *RAY])
    assert states([*flags, *RAY], capsys) == dict.fromkeys(NAMES, "waiting")
    assert command(flags) == []


@pytest.fixture
def cluster(monkeypatch):
    """Ray on this machine: two nodes of one core each, beside a head that trains nothing."""
    pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    monkeypatch.setenv("RAY_ADDRESS", made.address)
    yield made, [made.add_node(num_cpus=1) for _ in range(2)]
    made.shutdown()


def parent(process: int) -> int:
    return int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])


def weights(run: Path) -> dict:
    files = sorted(max((run / "checkpoints").glob("step-*")).glob("*.safetensors"))
    assert [file.stem for file in files] == ["ema", "model", "optimizer"]
    return {(file.stem, name): value for file in files for name, value in load_file(file).items()}


@pytest.mark.slow
def test_a_node_is_killed_and_every_run_ends_once_with_the_bits_of_the_loop(cluster, tmp_path):
    nodes, long = cluster[1], ["--recipe.steps", "600", "--recipe.eval_every", "50", "--threads", "1"]
    flags = [*write(tmp_path, sweep=SWEEP), *long]
    run = tmp_path / "runs" / NAMES[0]
    sweep = start([*flags, *RAY])
    wait_for(lambda: any((run / "checkpoints").glob("step-*")) or sweep.poll() is not None)
    trainer = int((run / "lock.holder").read_text().split()[1])
    killed = next(node for node in nodes if node.all_processes["raylet"][0].process.pid == parent(trainer))
    cluster[0].remove_node(killed, allow_graceful=False)
    assert not (run / "result.json").exists(), "it was killed too late"
    out, errors = sweep.communicate(timeout=300)
    assert sweep.returncode == 0, errors
    assert "all runs are finished" in out
    assert int((run / "lock.holder").read_text().split()[1]) != trainer
    command([*flags, "--output", str(tmp_path / "loop")])
    for name in NAMES:
        ours, theirs = (tmp_path / folder / name for folder in ("runs", "loop"))
        steps = [line.split('"step": ')[1].split(",")[0] for line in (ours / "log.jsonl").read_text().splitlines()]
        assert steps == [str(step) for step in range(50, 601, 50)]
        assert final(ours) == final(theirs)
        one, other = weights(ours), weights(theirs)
        assert one.keys() == other.keys()
        assert all(one[key].equal(other[key]) for key in one)
        assert not (ours / "error.json").exists()
