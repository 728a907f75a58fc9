"""Nothing that a user does wrong in a file or on a command line ends in a traceback: one line names what is wrong."""

import importlib
import json
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch

import train.evaluate
import train.probe
import train.report
import train.sweep
from tests.training.tiny_run import TASK, task_config
from visionpos.training.config.command_line import parse
from visionpos.training.errors import ConfigError, one_line, reporting, run_command
from visionpos.training.run import checkpoint
from visionpos.training.run.build import build_model, check_model
from visionpos.training.run.classification import train as classify
from visionpos.training.run.evaluation import evaluate
from visionpos.training.run.record import RunDirectory, write_json, write_tensors


def refused(capsys, call) -> str:
    """The one line by which a command refuses."""
    assert run_command(call) in (2, 3)
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert error.strip().isprintable()
    return error.removeprefix("error: ").strip()


# The net itself.


def test_files_and_memory_are_one_line_and_a_fault_of_the_program_is_not(capsys):
    def raising(error):
        def call():
            raise error

        return call

    assert "No such file" in refused(capsys, lambda: Path("/nowhere/x").read_text())
    assert "codec can't decode" in refused(capsys, lambda: b"\xff".decode())
    assert refused(capsys, lambda: torch.empty(2**46, 2**10)).startswith("not enough memory: ")
    assert refused(capsys, raising(MemoryError())) == "not enough memory: MemoryError"
    for error in (KeyError("x"), RuntimeError("shapes differ"), AttributeError("x")):
        with pytest.raises(type(error)):
            run_command(raising(error))


def test_a_line_is_printable_and_has_an_end():
    assert one_line("a\n\x1b[31mb\ud800\x00 c") == "a [31mb c"
    assert len(one_line("x" * 99_999)) == 1500
    assert one_line("field" + "x" * 99_999 + "accepted: y").startswith("fieldx")
    assert one_line("field" + "x" * 99_999 + "accepted: y").endswith("xaccepted: y")


def test_what_is_reported_keeps_its_cause_and_passes_on_errors_of_our_own():
    with pytest.raises(ConfigError, match="^x: KeyError 'y'$") as caught, reporting("x"):
        raise KeyError("y")
    assert isinstance(caught.value.__cause__, KeyError)
    with pytest.raises(ConfigError, match="^ours$"), reporting("x"):
        raise ConfigError("ours")


@pytest.mark.parametrize("script", ["classify", "pretrain_mae", "evaluate", "probe", "report", "sweep", "demo"])
def test_debug_shows_the_traceback_and_each_script_has_its_border(script, monkeypatch, capsys):
    module = importlib.import_module(f"train.{script}")
    argv = {"report": ["/nowhere/é"], "sweep": ["/nowhere/é"], "demo": ["--output=x/y", "--steps", "é"]}
    named = ["--config", "/nowhere/é"] if script in ("classify", "pretrain_mae") else ["/nowhere/é"]
    for debug in ([], ["--debug"]):
        monkeypatch.setattr(sys, "argv", [script, *debug, *argv.get(script, named)])
        with pytest.raises(SystemExit) as ended:
            module.main()
        assert ended.value.code == 2
        *traceback, line = capsys.readouterr().err.splitlines()
        assert line.startswith("error: ")
        assert traceback[:1] == ["Traceback (most recent call last):"] * len(debug)


# Configurations.

