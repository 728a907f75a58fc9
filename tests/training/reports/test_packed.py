"""A finished run in one JSON file: every bit of what it got right; a refusal where answers and accuracies differ."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

from visionpos.training.reports.packed import pack, unpack_bits

ROOT = Path(__file__).parents[3]
RESULTS = sorted((ROOT / "results").glob("*/*-seed*.json"))


def write_run(folder, accuracy=None):
    """A run on 11 pictures with one evaluation at 4 x 6 pixels; returns what it got right at its own size and there."""
    random = np.random.default_rng(3)
    right, elsewhere = random.integers(0, 2, (2, 11)).astype(bool)
    folder.mkdir()
    accuracy = float(elsewhere.mean()) if accuracy is None else accuracy
    rows = [{"how": "scale", "size": [4, 6], "part": "test", "accuracy": accuracy}]
    final = {"test": float(right.mean())}
    result = {"config": {"output": str(folder)}, "final": final, "chance": 0.1, "seed": 3, "seconds": 9.0}
    (folder / "result.json").write_text(json.dumps(result))
    report = {"run": str(folder), "coordinates": "interpolated", "rows": rows}
    (folder / "evaluate.json").write_text(json.dumps(report))
    safetensors.numpy.save_file({"test": right}, folder / "predictions.safetensors")
    safetensors.numpy.save_file({"right scale 4x6 test": elsewhere}, folder / "evaluate.safetensors")
    return right, elsewhere


def test_a_run_is_packed_to_the_bit_and_without_its_place(tmp_path):
    right, elsewhere = write_run(tmp_path / "run")
    pack(tmp_path / "run", tmp_path / "kept" / "run.json")
    kept = json.loads((tmp_path / "kept" / "run.json").read_text())
    assert np.array_equal(unpack_bits(kept["right"]["final test"], 11), right)
    assert np.array_equal(unpack_bits(kept["right"]["interpolated scale 4x6 test"], 11), elsewhere)
    assert str(tmp_path) not in json.dumps(kept)


def test_pictures_that_do_not_give_the_accuracy_are_refused(tmp_path):
    write_run(tmp_path / "run", accuracy=0.99)
    with pytest.raises(ValueError, match=r"'interpolated scale 4x6 test' has .* right, reported are 0\.99"):
        pack(tmp_path / "run", tmp_path / "run.json")


def test_an_evaluation_of_an_earlier_step_is_none_of_the_finished_run(tmp_path):
    write_run(tmp_path / "run")
    for name, key, step in (("result.json", "steps", 120), ("evaluate.json", "step", 22)):
        file = tmp_path / "run" / name
        file.write_text(json.dumps(json.loads(file.read_text()) | {key: step}))
    with pytest.raises(
        ValueError, match="evaluate.json is of step 22, and the run ended at step 120: evaluate it again"
    ):
        pack(tmp_path / "run", tmp_path / "run.json")
    file.write_text(json.dumps(json.loads(file.read_text()) | {"step": 120}))
    pack(tmp_path / "run", tmp_path / "run.json")


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_every_kept_run_is_whole(path):
    text = path.read_text()
    kept = json.loads(text)
    final, count = kept["result"]["final"], kept["result"]["data"]["test_size"]
    parts = final.keys() - {"weights"}
    assert parts, "no part was tested at the end"
    for part in parts:
        assert abs(unpack_bits(kept["right"][f"final {part}"], count).mean() - final[part]) < 1e-6, part
    for report in kept["evaluations"]:
        for row in report["rows"]:
            key = f"{report['coordinates']} {row['how']} {row['size'][0]}x{row['size'][1]} {row['part']}"
            assert abs(unpack_bits(kept["right"][key], count).mean() - row["accuracy"]) < 1e-6, key
    assert not re.search(r"\"/(root|home|tmp|work|mnt)/", text), "a path of some machine"
    study = json.loads((path.parent / "study.json").read_text())
    assert {"what", "command", "commit", "date", "card"} <= study.keys()
