"""Checkpoints: what was written comes back bit by bit, or something older does; nothing damaged is ever read."""

import json
import random
import shutil

import pytest
import torch

from visionpos.training.errors import CheckpointError
from visionpos.training.run import checkpoint

TENSORS = {
    "model": {"weight": torch.arange(12.0).view(3, 4).t(), "count": torch.tensor(3)},
    "state": {"random.cpu": torch.arange(7, dtype=torch.uint8), "half": torch.ones(2, dtype=torch.bfloat16)},
}
FILES = {"model.safetensors", "state.safetensors", "state.json", "manifest.json"}


@pytest.fixture
def root(tmp_path):
    """Two checkpoints, of step 1 and step 2."""
    for step in (1, 2):
        checkpoint.save(tmp_path, step, TENSORS, {"step": step, "lr": 0.1 + 0.2})
    return tmp_path


def names(root):
    return sorted(path.name for path in root.iterdir())


def test_comes_back_as_it_was(root):
    found = checkpoint.load(root)
    assert found.step == 2
    assert found.state == {"step": 2, "lr": 0.1 + 0.2}
    for group, tensors in TENSORS.items():
        assert found.tensors[group].keys() == tensors.keys()
        for name, tensor in tensors.items():
            assert found.tensors[group][name].dtype == tensor.dtype
            assert torch.equal(found.tensors[group][name], tensor)
    assert {path.name for path in (root / "step-00000002").iterdir()} == FILES


def test_tensors_that_share_memory_are_written_in_full(tmp_path):
    table = torch.randn(4)
    checkpoint.save(tmp_path, 1, {"model": {"a": table, "b": table, "part": table[1:3]}}, {})
    found = checkpoint.load(tmp_path).tensors["model"]
    assert torch.equal(found["a"], table)
    assert torch.equal(found["b"], table)
    assert torch.equal(found["part"], table[1:3])


def test_keeps_the_newest(root):
    checkpoint.save(root, 10, TENSORS, {})
    assert names(root) == ["step-00000002", "step-00000010"]
    checkpoint.save(root, 11, TENSORS, {}, keep=1)
    assert names(root) == ["step-00000011"]


def test_nothing_there_is_none(tmp_path):
    assert checkpoint.load(tmp_path) is None
    assert checkpoint.load(tmp_path / "missing") is None


def test_every_flipped_bit_is_noticed(root):
    files = sorted((root / "step-00000002").iterdir())
    draw = random.Random(0)
    for _ in range(100):
        path = draw.choice(files)
        content = path.read_bytes()
        damaged = bytearray(content)
        damaged[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        path.write_bytes(damaged)
        assert checkpoint.load(root).step == 1
        path.write_bytes(content)
    assert checkpoint.load(root).step == 2


@pytest.mark.parametrize("name", sorted(FILES))
def test_every_truncation_is_noticed(root, name, capsys):
    path = root / "step-00000002" / name
    content = path.read_bytes()
    for length in {0, 1, len(content) // 2, len(content) - 1}:
        path.write_bytes(content[:length])
        assert checkpoint.load(root).step == 1
    path.unlink()
    capsys.readouterr()
    assert checkpoint.load(root).step == 1
    warning = capsys.readouterr().err
    assert warning.startswith("warning: using step-00000001, because step-00000002 is damaged")
    assert warning.count("\n") == 1


def test_files_of_another_step_are_noticed(root):
    shutil.copy(root / "step-00000001" / "state.json", root / "step-00000002" / "state.json")
    assert checkpoint.load(root).step == 1
    shutil.copytree(root / "step-00000001", root / "step-00000003")
    assert checkpoint.load(root).step == 1


def test_a_manifest_cannot_reach_outside(root):
    path = root / "step-00000002" / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["files"]["../step-00000001/state.json"] = manifest["files"].pop("state.json")
    path.write_text(json.dumps(manifest))
    assert checkpoint.load(root).step == 1


def test_all_damaged_is_an_error_that_lists_them(root):
    for directory in root.iterdir():
        (directory / "model.safetensors").write_bytes(b"x")
    with pytest.raises(CheckpointError, match=r"no checkpoint under .*step-00000002.*step-00000001"):
        checkpoint.load(root)


@pytest.mark.parametrize("call", range(1, 14))
def test_a_crash_at_any_write_leaves_the_older_ones(root, monkeypatch, call):
    """Killed at the n-th fsync or rename: what is there is step 2 or, once renamed, a whole step 3."""
    calls = 0

    def dying(function):
        def wrapped(*args):
            nonlocal calls
            calls += 1
            if calls == call:
                raise SystemExit
            return function(*args)

        return wrapped

    monkeypatch.setattr(checkpoint.os, "fsync", dying(checkpoint.os.fsync))
    monkeypatch.setattr(checkpoint.os, "rename", dying(checkpoint.os.rename))
    try:
        checkpoint.save(root, 3, TENSORS, {})
    except SystemExit:
        pass
    else:
        assert call > calls
    monkeypatch.undo()
    assert checkpoint.load(root).step in (2, 3)
    checkpoint.save(root, 4, TENSORS, {})
    assert checkpoint.load(root).step == 4
    assert all(name.startswith("step-") for name in names(root))
    assert len(names(root)) == 2


def test_a_full_disk_is_one_line_and_costs_nothing(root, monkeypatch):
    def full(path, content):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "_write", full)
    with pytest.raises(CheckpointError, match=r"cannot save step 3 .*No space left on device.*older checkpoints"):
        checkpoint.save(root, 3, TENSORS, {})
    assert names(root) == ["step-00000001", "step-00000002"]


def test_a_damaged_checkpoint_is_replaced_when_its_step_is_trained_again(root):
    (root / "step-00000002" / "model.safetensors").write_bytes(b"x")
    checkpoint.save(root, 2, TENSORS, {"again": True})
    assert checkpoint.load(root).state == {"again": True}


def test_a_state_that_json_cannot_hold_exactly_is_refused(root):
    with pytest.raises(ValueError, match="JSON"):
        checkpoint.save(root, 3, TENSORS, {"loss": float("nan")})
    assert checkpoint.load(root).step == 2
