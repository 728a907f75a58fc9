"""Configurations, sweep files, command lines and damaged runs: each is right, or one line that names what is wrong."""

import contextlib
import io
import json
import os
import shutil
from collections.abc import Callable

import pytest
import yaml
from hypothesis import strategies as st

import train.evaluate
import train.probe
import train.report
import train.sweep
from tests.fuzz.harness import JUNK, counts, fuzz
from tests.training.tiny_run import TASK, task_config
from visionpos.training.config.command_line import field_types, parse
from visionpos.training.config.schema import Config, PretrainConfig
from visionpos.training.errors import ConfigError, run_command
from visionpos.training.run.build import check_model
from visionpos.training.run.classification import train as classify
from visionpos.training.run.record import RunDirectory
from visionpos.training.sweeps.sweep_file import Sweep

SWEEP = """
run: tiny.yaml
encodings: [none, alibi2d, {name: learned, init_std: 0.5}]
seeds: [0, 3]
vary: {recipe.steps: [2, 4]}
tune: {grid: {recipe.lr: [1e-3, 2e-3]}, validation: 8, settings: {recipe.batch_size: 4}}
evaluate: {sizes: [12, 16x20]}
output: runs
"""
FIELDS = list(field_types(PretrainConfig))
NAMES = {
    *FIELDS,
    *field_types(Sweep),
    "config",
    "command line",
    "arguments",
    "Key",
    ".yaml",
    "YAML",
    "not enough memory",
}
LIKELY = st.sampled_from(
    [
        0,
        1,
        -1,
        2.5,
        "",
        "x",
        None,
        True,
        [],
        {},
        [1, 2],
        [3, 4, 5],
        {"name": "learned"},
        "rope_axial",
        "none+alibi",
        ".",
        "/",
    ]
)
VALUES = st.recursive(
    JUNK | LIKELY, lambda each: st.lists(each, max_size=3) | st.dictionaries(st.text(max_size=6), each, max_size=2)
)
OPTIONS = [
    "depth",
    "embed_dim",
    "num_heads",
    "patch_size",
    "mlp_ratio",
    "norm_layer",
    "act_layer",
    "img_size",
    "class_token",
    "x",
]


def paths(tree: dict) -> list[tuple[str, ...]]:
    """The path of every key of nested mappings."""
    inner = [(key, *path) for key, value in tree.items() if isinstance(value, dict) for path in paths(value)]
    return [(key,) for key in tree] + inner


@st.composite
def changed_files(draw, text: str, more: list[tuple[str, ...]]) -> bytes:
    """A YAML file with some values changed or added, and now and then its bytes."""
    tree = yaml.safe_load(text)
    for _ in range(draw(st.integers(0, 2))):
        *folders, name = draw(st.sampled_from(paths(tree) + more))
        place = tree
        for folder in folders:
            if not isinstance(place.get(folder), dict):
                place[folder] = {}
            place = place[folder]
        place[draw(st.sampled_from([name] * 8 + [name + "s"])) if draw(st.booleans()) else name] = draw(VALUES)
    dump = draw(st.sampled_from([yaml.dump, yaml.safe_dump, json.dumps]))
    try:
        content = dump(tree).encode(draw(st.sampled_from(["utf-8"] * 9 + ["utf-16"])), errors="surrogateescape")
    except (TypeError, ValueError, yaml.YAMLError):
        content = repr(tree).encode(errors="replace")
    if draw(st.integers(0, 3)) == 0:
        at = draw(st.integers(0, len(content)))
        new = draw(
            st.sampled_from(
                [b"", b"\0", b"\xff", b":", b"- ", b"{", b"&a ", b"*a", b"!!int ", b"\t", b"[" * 2000, b"%", b"? "]
            )
        )
        content = content[:at] + new + content[at + draw(st.integers(0, 9)) :]
    return content


def refuse_by_line(call: Callable[[], object]) -> None:
    """Run a command as a script does; ConfigError of its one line if it refuses."""
    errors = io.StringIO()
    with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.StringIO()):
        code = run_command(call)
    if code:
        line = errors.getvalue().splitlines()[-1]  # above it may stand what timm and PyTorch warn of
        assert line.startswith("error: "), errors.getvalue()
        raise ConfigError(line)


def checked(*argv: str, kind: type[Config] = Config) -> None:
    """All that train.classify and train.pretrain_mae do with a configuration before they read data."""
    config = parse(argv, kind)
    RunDirectory(config)
    if "batch" not in str(config.model.options):
        check_model(config)


@pytest.fixture(autouse=True)
def in_a_folder(tmp_path, monkeypatch):
    (tmp_path / "tiny.yaml").write_text(TASK)
    monkeypatch.chdir(tmp_path)


@counts(fast=60, slow=9_000)
def test_run_files(count, record_property, tmp_path):
    def attempt(content):
        (tmp_path / "given.yaml").write_bytes(content)
        refuse_by_line(lambda: checked("--config", "tiny.yaml", "--config", "given.yaml"))

    more = [tuple(name.split(".")) for name in FIELDS] + [("model", "options", name) for name in OPTIONS]
    fuzz(attempt, count, record_property, fields=NAMES, errors=ConfigError, content=changed_files(TASK, more))


