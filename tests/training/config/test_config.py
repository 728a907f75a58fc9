"""The configuration: groups, flags, and one line for every mistake."""

import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from visionpos.training.config.command_line import config_class, find_config, parse
from visionpos.training.config.schema import Config, PretrainConfig
from visionpos.training.errors import ConfigError, run_command
from visionpos.training.run.build import check_model

ROOT = Path(__file__).parents[3]
RUNS = sorted((ROOT / "configs" / "run").glob("*.yaml"))
PICTURES = ["--config", str(ROOT / "configs/run/vit_cifar10_small.yaml")]
TASK = ["--config", str(ROOT / "configs/run/direction_demo.yaml")]


def write(folder: Path, text: str) -> list[str]:
    """A run file that changes something of the position task, as flags."""
    (folder / "extra.yaml").write_text(text)
    return [*TASK, "--config", str(folder / "extra.yaml")]


@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.stem)
def test_every_run_file_is_complete(path):
    config = parse(["--config", str(path)], config_class(path))
    assert config.output == f"runs/{path.stem}/{config.encoding}-seed0"
    for word in ("Command", "Hardware"):
        assert f"# {word}" in path.read_text()


def test_a_run_file_is_of_the_objective_whose_field_it_has(tmp_path):
    @dataclass
    class Contrastive(Config):
        temperature: float = 0.1

    (tmp_path / "mine.yaml").write_text("temperature: 0.2\n")
    (tmp_path / "masked.yaml").write_text("masked:\n  mask_ratio: 0.5\n")
    assert config_class(tmp_path / "mine.yaml") is Contrastive
    assert config_class(tmp_path / "masked.yaml") is PretrainConfig
    assert config_class(ROOT / "configs/run/direction_demo.yaml") is Config


@pytest.mark.parametrize("path", sorted((ROOT / "configs").rglob("*.yaml")), ids=lambda path: path.stem)
def test_no_file_promises_a_figure_that_was_not_measured(path):
    assert not re.search(r"not measured|none yet|to be measured|TODO", path.read_text())


def test_flags_come_on_top_of_files_and_files_on_top_of_earlier_ones(tmp_path):
    config = parse(
        [*write(tmp_path, "recipe: {lr: 5e-4, steps: 7}"), "--recipe.steps", "9", "--model.options.depth", "3"]
    )
    assert (config.recipe.lr, config.recipe.steps, config.model.options["depth"]) == (5e-4, 9, 3)
    assert config.recipe.batch_size == 128
    assert config.model.options["embed_dim"] == 64


def test_numbers_and_booleans_are_those_of_yaml_1_2(tmp_path):
    config = parse(
        write(tmp_path, "recipe: {lr: 1e-3, weight_decay: 5E-2}\nencoding: {name: rope_axial, temperature: 1e2}")
    )
    assert config.recipe.lr == 0.001
    assert config.recipe.weight_decay == 0.05
    assert config.encoding["temperature"] == 100.0
    assert parse([*TASK, "--compile", "off"]).compile == "off"


def test_layers_of_an_encoding_in_a_file_and_as_a_flag(tmp_path):
    for layers in ("1::3", "::2", "-1:", "[0, 2]"):
        given = f"{{name: alibi2d, layers: {layers!r}}}" if ":" in layers else f"{{name: alibi2d, layers: {layers}}}"
        for flags in (write(tmp_path, f"encoding: {given}"), [*TASK, "--encoding", given]):
            assert parse(flags).encoding == {"name": "alibi2d", "layers": layers if ":" in layers else [0, 2]}
    for wrong, line in (("3", "layers must be a list of integers or a slice"), ("'9:'", "layers '9:' are none of the")):
        config = parse([*TASK, "--encoding", f"{{name: alibi2d, layers: {wrong}}}"])
        with pytest.raises(ConfigError, match=line):
            check_model(config)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("rope_axial", "rope_axial"),
        ("learned+rope_axial", "learned+rope_axial"),
        ("{name: learned, init_std: 0.5}", {"name": "learned", "init_std": 0.5}),
        ('["sincos2d", {"name": "alibi2d"}]', ["sincos2d", {"name": "alibi2d"}]),
    ],
)
def test_encoding_specs(given, expected):
    assert parse([*TASK, "--encoding", given]).encoding == expected


def test_an_encoding_may_stand_in_a_file(tmp_path):
    (tmp_path / "golden.yaml").write_text("name: rope_golden\ntemperature: 30.0\n")
    given = str(tmp_path / "golden.yaml")
    assert parse([*TASK, "--encoding", given]).encoding == {"name": "rope_golden", "temperature": 30.0}


def test_default_outputs_are_plain_names_that_differ():
    specs = ["learned", "{name: learned, init_std: 0.5}", "{name: learned, init_std: 0.2}", "learned+rope_axial"]
    outputs = [parse([*TASK, "--encoding", spec]).output for spec in specs]
    assert len(set(outputs)) == len(specs)
    assert outputs[1] == "runs/direction_demo/learned-init_std=0.5-seed0"


