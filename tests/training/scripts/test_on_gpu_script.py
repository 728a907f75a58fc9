"""train/on_gpu.sh with what a machine with a GPU has: parts by name, cut off and continued, a few small files."""

import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
HIDDEN = ("optuna", "beartype", "pyarrow", "onnx", "onnxruntime", "onnxscript", "torchmetrics", "tensorboardX")
BASE = """
model:
  name: vit_tiny_patch16_224
  options: {patch_size: 4, embed_dim: 16, depth: 1, num_heads: 2, mlp_ratio: 1, class_token: false, global_pool: avg}
data: {name: locate, grid: [2, 4]}
recipe: {steps: 6, eval_every: 2, batch_size: 4}
device: cpu
"""


def run(folder, part, minutes, **changes):
    """The script's exit status and what it printed, with packages hidden that such a machine does not have."""
    hidden = folder / "hidden"
    hidden.mkdir(exist_ok=True)
    for name in HIDDEN:
        (hidden / f"{name}.py").write_text(f"raise ImportError('{name} is hidden')\n")
    (hidden / "sitecustomize.py").write_text(f"import sys\nsys.path.insert(0, {str(hidden)!r})\n")
    environment = {
        **os.environ,
        "PYTHON": sys.executable,
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        **changes,
    }
    command = ["bash", str(ROOT / "train" / "on_gpu.sh"), part, str(minutes), str(folder / "out")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    return done.returncode, done.stdout + done.stderr


def test_a_part_that_is_none_is_explained(tmp_path):
    code, text = run(tmp_path, "tables", 1)
    assert code == 2
    assert "bash train/on_gpu.sh PART MINUTES [FOLDER]" in text
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_table_is_cut_off_continued_and_not_done_again(tmp_path):
    (tmp_path / "base.yaml").write_text(BASE)
    sweep = tmp_path / "tiny.yaml"
    sweep.write_text("run: base.yaml\nencodings: [none, rope_axial]\nseeds: [0, 1]\nevaluate: {sizes: [16]}\n")
    code, text = run(tmp_path, "table", 0, SWEEP=str(sweep))
    assert code == 1, text
    assert not (tmp_path / "out" / "table.done").exists()
    code, text = run(tmp_path, "table", 5, SWEEP=str(sweep))
    assert code == 0, text
    assert "at toy size" in text
    out = tmp_path / "out"
    assert {"table.done", "table.json", "table.tar.gz"} <= {path.name for path in out.iterdir()}
    assert len(json.loads((out / "table.json").read_text())["rows"]) == 2
    with tarfile.open(out / "table.tar.gz") as packed:
        names = packed.getnames()
    assert sum(name.endswith("result.json") for name in names) == 4
    assert not [name for name in names if "checkpoints" in name]
    assert run(tmp_path, "table", 5, SWEEP=str(sweep)) == (0, "table: done before\n")