@counts(fast=20, slow=2_000)
def test_sweep_files(count, record_property, tmp_path):
    def attempt(content):
        (tmp_path / "sweep.yaml").write_bytes(content)
        refuse_by_line(lambda: train.sweep.command(["sweep.yaml", "--dry-run"]))

    more = [tuple(name.split(".")) for name in field_types(Sweep)] + [("tune", "ranges", "recipe.lr"), ("vary", "seed")]
    fuzz(attempt, count, record_property, fields=NAMES, errors=ConfigError, content=changed_files(SWEEP, more))


TEXTS = st.one_of(
    VALUES.map(str),
    VALUES.map(repr),
    st.sampled_from(["tiny.yaml", "nothing.yaml", "given", "[1", "{", "null", "-", "é" * 200]),
)
FLAGS = st.one_of(
    st.sampled_from(FIELDS),
    st.sampled_from(OPTIONS).map("model.options.{}".format),
    st.text("abc.-_+=\x1b", max_size=9),
)
SCRIPTS = {
    "classify": (lambda *argv: checked("--config", "tiny.yaml", *argv), []),
    "pretrain_mae": (lambda *argv: checked("--config", "tiny.yaml", *argv, kind=PretrainConfig), []),
    "evaluate": (
        lambda *argv: train.evaluate.command(argv),
        ["sizes", "aspect", "canvas", "shifts", "extrapolate", "device"],
    ),
    "probe": (lambda *argv: train.probe.command(argv), ["l2", "device"]),
    "report": (lambda *argv: train.report.command(argv), ["output", "vary", "baseline"]),
    "sweep": (lambda *argv: train.sweep.command(["--dry-run", *argv]), ["output", "storage"]),
}


@st.composite
def command_lines(draw) -> tuple[str, list[str]]:
    """A script, and flags of its own, of other scripts and of none."""
    script = draw(st.sampled_from(sorted(SCRIPTS)))
    argv = [draw(TEXTS)] if SCRIPTS[script][1] and draw(st.integers(0, 3)) else []
    for _ in range(draw(st.integers(0, 3))):
        flag = f"--{draw(st.sampled_from(SCRIPTS[script][1]) if SCRIPTS[script][1] and draw(st.booleans()) else FLAGS)}"
        argv += draw(st.sampled_from([[flag, draw(TEXTS)], [f"{flag}={draw(TEXTS)}"], [flag], [draw(TEXTS)]]))
    return script, argv


@counts(fast=60, slow=8_000)
def test_command_lines(count, record_property):
    def attempt(line):
        script, argv = line
        with contextlib.suppress(SystemExit):  # --help, --print_config
            refuse_by_line(lambda: SCRIPTS[script][0](*argv))

    names = {*NAMES, *(name for _, names in SCRIPTS.values() for name in names), "run", "argument", "sweep", "Errno"}
    fuzz(attempt, count, record_property, fields=names, errors=ConfigError, line=command_lines())


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run of a position task, evaluated at another size."""
    folder = tmp_path_factory.mktemp("finished")
    with contextlib.redirect_stdout(io.StringIO()):
        classify(task_config(folder, "--encoding", "alibi2d"))
        train.evaluate.command([str(folder / "run"), "--sizes", "16x20"])
    return folder / "run"


FILES = ["config.yaml", "log.jsonl", "result.json", "evaluate.json", "evaluate.safetensors", "predictions.safetensors"]
CONTENTS = st.one_of(
    st.sampled_from(
        [b"", b"\n", b"{}", b"[]", b"null\n", b"5", b"\xff\xfe\n", b'{"final": {}}\n', b"\0", b"[" * 9999, None]
    ),
    VALUES.map(lambda value: repr(value).encode(errors="replace")),
    st.floats(0, 1),  # cut off there
)


@counts(fast=10, slow=1_000)
def test_damaged_runs(count, record_property, finished, tmp_path):
    commands = {
        "classify": lambda run: classify(task_config(finished.parent, "--encoding", "alibi2d", "--output", str(run))),
        "evaluate": lambda run: train.evaluate.command([str(run)]),
        "report": lambda run: train.report.command([str(run), "--output", str(tmp_path / "report")]),
    }

    def attempt(command, file, content):
        run = tmp_path / "run"
        shutil.rmtree(run, ignore_errors=True)
        shutil.copytree(finished, run)
        if content is None:
            os.remove(run / file)
        else:
            whole = (run / file).read_bytes()
            (run / file).write_bytes(whole[: int(content * len(whole))] if isinstance(content, float) else content)
        refuse_by_line(lambda: commands[command](run))

    names = {*NAMES, *FILES, str(tmp_path)}
    draws = {"command": st.sampled_from(sorted(commands)), "file": st.sampled_from(FILES), "content": CONTENTS}
    fuzz(attempt, count, record_property, fields=names, errors=ConfigError, **draws)
