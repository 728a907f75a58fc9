"""Damaged checkpoints: always noticed, never read, and never a reason to begin again."""

import json
import random
import shutil
import signal
from pathlib import Path

import pytest
import torch

from tests.training.run.interrupting import at, config_of, differences, outcome, run, send
from visionpos.training.run import checkpoint

OLD, NEW = "step-00000001", "step-00000002"
TENSORS = {name: {"weight": torch.rand(5, 7), "bias": torch.rand(5)} for name in ("model", "ema", "optimizer")}


@pytest.fixture
def new(tmp_path):
    """The newer of two checkpoints."""
    for step in (1, 2):
        checkpoint.save(tmp_path, step, TENSORS, {"step": step, "losses": [0.1 * step] * 9})
    return tmp_path / NEW


def flips(content, draw, number):
    """The content with one bit changed, at `number` places."""
    for bit in draw.sample(range(8 * len(content)), number):
        damaged = bytearray(content)
        damaged[bit // 8] ^= 1 << bit % 8
        yield bytes(damaged)


def assert_noticed(path, versions, capsys):
    """Every damaged version of a file makes the older checkpoint the one, with one line."""
    content = path.read_bytes()
    count = 0
    for damaged in versions(content):
        path.write_bytes(damaged)
        assert checkpoint.load(path.parents[1]).step == 1
        count += 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == count
    assert all(line.startswith(f"warning: using {OLD}, because {NEW}") for line in lines)
    path.write_bytes(content)
    assert checkpoint.load(path.parents[1]).step == 2
    return count


FILES = ["model.safetensors", "ema.safetensors", "optimizer.safetensors", "state.json", "manifest.json"]


@pytest.mark.parametrize("name", FILES)
def test_every_flipped_bit_of_a_file_is_noticed(name, new, capsys):
    draw = random.Random(0)
    assert assert_noticed(new / name, lambda content: flips(content, draw, 120), capsys) == 120


@pytest.mark.slow
@pytest.mark.parametrize("name", FILES)
def test_each_single_bit_of_a_file_is_noticed(name, new, capsys):
    draw = random.Random(0)
    count = assert_noticed(new / name, lambda content: flips(content, draw, 8 * len(content)), capsys)
    assert count == 8 * (new / name).stat().st_size


@pytest.mark.parametrize("name", FILES)
def test_every_truncation_of_a_file_is_noticed(name, new, capsys):
    draw = random.Random(0)
    count = assert_noticed(
        new / name, lambda content: [content[:size] for size in draw.sample(range(len(content)), 40)], capsys
    )
    assert count == 40


@pytest.mark.parametrize("name", FILES)
def test_zeroed_stretches_and_appended_bytes_are_noticed(name, new, capsys):
    def versions(content):
        half = len(content) // 2
        return [bytes(len(content)), content[:half] + bytes(len(content) - half), content + b"x"]

    assert_noticed(new / name, versions, capsys)


def test_swapped_files_are_noticed(new, capsys):
    tensors = [new / name for name in FILES[:3]]
    for one in tensors:
        for other in tensors:
            if one.read_bytes() != other.read_bytes():
                assert_noticed(one, lambda content, other=other: [other.read_bytes()], capsys)


def test_a_manifest_of_before_is_noticed(new, capsys):
    stale = (new / "manifest.json").read_bytes()
    checkpoint.save(new.parent, 2, {**TENSORS, "model": {"weight": torch.ones(5, 7)}}, {"step": 2})
    assert_noticed(new / "manifest.json", lambda content: [stale], capsys)


@pytest.mark.parametrize("name", ["../step-00000001/state.json", "/etc/hostname", "..", "", "a/b", "\0", "missing"])
def test_a_manifest_that_names_a_file_elsewhere_is_not_followed(name, new, capsys):
    def versions(content):
        manifest = json.loads(content)
        manifest["files"][name] = manifest["files"]["state.json"]
        return [json.dumps(manifest).encode()]

    assert_noticed(new / "manifest.json", versions, capsys)


@pytest.mark.parametrize(
    "content", [b"[]", b"null", b'"x"', b"{}", b'{"step": 2, "files": {}}', b'{"files": 3}', b"\xff"]
)
def test_a_manifest_of_another_shape_is_no_manifest(content, new, capsys):
    assert_noticed(new / "manifest.json", lambda _: [content], capsys)


def test_a_file_that_was_garbage_when_its_manifest_was_made_is_noticed(new, capsys):
    (new / "model.safetensors").write_bytes(b"garbage")
    manifest = json.loads((new / "manifest.json").read_text())
    manifest["files"]["model.safetensors"] = {"size": 7, "sha256": checkpoint._sha256(b"garbage")}
    (new / "manifest.json").write_text(json.dumps(manifest))
    assert checkpoint.load(new.parent).step == 1


def test_what_is_saved_again_after_a_fall_back_is_kept_and_the_damaged_go(tmp_path):
    for step in (2, 4, 6):
        checkpoint.save(tmp_path, step, TENSORS, {}, keep=3)
    for step in (4, 6):
        (tmp_path / f"step-{step:08d}" / "manifest.json").write_text("{}")
    assert checkpoint.load(tmp_path).step == 2
    checkpoint.save(tmp_path, 3, TENSORS, {})
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["step-00000002", "step-00000003"]


def damage_and_continue(folder: Path) -> tuple[list[str], list[str], int, str, list[str]]:
    """A run with its newest checkpoint damaged, and then with all of them."""
    config = config_of("task", folder / "run")
    assert run(config_of("task", folder / "whole")) == 0
    assert run(config, at("after backward", 7, send(signal.SIGTERM))) == 143
    steps = sorted((folder / "run" / "checkpoints").iterdir())
    (steps[-1] / "ema.safetensors").write_bytes(b"\0" * 4096)
    shutil.copytree(folder / "run", folder / "lost")
    text = folder / "text"
    assert run(config, text=text) == 0
    warnings = [line for line in text.read_text().splitlines() if "warning" in line]
    lost = sorted((folder / "lost" / "checkpoints").iterdir())
    for step in lost:
        (step / "state.json").unlink(missing_ok=True)
    log = (folder / "lost" / "log.jsonl").read_text()
    code = run(config_of("task", folder / "lost"), text=text)
    assert sorted((folder / "lost" / "checkpoints").iterdir()) == lost
    assert (folder / "lost" / "log.jsonl").read_text() == log
    different = differences(outcome(folder / "run"), outcome(folder / "whole"))
    return different, warnings, code, text.read_text(), [step.name for step in steps]


def test_a_run_falls_back_with_a_warning_and_stops_when_nothing_is_left(fresh, tmp_path):
    different, warnings, code, text, steps = fresh(damage_and_continue, tmp_path)
    assert different == []
    assert steps[-1] == "step-00000007"
    assert len(warnings) == 1
    assert warnings[0].startswith("warning: using step-00000006, because step-00000007/ema.safetensors")
    assert code == 3
    assert text.startswith("error: no checkpoint under")
    assert text.count("\n") == 1
    assert all(step in text for step in steps)