TEXTS = {
    "Latin-1": ("seed: 1  # café".encode("latin-1"), "given.yaml: 'utf-8' codec can't decode"),
    "UTF-16": ("seed: 1".encode("utf-16"), "given.yaml: 'utf-8' codec can't decode"),
    "a group that names a file in Latin-1": (b"recipe: latin.yaml", "latin.yaml: 'utf-8' codec can't decode"),
    "an empty group": (b"recipe:", "recipe: null given; accepted: a file of its fields"),
    "a group of another type": (b"recipe: []", "recipe: [] given; accepted: a file of its fields"),
    "a value left out": (b"seed:", "seed: null given; accepted: a whole number"),
    "a value left out in a group": (b"data: {cell: }", "data.cell: null given; accepted: a whole number"),
    "a tag with a wrong value": (b"seed: !!int abc", "invalid literal"),
    "a tag of another type": (b"recipe: !!set {a}", "could not determine a constructor for the tag"),
    "NUL": (b"seed: \0", "special characters are not allowed"),
    "NUL in a path": (rb'output: "a\0b"', r"output: 'a\x00b' given; accepted: text of one character or more"),
    "too deep": (b"[" * 5000, "nested too deeply"),
    "a list in itself": (b"encoding: &a [*a]", "nested too deeply"),
    "a huge number": (b"seed: " + b"9" * 5000, "Exceeds the limit"),
    "a huge hexadecimal number": (b"seed: 0x" + b"f" * 5000, "whole number of more than 64 bits"),
    "a number of 67 bits": (b"seed: 99999999999999999999", "whole number of more than 64 bits"),
    "a count that no machine has": (
        b"data: {cell: 9999999999}",
        "data.cell: 9999999999 given; accepted: a",
    ),
    "an empty output": (b"output: ''", "output: '' given; accepted: text of one character or more"),
    "an escape sequence in a key": (rb'"\e[31mseed": 1', "[31mseed: no such field"),
    "a file that is no configuration": (b"once upon a time " * 99, "config: Unexpected config 'once upon a time once"),
}


@pytest.mark.parametrize("name", TEXTS)
def test_a_configuration_that_cannot_be_read_is_one_line(name, tmp_path, capsys):
    content, line = TEXTS[name]
    (tmp_path / "tiny.yaml").write_text(TASK)
    (tmp_path / "latin.yaml").write_bytes("lr: 1e-3 # é".encode("latin-1"))
    (tmp_path / "given.yaml").write_bytes(content)
    argv = ["--config", str(tmp_path / "tiny.yaml"), "--config", str(tmp_path / "given.yaml")]
    assert line in refused(capsys, lambda: parse(argv))


OPTIONS = {
    "depth=0": "encoding: the model has no attention layers",
    "norm_layer=x": "model.options.norm_layer: KeyError 'x'",
    "act_layer=banana": "model.options.act_layer: KeyError 'banana'",
    "embed_dim=-1": "model.options: Trying to create tensor with negative dimension",
    "checkpoint_path=missing": "model.options.checkpoint_path: 'missing' given; accepted: an existing file",
    "img_size=[1]": "model.options: tuple index out of range",
    "patch_size=[null,4]": "model.options.patch_size: unsupported operand",
}


@pytest.mark.parametrize("option", OPTIONS)
def test_what_timm_raises_names_the_option(option, tmp_path, capsys):
    config = task_config(tmp_path, f"--model.options.{option}")
    assert refused(capsys, lambda: classify(config)).startswith(OPTIONS[option])


@pytest.mark.parametrize(
    ("name", "line"),
    [
        (
            "vit_tiny_patch16_22",
            "model.name: Unknown model (vit_tiny_patch16_22); did you mean 'vit_tiny_",
        ),
        (
            "vit_tiny_patch16_224.x",
            "model.name: Invalid pretrained tag (x) for vit_tiny_patch16_224.; accepted: vit",
        ),
        ("local-dir:/nowhere", "model.name: local-dir:/nowhere: Config file not found"),
    ],
)
def test_a_wrong_model_name_is_blamed_and_no_right_one(name, line, tmp_path, capsys):
    config = task_config(tmp_path, "--model.name", name)
    assert refused(capsys, lambda: classify(config)).startswith(line)


def test_a_checkpoint_for_the_classes_of_the_data_passes_the_check(tmp_path):
    config = task_config(tmp_path, "--encoding", "learned")
    metadata = {"image_size": (12, 16), "num_classes": 7, "channels": 3}
    torch.save(build_model(config, metadata).state_dict(), tmp_path / "fits.pth")
    config = task_config(
        tmp_path, "--encoding", "learned", "--model.options.checkpoint_path", str(tmp_path / "fits.pth")
    )
    check_model(config)
    build_model(config, metadata)


