"""docs/finetune.md, run as it stands: its Python block, then its commands, in an empty folder."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_the_walk_through_runs_as_it_stands(tmp_path):
    page = (ROOT / "docs" / "finetune.md").read_text()
    (made,), commands = re.findall(r"```python\n(.*?)```", page, re.S), re.findall(r"```\n(python -m .*?)\n```", page)
    assert [line.split()[2] for line in commands] == ["train.classify", "train.evaluate", "train.predict"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    printed = []
    for arguments in (["-c", made], *(shlex.split(line)[1:] for line in commands)):
        arguments = [each.replace("CONFIGS", str(ROOT / "configs")) for each in arguments]
        done = subprocess.run(
            [sys.executable, *arguments], cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        printed.append(done.stdout)
    result = json.loads((tmp_path / "runs" / "fruit" / "result.json").read_text())
    assert result["final"]["test"] > 0.9
    assert result["data"]["mean"] == [0.5, 0.5, 0.5], "those of the weights"
    assert result["config"]["data"]["crop_pct"] == 0.9
    assert "| kiwi | 4 |" in printed[2]
    assert [each["class"] for each in json.loads(printed[3])] == ["kiwi", "plum"]
