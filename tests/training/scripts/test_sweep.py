"""Sweeps: every run once, whatever workers do; settings chosen without the test pictures; one line for a mistake."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import timm

import visionpos.training.data.datasets
import visionpos.training.sweeps.plan
from tests.training.scripts.test_pretrain_mae import pretrain_config
from tests.training.tiny_run import PICTURES, write_pictures
from train.sweep import command, main
from visionpos.training.config.command_line import parse
from visionpos.training.errors import ConfigError, Interrupted, NonFiniteError, run_command
from visionpos.training.reports.collect import find_runs, group_runs
from visionpos.training.run import classification, pretraining
from visionpos.training.sweeps import worker as sweep_worker
from visionpos.training.sweeps.plan import open_plan
from visionpos.training.sweeps.worker import Worker

ROOT = Path(__file__).parents[3]
SWEEPS = sorted((ROOT / "configs" / "sweep").glob("*.yaml"))
TASK = """
model:
  name: vit_tiny_patch16_224
  options: {patch_size: 4, embed_dim: 16, depth: 1, num_heads: 2, mlp_ratio: 1, class_token: false, global_pool: avg}
data: {name: locate, grid: [2, 4]}
recipe: {steps: 4, eval_every: 2, batch_size: 4, ema_decay: 0.9}
device: cpu
"""
SWEEP = "run: base.yaml\nencodings: [none, {name: learned, init_std: 0.5}]\nseeds: [0, 3]\n"
NAMES = ["none-seed0", "learned-init_std=0.5-seed0", "none-seed3", "learned-init_std=0.5-seed3"]


def write(folder, extra="", base=TASK, sweep=SWEEP):
    """A sweep of four tiny runs; returns its flags."""
    (folder / "base.yaml").write_text(base)
    (folder / "tiny.yaml").write_text(sweep + extra)
    return [str(folder / "tiny.yaml"), "--output", str(folder / "runs")]


def write_tuned(folder, extra):
    """A sweep over pictures of 8 x 12 pixels, tuned on 6 of the 30."""
    write_pictures(folder / "pictures")
    sweep = "run: base.yaml\nencodings: [none, sincos2d]\nseeds: [0, 1]\n"
    base = PICTURES.replace("FOLDER", str(folder / "pictures")).replace("epochs: 3", "epochs: 1")
    return write(folder, extra, base, sweep)


def start(flags):
    return subprocess.Popen(
        [sys.executable, "-m", "train.sweep", *flags],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def wait_for(condition, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never happened"
        time.sleep(0.02)


def final(path):
    return json.loads((path / "result.json").read_text())["final"]


def states(flags, capsys):
    capsys.readouterr()
    command([*flags, "--dry-run"])
    return {line.split()[1]: line.split()[0] for line in capsys.readouterr().out.splitlines()}


def test_every_run_is_that_of_classify_and_is_done_once(tmp_path, capsys, monkeypatch):
    flags = write(tmp_path)
    assert states(flags, capsys) == dict.fromkeys(NAMES, "waiting")
    assert not (tmp_path / "runs").exists()
    trained = []
    monkeypatch.setattr(sweep_worker, "train", lambda config: trained.append(config) or classification.train(config))
    assert command([*flags, "--recipe.steps", "6"]) == []
    assert [Path(config.output).name for config in trained] == NAMES
    assert {config.recipe.steps for config in trained} == {6}
    alone = ["--config", str(tmp_path / "base.yaml"), "--recipe.steps", "6", "--seed", "3"]
    alone += ["--encoding", "{name: learned, init_std: 0.5}", "--output", str(tmp_path / "alone")]
    assert classification.train(parse(alone))["final"] == final(tmp_path / "runs" / NAMES[3])
    assert states([*flags, "--recipe.steps", "6"], capsys) == dict.fromkeys(NAMES, "finished")
    command([*flags, "--recipe.steps", "6"])
    assert len(trained) == 4


def test_two_workers_share_the_runs(tmp_path):
    flags = write(tmp_path, sweep=SWEEP.replace("[0, 3]", "[0, 1, 2]"))
    workers = [start(flags), start(flags)]
    printed = [worker.communicate(timeout=200) for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0], printed
    done = [line.split(": ")[0] for out, _ in printed for line in out.splitlines() if ": accuracy" in line]
    assert len(done) == len(set(done)) == 6
    assert all("all runs are finished" in out for out, _ in printed)
    assert not any(errors for _, errors in printed)


def kill_at_a_checkpoint(flags, run, step):
    """Start a worker, and kill it as soon as a run has a checkpoint of that step, or a later one."""
    worker = start(flags)
    wait_for(
        lambda: (
            any(path.name >= f"step-{step:08d}" for path in (run / "checkpoints").glob("step-*"))
            or worker.poll() is not None
        )
    )
    worker.send_signal(signal.SIGKILL)
    return worker.communicate()


def test_the_run_of_a_killed_worker_is_taken_up_by_one_that_waits(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sweep_worker, "POLL_SECONDS", 0.1)
    long = ["--recipe.steps", "200", "--recipe.eval_every", "20"]
    flags = [*write(tmp_path, sweep=SWEEP.replace("[0, 3]", "[0]")), *long]
    run = tmp_path / "runs" / NAMES[0]
    worker = start(flags)
    wait_for(lambda: any((run / "checkpoints").glob("step-*")))
    worker.send_signal(signal.SIGSTOP)
    assert states(flags, capsys)[NAMES[0]] == "running"
    took = []

    def traced(config):
        took.append(Path(config.output).name)
        if took[-1] == NAMES[1]:
            worker.send_signal(signal.SIGKILL)  # the other run is being trained at this moment
            worker.communicate()
            assert states(flags, capsys) == {NAMES[0]: "begun", NAMES[1]: "running"}
        return classification.train(config)

    monkeypatch.setattr(sweep_worker, "train", traced)
    assert command(flags) == []
    assert took == [NAMES[1], NAMES[0]]
    steps = [json.loads(line)["step"] for line in (run / "log.jsonl").read_text().splitlines()]
    assert steps == list(range(20, 201, 20))
    assert not (run / "error.json").exists()
    alone = ["--config", str(tmp_path / "base.yaml"), "--output", str(tmp_path / "alone"), *long]
    assert classification.train(parse(alone))["final"] == final(run)


@pytest.mark.slow
def test_many_kills_leave_nothing_behind(tmp_path):
    long = ["--recipe.steps", "400", "--recipe.eval_every", "20"]
    flags, whole = [*write(tmp_path), *long], [*write(tmp_path), "--output", str(tmp_path / "whole"), *long]
    for kill in range(12):
        name, step = NAMES[kill // 3], 20 * (1 + 6 * (kill % 3))
        kill_at_a_checkpoint(flags, tmp_path / "runs" / name, step)
    workers = [start(flags), start(whole)]
    assert [worker.wait(300) for worker in workers] == [0, 0]
    for name in NAMES:
        assert final(tmp_path / "runs" / name) == final(tmp_path / "whole" / name)
        lines = (tmp_path / "runs" / name / "log.jsonl").read_text().splitlines()
        assert [json.loads(line)["step"] for line in lines] == list(range(20, 401, 20))


def test_a_failure_is_recorded_stops_nothing_and_is_tried_again_by_a_new_worker(tmp_path, capsys, monkeypatch):
    flags, tried = write(tmp_path), []

    def failing(config):
        tried.append(Path(config.output).name)
        if tried[-1] == NAMES[1]:
            raise NonFiniteError("the loss is nan\nat step 3")
        return classification.train(config)

    monkeypatch.setattr(sweep_worker, "train", failing)
    monkeypatch.setattr(sys, "argv", ["sweep", *flags])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 1
    captured = capsys.readouterr()
    assert captured.err.count("NonFiniteError: the loss is nan at step 3\n") == 2  # when it happened, and at the end
    assert "1 runs failed" in captured.out
    assert sorted(tried) == sorted(NAMES)
    assert states(flags, capsys) == {name: "failed" if name == NAMES[1] else "finished" for name in NAMES}
    assert command(flags)[0].path.name == NAMES[1]
    assert tried[4:] == [NAMES[1]]
    monkeypatch.undo()
    assert command(flags) == []
    assert not (tmp_path / "runs" / NAMES[1] / "error.json").exists()


def test_a_failure_is_left_alone_by_workers_that_saw_it_happen(tmp_path, monkeypatch):
    plan = open_plan(Path(write(tmp_path)[0]), [], str(tmp_path / "runs"), None)
    other = Worker(plan)
    monkeypatch.setattr(sweep_worker, "perform", lambda job: (_ for _ in ()).throw(OSError("disk full")))
    assert len(Worker(plan).run()) == 4
    monkeypatch.setattr(sweep_worker, "perform", lambda job: pytest.fail("tried again"))
    assert len(other.run()) == 4


@pytest.mark.parametrize("stop", [KeyboardInterrupt(), Interrupted(15, "stopped")])
def test_an_interruption_is_not_a_failure(stop, tmp_path, monkeypatch):
    flags = write(tmp_path)
    monkeypatch.setattr(sweep_worker, "train", lambda config: (_ for _ in ()).throw(stop))
    with pytest.raises(type(stop)):
        command(flags)
    assert not list((tmp_path / "runs").glob("*/error.json"))


def test_fields_vary_in_every_combination_and_runs_are_evaluated(tmp_path, capsys):
    extra = "vary: {recipe.steps: [2, 4], recipe.lr: [1e-3]}\nevaluate: {sizes: [16x24]}\n"
    flags = write(tmp_path, extra, sweep="run: base.yaml\nencodings: [none, rope_axial]\nseeds: [0]\n")
    assert command(flags) == []
    runs = sorted(path.parent.name for path in (tmp_path / "runs").glob("*/result.json"))
    assert runs == [
        f"{encoding}-recipe.steps={steps}-recipe.lr=0.001-seed0"
        for encoding in ("none", "rope_axial")
        for steps in (2, 4)
    ]
    for run in runs:
        folder = tmp_path / "runs" / run
        assert json.loads((folder / "result.json").read_text())["steps"] == int(run.split("steps=")[1][0])
        for name, coordinates in (("evaluate", "interpolated"), ("evaluate_extrapolated", "extrapolated")):
            report = json.loads((folder / f"{name}.json").read_text())
            assert report["coordinates"] == coordinates
            assert [16, 24] in [row["size"] for row in report["rows"]]
    assert json.loads((tmp_path / "runs" / "sweep.json").read_text())["vary"] == ["recipe.steps", "recipe.lr"]


def test_a_grid_is_tried_for_each_encoding_before_any_test_picture_is_seen(tmp_path, capsys, monkeypatch):
    flags = write_tuned(tmp_path, "tune: {grid: {recipe.lr: [1e-5, 5e-3], recipe.flip: [true, false]}, validation: 6}")
    loaded, load = [], visionpos.training.run.source.load_pictures
    monkeypatch.setattr(
        visionpos.training.run.source,
        "load_pictures",
        lambda name, split, *args, **kw: loaded.append(split) or load(name, split, *args, **kw),
    )
    dry = states(flags, capsys)
    assert len(dry) == 2 * 4 + 4
    assert set(dry.values()) == {"waiting"}
    assert command(flags) == []
    assert loaded[:8] == ["train"] * 8
    assert loaded.count("test") == 4
    for encoding in ("none", "sincos2d"):
        folder = tmp_path / "runs" / "tune" / encoding
        best = json.loads((folder / "best.json").read_text())
        accuracies = [final(folder / f"trial-{number:02d}")["validation"] for number in range(4)]
        assert [trial["accuracy"] for trial in best["trials"]] == accuracies
        assert best["trial"] == accuracies.index(max(accuracies))
        for seed in (0, 1):
            config = json.loads((tmp_path / "runs" / f"{encoding}-seed{seed}" / "result.json").read_text())["config"]
            assert {"recipe.lr": config["recipe"]["lr"], "recipe.flip": config["recipe"]["flip"]} == best["settings"]
            assert config["data"]["validation"] == 0
        for number in range(4):
            config = json.loads((folder / f"trial-{number:02d}" / "result.json").read_text())["config"]
            assert (config["seed"], config["data"]["validation"]) == (1000, 6)


def test_optuna_chooses_as_many_settings_for_each_encoding(tmp_path, capsys):
    optuna = pytest.importorskip("optuna")
    extra = "tune: {ranges: {recipe.lr: [1e-4, 1e-2], recipe.weight_decay: [1e-3, 1]}, trials: 4, validation: 6}"
    flags = write_tuned(tmp_path, extra)
    assert set(states(flags, capsys).values()) == {"waiting"}
    assert not (tmp_path / "runs").exists()
    assert command([*flags, "--storage", str(tmp_path / "elsewhere" / "journal")]) == []
    backend = optuna.storages.journal.JournalFileBackend(str(tmp_path / "elsewhere" / "journal"))
    storage = optuna.storages.JournalStorage(backend)
    studies = {name: optuna.load_study(study_name=name, storage=storage) for name in ("none", "sincos2d")}
    for name, study in studies.items():
        assert len(study.trials) == 4
        best = json.loads((tmp_path / "runs" / "tune" / name / "best.json").read_text())
        assert best["settings"] == study.trials[best["trial"]].params
        for trial, row in zip(study.trials, best["trials"], strict=True):
            assert 1e-4 <= row["recipe.lr"] <= 1e-2
            assert 1e-3 <= row["recipe.weight_decay"] <= 1
            assert trial.value in (row["accuracy"], None)
    first, second = ([trial.params for trial in study.trials] for study in studies.values())
    assert first[:2] == second[:2]  # drawn at random, alike for every encoding
    assert len({str(params) for params in first}) == 4
    for content in (None, ""):  # a journal that is gone, or empty, while all is finished
        (tmp_path / "elsewhere" / "journal").unlink(missing_ok=True)
        if content is not None:
            (tmp_path / "elsewhere" / "journal").write_text(content)
        after = [*flags, "--storage", str(tmp_path / "elsewhere" / "journal")]
        assert set(states(after, capsys).values()) == {"finished"}
        assert command(after) == []


@pytest.mark.parametrize("content", ['{"a": 1}\n', '{"op_code": 0, "worker', "\x00\x01", "[]\n"])
def test_a_journal_that_is_none_is_one_line_and_says_what_to_do(content, tmp_path):
    pytest.importorskip("optuna")
    flags = write_tuned(tmp_path, "tune: {ranges: {recipe.lr: [1e-4, 1e-2]}, trials: 2, validation: 6}")
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "optuna.journal").write_text(content)
    for dry in (["--dry-run"], []):
        with pytest.raises(
            ConfigError, match=r"--storage: \S+ is no journal that Optuna can use \(remove its last line"
        ):
            command([*flags, *dry])
    assert (tmp_path / "runs" / "optuna.journal").read_text() == content


def test_settings_of_trials_hold_for_trials_alone(tmp_path):
    flags = write_tuned(tmp_path, "tune: {grid: {recipe.lr: [1e-3]}, settings: {recipe.epochs: 2}, validation: 6}")
    plan = open_plan(Path(flags[0]), [], flags[2], None)
    jobs = list(plan.jobs(lambda job: True))
    epochs = {job.path.parent.parent.name: job.config.recipe.epochs for job in jobs if job.config}
    assert epochs["tune"] == 2
    assert plan.cells[0].config({}, 0, tmp_path).recipe.epochs == 1


def test_without_optuna_a_grid_works_and_ranges_are_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setitem(sys.modules, "optuna", None)
    flags = write_tuned(tmp_path, "tune: {ranges: {recipe.lr: [1e-4, 1e-2]}, trials: 2, validation: 6}")
    with pytest.raises(ConfigError, match=r"tune.ranges: Optuna .* is not installed"):
        command(flags)
    assert command(write(tmp_path)) == []


def test_a_failed_trial_is_out_and_without_any_the_runs_fail(tmp_path, monkeypatch, capsys):
    flags = write_tuned(tmp_path, "tune: {grid: {recipe.lr: [1e-3, 2e-3]}, validation: 6}")

    def failing(config):
        trial = Path(config.output).parent
        if trial.parent.name == "tune" and (trial.name == "none" or config.recipe.lr == 1e-3):
            raise NonFiniteError("the loss is nan")
        return classification.train(config)

    monkeypatch.setattr(sweep_worker, "train", failing)
    failed = {job.path.name: job.error["error"] for job in command(flags)}
    assert failed.keys() == {"none-seed0", "none-seed1", "trial-00", "trial-01"}
    assert "no trial in" in failed["none-seed0"]
    best = json.loads((tmp_path / "runs" / "tune" / "sincos2d" / "best.json").read_text())
    assert best["settings"] == {"recipe.lr": 2e-3}
    assert best["trials"][0]["accuracy"] is None


def test_the_choice_is_made_once(tmp_path):
    flags = write_tuned(tmp_path, "tune: {grid: {recipe.lr: [1e-3, 2e-3]}, validation: 6}")
    command(flags)
    best = tmp_path / "runs" / "tune" / "none" / "best.json"
    best.write_text(json.dumps({**json.loads(best.read_text()), "settings": {"recipe.lr": 3e-3}}))
    plan = open_plan(Path(flags[0]), [], flags[2], None)
    assert [job.config.recipe.lr for job in plan.jobs(lambda job: job.finished) if job.path.name == "none-seed0"] == [
        3e-3
    ]


def test_each_run_starts_from_the_encoder_of_its_own_encoding_and_seed(tmp_path, monkeypatch):
    flags = write_tuned(tmp_path, "vary: {init: [null, 'PRETRAINED/{encoding}-seed{seed}']}")
    sweep = Path(flags[0])
    sweep.write_text(sweep.read_text().replace("PRETRAINED", str(tmp_path / "mae")))
    encoders = ["none-seed0", "sincos2d-seed0", "none-seed1", "sincos2d-seed1"]  # the first ones as models are built
    for name in encoders:
        with pytest.raises(
            ConfigError, match=rf"init: '.*mae/{name}' given; accepted: the directory of a train.pretra"
        ):
            command([*flags, "--dry-run"])
        encoding, seed = name.split("-seed")
        own = ["--encoding", encoding, "--seed", seed, "--recipe.epochs", "1", "--output", str(tmp_path / "mae" / name)]
        pretraining.train(pretrain_config(tmp_path, *own))
    read, load, own = [], classification.load_encoder, classification.train
    monkeypatch.setattr(classification, "load_encoder", lambda model, path: read.append(path) or load(model, path))
    monkeypatch.setattr(
        sweep_worker, "train", lambda config: read.append(f"{config.encoding} {config.seed}") or own(config)
    )
    assert command(flags) == []
    expected = []
    for seed in (0, 1):
        expected += [f"none {seed}", f"sincos2d {seed}"]  # from random weights
        for encoding in ("none", "sincos2d"):
            expected += [f"{encoding} {seed}", str(tmp_path / "mae" / f"{encoding}-seed{seed}")]
    assert read == expected
    groups = group_runs(find_runs([tmp_path / "runs"], []))
    assert [(group.label, len(group.runs)) for group in groups] == [("none", 2)] * 2 + [("sincos2d", 2)] * 2


MISTAKES = [
    ("seed: [1]", [], "seed: no such field; did you mean 'seeds'? accepted: run, encodings"),
    ("tune: {gird: {}}", [], "tune.gird: no such field; did you mean 'tune.grid'?"),
    ("tune: {gird: {recipe.lr: [1e-3]}}", [], "tune.gird: no such field; did you mean 'tune.grid'?"),
    ("vary: {recipe.epoch: [1]}", [], "recipe.epoch: no such field; did you mean 'recipe.epochs'?"),
    ("vary: {recipe.lr: [fast]}", [], "recipe.lr: 'fast' given; accepted: a number"),
    ("vary: {recipe.lr: 1e-3}", [], "vary"),
    ("vary: {recipe.lr: []}", [], "vary.recipe.lr: [] given; accepted: a list of one or more"),
    ("vary: {seed: [1]}", [], "vary.seed: the sweep decides this field elsewhere"),
    ("vary: {recipe.lr: [1e-3, 1e-3]}", [], "is there more than once"),
    ("tune: {grid: {recipe.lr: [1e-3]}}", [], "data.validation: 5000 given, but a position task"),
    ("tune: {grid: {recipe.lr: [1]}, ranges: {recipe.warmup: [0.1, 0.2]}}", [], "tune: grid and ranges given"),
    ("tune: {ranges: {recipe.lr: [1, 0.1]}, trials: 2}", [], "tune.ranges.recipe.lr: [1.0, 0.1] given; accepted: two"),
    ("tune: {ranges: {recipe.lr: [0.1, 1]}}", [], "tune.trials: None given; accepted: a whole number"),
    ("tune: {grid: {recipe.lr: [1]}, trials: 2}", [], "tune.trials: 2 given"),
    ("tune: {grid: {recipe.lr: [1]}, seed: 3}", [], "tune.seed: 3 given; accepted: none of seeds"),
    ("tune: {grid: {recipe.lr: [1]}}\nvary: {recipe.lr: [1]}", [], "recipe.lr: the sweep decides this field elsewhere"),
    ("tune: {grid: {recipe.lr: [1]}, settings: {recipe.lr: 2}}", [], "tune.settings.recipe.lr: the sweep decides"),
    ("tune: {settings: {recipe.epochs: 2}}", [], "tune.settings: {'recipe.epochs': 2} given, but there is nothing"),
    ("tune: {validation: 6}", [], "tune.validation: 6 given, but there is nothing to tune: no grid or ranges"),
    ("tune: {seed: 7}", [], "tune.seed: 7 given, but there is nothing to tune"),
    ("evaluate: {sizes: [big]}", [], "sizes: 'big' given; accepted: pixels"),
    ("evaluate: {shifts: [far]}", [], "shifts: 'far' given; accepted: pixels"),
    ("evaluate: {size: [8]}", [], "evaluate.size: no such field; did you mean 'evaluate.sizes'?"),
    ("", ["--dry-rum"], "dry-rum"),
    ("", ["--recipe.lrr", "3"], "recipe.lrr: no such field; did you mean 'recipe.lr'?"),
    ("", ["--seed", "3"], "--seed: the sweep decides this field for every run"),
    ("", ["--encoding=none"], "--encoding: the sweep decides this field for every run"),
    ("", ["--profile", "2"], "profile: 2 given, but a sweep trains every run, each in one process"),
    ("vary: {parallel: [ddp, fsdp]}", [], "parallel: fsdp given, but a sweep trains every run, each in one process"),
    (
        "",
        ["--init", "nowhere/{encoding}-{seed}"],
        "init: 'nowhere/none-0' given; accepted: the directory of a train.pre",
    ),
    ("", ["--storage", "x"], "--storage: x given, but only tune.ranges uses Optuna"),
]


def test_torchrun_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="torchrun: a sweep trains each run in one process"):
        command(write(tmp_path))


@pytest.mark.parametrize(("extra", "flags", "line"), MISTAKES)
def test_a_mistake_is_one_line_and_leaves_nothing(extra, flags, line, tmp_path, capsys):
    flags = [*write(tmp_path, extra), *flags]
    assert run_command(lambda: command(flags)) == 2
    error = capsys.readouterr().err
    assert line in error
    assert error.count("\n") == 1
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("sweep", "line"),
    [
        ("encodings: [none]\nseeds: [0]\n", "run: not given"),
        ("run: nowhere.yaml\nencodings: [none]\nseeds: [0]\n", "config: "),
        ("run: base.yaml\nencodings: []\nseeds: [0]\n", "encodings: [] given; accepted: a list of one or more"),
        ("run: base.yaml\nencodings: [none]\nseeds: [0, 0]\n", "none-seed0 is there more than once"),
        ("run: base.yaml\nencodings: [none]\nseeds: 3\n", "seeds: '3' given"),
        (
            "run: base.yaml\nencodings: [rope_axal]\nseeds: [0]\n",
            "unknown encoding 'rope_axal'; did you mean 'rope_axial'?",
        ),
        ("run: base.yaml\nencodings: [{name: learned, std: 1}]\nseeds: [0]\n", "learned has no option 'std'"),
        ("run: base.yaml\nencodings: [none]\nseeds: [0]\nevaluate: {sizes: [24, 8x]}\n", "evaluate.sizes: '8x' given"),
        ("run: base.yaml\nencodings: [none]\nseeds: [0]\nevaluate: {shifts: [-1]}\n", "evaluate.shifts: '-1' given"),
    ],
)
def test_a_mistake_in_the_file_is_one_line(sweep, line, tmp_path, capsys):
    flags = write(tmp_path, sweep=sweep)
    assert run_command(lambda: command(flags)) == 2
    error = capsys.readouterr().err
    assert line in error
    assert error.count("\n") == 1


def test_a_sweep_file_that_is_not_there_is_one_line(tmp_path, capsys):
    assert run_command(lambda: command([str(tmp_path / "none.yaml")])) == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_every_sweep_file_is_complete_and_a_mistake_in_it_costs_no_picture_and_one_model_a_cell(
    path, tmp_path, monkeypatch
):
    built, create = [], timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda name, **options: (built.append(name), create(name, **options))[1])
    monkeypatch.setattr(visionpos.training.data.datasets, "read", lambda *_: pytest.fail("a picture was read"))
    plan = open_plan(path, [], str(tmp_path), None)
    assert len(built) == len(plan.cells)
    assert len({job.path for job in plan.jobs(lambda job: False)}) >= 3
    for word in ("Command", "Hardware", "Seeds"):
        assert f"# {word}" in path.read_text()
    assert f"# Seeds     {len(plan.sweep.seeds)}" in path.read_text()