MISTAKES = [
    (["--recipe.lrr", "3"], "recipe.lrr: no such field; did you mean 'recipe.lr'? accepted: recipe.epochs"),
    (["--recipe.learning_rate", "3"], "recipe.learning_rate: no such field; did you mean 'recipe.lr'? accepted"),
    (["--sede", "3"], "sede: no such field; did you mean 'seed'? accepted: model, data"),
    (["--recipe.lr", "fast"], "recipe.lr: 'fast' given; accepted: a number"),
    (["--recipe.lr", "-1"], "recipe.lr: -1.0 given; accepted: a number above 0"),
    (["--recipe.re_prob", "1.5"], "recipe.re_prob: 1.5 given; accepted: a number from 0 to 1"),
    (["--recipe.label_smoothing", "1"], "recipe.label_smoothing: 1.0 given; accepted: a number from 0 to below 1"),
    (["--recipe.auto_augment", "trivail"], "recipe.auto_augment: 'trivail' given; accepted: null, 'trivial', or"),
    (["--recipe.steps", "2.5"], "recipe.steps: '2.5' given; accepted: a whole number or null"),
    (["--recipe.betas", "[1,2,3]"], "recipe.betas: '[1, 2, 3]' given; accepted: a list of 2"),
    (["--recipe.warmup", "1.5"], "recipe.warmup: 1.5 given; accepted: a number from 0 to below 1"),
    (["--recipe.epochs", "3"], "recipe.steps: epochs=3, steps=400 given"),
    (["--recipe.flip", "true"], "changes the answer of a position task"),
    (["--recipe", "nothing.yaml"], "recipe: cannot read 'nothing.yaml': no such file"),
    (["--data.holdout", "right"], "data.holdout: 'right' given; accepted: none, left"),
    (["--data.name", "directon"], "data.name: 'directon' given; did you mean 'direction'? accepted: cifar10"),
    (["--data.size", "32"], "data.size: 32 given, but a position task ('direction') has no use for it"),
    (["--data.name", "cifar10"], "data 'cifar10' is pictures: accepted: epochs and no steps"),
    (["--model.options", "5"], "model.options: '5' given; accepted: a mapping"),
    (["--encoding", "5"], "encoding: 5 given; accepted: a name"),
    (["--encoding", "nothing.yaml"], "encoding: there is no file 'nothing.yaml'"),
    (["--compile", "maybe"], "compile: 'maybe' given; accepted: auto, on, graphs, off"),
    (["--config", "nothing.yaml"], "config: File does not exist"),
    (
        ["--config", "direction_dem"],
        "config: 'direction_dem' given, no file and no name; did you mean 'direction_demo'?",
    ),
    (["--config=swim"], "config: 'swim' given, no file and no name; "),
    (["--config", ""], "config: '' given; accepted: a path"),
    (["--seed"], "seed"),
]


@pytest.mark.parametrize(
    ("flags", "line"), MISTAKES, ids=lambda value: "_".join(value) if isinstance(value, list) else ""
)
def test_a_mistake_on_the_command_line_is_one_line(flags, line, capsys):
    assert run_command(lambda: parse([*TASK, *flags])) == 2
    error = capsys.readouterr().err
    assert line in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("recipe: {lrr: 1}", "recipe.lrr: no such field; did you mean 'recipe.lr'?"),
        ("recipi: {lr: 1}", "recipi: no such field; did you mean 'recipe'?"),
        ("recipi: {}", "recipi: no such field; did you mean 'recipe'?"),
        ("recipe: {lrr: {}}", "recipe.lrr: no such field; did you mean 'recipe.lr'?"),
        ("recipe: {lr: 1e-3, lr: 2e-3}", "duplicate key 'lr' in line 1"),
        ("seed: 1\nseed: 2", "duplicate key 'seed' in line 2"),
        ("recipe: {lr: [1e-3", "expected ',' or ']'"),
        ("seed: soon", "seed: 'soon' given; accepted: a whole number"),
        ("model: {name: 3}", "model.name: '3' given; accepted: text"),
        ("encoding: {init_std: 0.5}", "encoding: {'init_std': 0.5} given; accepted: a name"),
        ("data: {grid: 6}", "data.grid: '6' given; accepted: a list of 2"),
        ("- seed", "Unexpected config"),
        ("'': 1", "config: '' given as the name of a field; accepted: fields"),
        ("a b: 1", "config: 'a b' given as the name of a field; accepted: fields"),
    ],
)
def test_a_mistake_in_a_file_is_one_line(text, line, tmp_path, capsys):
    assert run_command(lambda: parse(write(tmp_path, text))) == 2
    error = capsys.readouterr().err
    assert line in error
    assert error.count("\n") == 1


def test_pictures_have_no_use_for_the_options_of_a_task():
    with pytest.raises(ConfigError, match=r"data.holdout: left given, but pictures \('cifar10'\)"):
        parse([*PICTURES, "--data.holdout", "left"])


def test_the_command_itself_prints_one_line_and_exits_with_2(tmp_path):
    flags = [
        "--config",
        "configs/run/vit_cifar10_small.yaml",
        "--encoding",
        "rope_axal",
        "--output",
        str(tmp_path / "run"),
    ]
    done = subprocess.run([sys.executable, "-m", "train.classify", *flags], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: encoding: unknown encoding 'rope_axal'; did you mean 'rope_axial'?")
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_a_file_of_this_project_is_found_by_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = ROOT / "configs" / "run" / "tasks_half.yaml"
    assert parse(["--config", "tasks_half", "--seed", "3"]) == parse([f"--config={path}", "--seed", "3"])
    assert parse(["--config=tasks_half"]).output.startswith("runs/tasks_half/")
    assert find_config("sweep", "study_tasks", "sweep").samefile(ROOT / "configs/sweep/study_tasks.yaml")
    (tmp_path / "study_tasks").touch()
    assert find_config("sweep", "study_tasks", "sweep") == Path("study_tasks"), "a file of one's own comes first"