def test_long_names_are_cut_and_stay_different(tmp_path, capsys):
    specs = [json.dumps([{"name": "learned", "init_std": 0.5}, *["é" * 99 + end]]) for end in "ab"]
    names = [Path(task_config(tmp_path, "--encoding", spec).output).name for spec in specs]
    (tmp_path / "tiny.yaml").write_text(TASK)
    names = [Path(parse(["--config", str(tmp_path / "tiny.yaml"), "--encoding", spec]).output).name for spec in specs]
    assert len(set(names)) == 2
    assert all(len(name.encode()) <= 255 and name.endswith("-seed0") for name in names)
    assert "output: " in refused(capsys, lambda: RunDirectory(task_config(tmp_path, "--output", "d" * 300)))


SCRIPTS = {
    "evaluate": (train.evaluate.command, [""]),
    "probe": (train.probe.command, [""]),
    "report": (train.report.command, [""]),
    "report --output": (train.report.command, [".", "--output="]),
    "sweep": (train.sweep.command, [""]),
    "sweep --output": (train.sweep.command, ["x", "--output="]),
    "sweep without a file": (train.sweep.command, []),
}


@pytest.mark.parametrize("name", SCRIPTS)
def test_an_empty_path_is_no_path(name, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    script, argv = SCRIPTS[name]
    refused(capsys, lambda: script(argv))
    assert not list(tmp_path.iterdir())


SWEEP = "run: tiny.yaml\nencodings: [none]\nseeds: [0]\n"
PATHS = {  # a script, its arguments, the field that a path belongs to; {} is the path
    "config": ("classify", ["--config={}"]),
    "data.name": ("classify", ["--data.name={}"]),
    "data.root": ("classify", ["--data.root={}"]),
    "init": ("classify", ["--init={}"]),
    "output": ("classify", ["--output={}"]),
    "model.options.checkpoint_path": ("classify", ["--model.options.checkpoint_path={}"]),
    "encoding": ("classify", ["--encoding={}.yaml"]),
    "run": ("evaluate", ["{}"]),
    "probe run": ("probe", ["{}"]),
    "predict run": ("predict", ["{}", "picture.png"]),
    "runs": ("report", ["{}"]),
    "--output": ("report", [".", "--output={}"]),
    "sweep": ("sweep", ["{}"]),
    "--storage": ("sweep", ["sweep.yaml", "--storage={}"]),
    "sweep run": ("sweep", ["sweep.yaml"], SWEEP.replace("tiny.yaml", "'{}'")),
    "sweep output": ("sweep", ["sweep.yaml"], SWEEP + "output: '{}'\n"),
    "sweep encoding": ("sweep", ["sweep.yaml"], SWEEP.replace("none", "'{}'")),
}


@pytest.mark.parametrize("path", ["é" * 150, "runs/" * 900], ids=["a long name", "a long path"])
@pytest.mark.parametrize("name", PATHS)
def test_a_path_that_no_file_system_takes_is_told_by_its_field(name, path, capsys, monkeypatch, tmp_path):
    script, argv, *files = PATHS[name]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.yaml").write_text(TASK)
    (tmp_path / "sweep.yaml").write_text("".join(files).format(path) or SWEEP)
    argv = [each.format(path) for each in argv]
    command = importlib.import_module(f"train.{script}").command if script != "classify" else classify_command
    assert refused(capsys, lambda: command(argv)).startswith(f"{name.split()[-1]}: ")
    assert {each.name for each in tmp_path.iterdir()} == {"tiny.yaml", "sweep.yaml"}


def classify_command(argv):
    check_model(parse(["--config=tiny.yaml", *argv]))


# Runs that are damaged, or cannot be written.


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    classify(task_config(folder, "--encoding", "alibi2d"))
    evaluate(folder / "run", [(12, 20)])
    return folder / "run"


DAMAGE = {
    "config.yaml": [b"", b"[]", b"- a", b"\xff"],
    "result.json": [b"", b"{}", b"[]", b"null", b"\xff", b'{"final": 3, "seconds": 1, "seed": 0, "config": {}}'],
    "log.jsonl": [b"null\n", b"{\n", b"\xff\n", b"{}\n"],
}


@pytest.mark.parametrize(("name", "content"), [(name, each) for name in DAMAGE for each in DAMAGE[name]])
def test_a_damaged_file_of_a_run_is_named(name, content, finished, tmp_path, capsys):
    shutil.copytree(finished, tmp_path / "run")
    (tmp_path / "run" / name).write_bytes(content)
    if name == "log.jsonl":
        (tmp_path / "run" / "result.json").unlink()
    config = task_config(tmp_path, "--encoding", "alibi2d")
    assert name in refused(capsys, lambda: classify(config))


def test_a_blank_line_in_a_log_is_no_evaluation(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    log = tmp_path / "run" / "log.jsonl"
    whole = RunDirectory(task_config(tmp_path, "--encoding", "alibi2d")).history()
    log.write_text("\n" + log.read_text().replace("\n", "\n\n"))
    assert RunDirectory(task_config(tmp_path, "--encoding", "alibi2d")).history() == whole
    assert len(whole) == 3


@pytest.mark.parametrize("name", ["predictions.safetensors", "evaluate.json", "result.json"])
def test_a_report_names_the_damaged_file(name, finished, tmp_path, capsys):
    shutil.copytree(finished, tmp_path / "runs" / "a")
    (tmp_path / "runs" / "a" / name).write_bytes(b"[]")
    assert name in refused(capsys, lambda: train.report.command([str(tmp_path / "runs")]))


def test_an_evaluation_that_cannot_be_written_is_printed_all_the_same(finished, tmp_path, capsys, monkeypatch):
    def closed(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("visionpos.training.run.record.written_aside", closed)
    assert run_command(lambda: train.evaluate.command([str(finished), "--sizes", "12x20"])) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith("error: [Errno 13] Permission denied")
    assert printed.err.count("\n") == 1
    assert "| scale 12x20 |" in printed.out


def test_signed_weights_that_are_not_finite_are_passed_over(tmp_path, capsys):
    good, bad = {"model": {"a": torch.ones(2)}}, {"model": {"a": torch.tensor([1.0, torch.nan])}}
    checkpoint.save(tmp_path, 1, good, {})
    with pytest.raises(checkpoint.CheckpointError, match="not finite"):
        checkpoint.save(tmp_path, 2, bad, {})
    assert checkpoint.load(tmp_path).step == 1
    assert "step-00000002 holds weights that are not finite (a)" in capsys.readouterr().err


@pytest.mark.unhooked
def test_a_state_that_is_none_is_no_checkpoint(tmp_path):
    with pytest.raises(checkpoint.CheckpointError, match="holds no state"):
        checkpoint.save(tmp_path, 3, {"model": {"a": torch.ones(2)}}, [])


def test_nothing_is_written_through_a_link_of_somebody_else(tmp_path):
    (tmp_path / "theirs").write_text("precious")
    here = tmp_path / "run"
    here.mkdir()
    for name in (".x.json.tmp", f".x.safetensors.{os.getpid()}.tmp", ".x.safetensors.tmp"):
        (here / name).symlink_to(tmp_path / "theirs")
    write_json(here / "x.json", {"a": 1})
    write_tensors(here / "x.safetensors", {"a": torch.ones(2)})
    assert (tmp_path / "theirs").read_text() == "precious"
    assert json.loads((here / "x.json").read_text()) == {"a": 1}
    assert sorted(path.name for path in here.iterdir() if not path.is_symlink()) == ["x.json", "x.safetensors"]
