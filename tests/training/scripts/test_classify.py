"""Whole runs: their files, their results, and interruptions that leave no trace."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.training.tiny_run import TASK, picture_config, task_config
from visionpos.training.errors import ConfigError, NonFiniteError, run_command
from visionpos.training.run.classification import train
from visionpos.training.run.engine import Trainer

ROOT = Path(__file__).parents[3]


def contents(folder):
    """Every byte of the newest checkpoint, and the log without its times."""
    newest = max((folder / "checkpoints").iterdir())
    weights = {path.name: path.read_bytes() for path in newest.iterdir() if path.suffix == ".safetensors"}
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    timeless = [{key: line[key] for key in line if key not in ("seconds", "images_per_second")} for line in lines]
    return newest.name, weights, timeless


def interrupt(monkeypatch, call):
    """Die in the n-th stretch of training."""
    calls, advance = 0, Trainer.advance

    def dying(self, steps):
        nonlocal calls
        calls += 1
        if calls == call:
            advance(self, steps)
            raise KeyboardInterrupt
        return advance(self, steps)

    monkeypatch.setattr(Trainer, "advance", dying)


@pytest.mark.parametrize("make", [task_config, picture_config])
@pytest.mark.parametrize("encoding", ["learned", "rope_axial"])
def test_an_interrupted_run_ends_bit_identical(make, encoding, tmp_path, monkeypatch):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    for folder in (whole, broken):
        folder.mkdir()
    train(make(whole, "--encoding", encoding))
    for call in (1, 2, 3):  # in the first, second and third stretch between evaluations
        with monkeypatch.context() as patch:
            interrupt(patch, min(call, 2))
            with pytest.raises(KeyboardInterrupt):
                train(make(broken, "--encoding", encoding))
    train(make(broken, "--encoding", encoding))
    assert contents(broken / "run") == contents(whole / "run")


def test_a_crash_between_log_and_checkpoint_leaves_no_double_line(tmp_path, monkeypatch):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    for folder in (whole, broken):
        folder.mkdir()
    train(task_config(whole))
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "tensors", lambda self: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            train(task_config(broken))
    assert (broken / "run" / "log.jsonl").read_text().count("\n") == 1
    train(task_config(broken))
    assert contents(broken / "run") == contents(whole / "run")


def test_how_often_the_loss_is_looked_at_changes_nothing(tmp_path):
    often, seldom = tmp_path / "often", tmp_path / "seldom"
    for folder in (often, seldom):
        folder.mkdir()
    train(picture_config(often, "--log_every", "1"))
    train(picture_config(seldom, "--log_every", "100"))
    assert contents(often / "run") == contents(seldom / "run")


def test_a_run_leaves_its_record(tmp_path, capsys):
    config = picture_config(tmp_path, "--encoding", "{name: learned, init_std: 0.3}")
    result = train(config)
    run = tmp_path / "run"
    assert json.loads((run / "result.json").read_text()) == json.loads(json.dumps(result))
    assert len((run / "log.jsonl").read_text().splitlines()) == 3
    assert [path.name for path in sorted((run / "checkpoints").iterdir())] == ["step-00000006", "step-00000009"]
    assert list(run.glob("events.out.tfevents*"))
    assert result["encodings"][0]["init_std"] == 0.3
    assert result["encoding_parameters"] == (2 * 3 + 1) * 16
    assert result["parameters"] > result["encoding_parameters"]
    assert result["final"] == {"weights": "ema", **result["accuracy"]["ema"]}
    assert result["steps"] == 9
    assert result["epochs"] == 3.0
    assert (result["data"]["train_size"], result["data"]["test_size"], result["chance"]) == (30, 9, 1 / 3)
    assert result["data"]["note"] == ""  # what is true of copies of CIFAR is not said of other pictures
    assert {"python", "torch", "torchvision", "timm"} == result["versions"].keys()
    assert {"seconds", "images_per_second", "device", "threads", "seed", "loss", "config"} <= result.keys()
    assert result["repeats_bits"] is True, "on a CPU"
    capsys.readouterr()
    assert train(config) == json.loads(json.dumps(result))
    assert "is finished: accuracy test" in capsys.readouterr().out


def test_deterministic_kernels_are_asked_for_before_anything_is_computed(tmp_path, monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    assert not torch.are_deterministic_algorithms_enabled()
    try:
        result = train(task_config(tmp_path, "--deterministic", "true"))
        assert torch.are_deterministic_algorithms_enabled()
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    finally:
        torch.use_deterministic_algorithms(False)
    plain = train(task_config(tmp_path, "--output", str(tmp_path / "plain")))
    assert result["loss"] == plain["loss"]


def test_the_names_in_files_are_those_that_earlier_runs_have(tmp_path):
    result = train(task_config(tmp_path))
    state = json.loads((tmp_path / "run" / "checkpoints" / "step-00000006" / "state.json").read_text())
    assert state.keys() == {"step", "optimizer", "line", "seconds", "losses", "facts", "surroundings"}
    assert state["facts"] == json.loads(json.dumps(result["data"]))
    about = {"num_classes", "image_size", "channels", "chance", "train_size", "test_size", "note"}
    assert state["facts"].keys() == about
    assert state["surroundings"].keys() == {"device", "threads", "processes", "versions"}
    named = {
        "final",
        "accuracy",
        "loss",
        "steps",
        "epochs",
        "seconds",
        "images_per_second",
        "parameters",
        "seed",
        "data",
    }
    named |= {*state["surroundings"], "config", "chance", "encoding_parameters", "encodings", "repeats_bits"}
    assert result.keys() == named
    assert load_file(tmp_path / "run" / "predictions.safetensors").keys() == {"inside", "outside", "whole"}


def test_the_saved_configuration_repeats_the_run(tmp_path):
    from visionpos.training.config.command_line import parse

    train(picture_config(tmp_path, "--encoding", "sincos2d+rope_axial"))
    again = parse(["--config", str(tmp_path / "run" / "config.yaml"), "--output", str(tmp_path / "again")])
    train(again)
    assert contents(tmp_path / "again") == contents(tmp_path / "run")


def test_it_learns(tmp_path):
    result = train(picture_config(tmp_path, "--recipe.epochs", "20", "--recipe.eval_every", "20"))
    assert result["final"]["test"] == 1.0


def test_another_run_in_the_same_place_is_refused(tmp_path):
    train(task_config(tmp_path))
    with pytest.raises(
        ConfigError, match=r"holds another run: recipe.lr \(0.001 there, 0.002 now\), encoding \(none there"
    ):
        train(task_config(tmp_path, "--recipe.lr", "2e-3", "--encoding", "learned"))
    with pytest.raises(
        ConfigError, match=r"recipe.steps \(\d+ there, 50 now\); .* with --init \S+ to train its weights"
    ):
        train(task_config(tmp_path, "--recipe.steps", "50"))
    with pytest.raises(ConfigError, match="holds a run already, and resume is false"):
        train(task_config(tmp_path, "--resume", "false"))


def test_a_loss_that_is_not_finite_is_one_line_and_saves_nothing(tmp_path, capsys):
    config = task_config(tmp_path, "--recipe.lr", "1e30", "--recipe.clip_grad", "null", "--recipe.warmup", "0")
    assert run_command(lambda: train(config)) == 4
    error = capsys.readouterr().err
    assert "is not finite at step" in error or "weights are not finite after step" in error
    assert error.count("\n") == 1
    assert not (tmp_path / "run" / "result.json").exists()
    assert not list((tmp_path / "run").glob("checkpoints/step-00000006"))


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (["--encoding", "rope"], "encoding: unknown encoding 'rope'"),
        (
            ["--encoding", "{name: learned, init: 1}"],
            "encoding: learned has no option 'init'; did you mean 'init_std'?",
        ),
        (["--model.name", "vit_tiny_patch16_22"], "model.name: Unknown model .* did you mean 'vit_tiny_patch16_224'?"),
        (["--model.options.dept", "3"], "model.options.dept: no such option; did you mean 'depth'?"),
        (["--model.options.num_classes", "7"], "model.options.num_classes: 7 given, but the data have 4"),
        (["--model.options.img_size", "24"], r"model.options.img_size: 24 given, but the data have \(12, 16\)"),
        (["--model.options.patch_size", "5"], "model: pictures of 12x16 pixels are not whole patches of 5x5"),
        (["--device", "cuda:9"], "device: 'cuda:9' given; accepted here: auto, cpu"),
        (["--output", "/proc/nowhere/run"], "output: cannot write to /proc/nowhere/run"),
    ],
)
def test_mistakes_that_only_building_shows_are_one_line(flags, line, tmp_path):
    with pytest.raises(ConfigError, match=line):
        train(task_config(tmp_path, *flags))
    assert not (tmp_path / "run").exists()


def test_mistakes_in_the_model_come_before_any_picture_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(
        "visionpos.training.run.source.load_pictures", lambda *args, **kwargs: pytest.fail("pictures were read")
    )
    with pytest.raises(ConfigError, match="unknown encoding"):
        train(picture_config(tmp_path, "--encoding", "rope"))


def test_data_that_cannot_be_read_are_one_line(tmp_path, capsys):
    config = picture_config(tmp_path)
    next((tmp_path / "pictures" / "train" / "grey").iterdir()).write_bytes(b"no picture")
    assert run_command(lambda: train(config)) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_the_command(tmp_path):
    (tmp_path / "tiny.yaml").write_text(TASK)
    flags = ["--config", str(tmp_path / "tiny.yaml"), "--encoding", "alibi2d", "--output", str(tmp_path / "run")]
    done = subprocess.run([sys.executable, "-m", "train.classify", *flags], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    start, *lines, last = done.stdout.splitlines()
    for part in (
        str(tmp_path / "run"),
        "alibi2d in vit_tiny_patch16_224",
        "parameters",
        "direction",
        "6 steps of 8 on CPU",
    ):
        assert part in start
    assert [line.split(":")[0] for line in lines] == ["step 2 of 6", "step 4 of 6", "step 6 of 6"]
    assert "accuracy inside" in lines[0]
    assert " left" in lines[0]
    assert " left" not in lines[-1]
    assert "accuracy inside" in last
    assert done.stderr == ""


def test_a_nan_error_is_no_config_error():
    assert not issubclass(NonFiniteError, ConfigError)
