"""docs/lost_rotation.md, run as it stands: a loop without DINOv3's rotation, and what the probe says of it."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "lost_rotation.md").read_text()


def run(folder, *arguments):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *arguments]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_loop_computes_what_a_model_without_positions_computes(tmp_path):
    """The page asserts it bit for bit, and prints the two tables that it shows."""
    printed = run(tmp_path, "-c", "\n".join(re.findall(r"```python\n(.*?)```", PAGE, re.S)))
    assert printed == "".join(re.findall(r"```text\n(.*?)```", PAGE, re.S))


@pytest.mark.slow  # four commands of some seconds each
def test_the_probe_tells_the_two_apart(tmp_path):
    run(tmp_path, "-c", "\n".join(re.findall(r"```python\n(.*?)```", PAGE, re.S)))
    (commands,) = re.findall(r"```\n(python -m train.*?)```", PAGE, re.S)
    for line in commands.splitlines():
        run(tmp_path, *shlex.split(line)[1:])
    whole, blind = (json.loads((tmp_path / "runs" / name / "probe.json").read_text()) for name in ("whole", "blind"))
    assert whole["trained"]["linear"] > 0.9
    assert max(blind["trained"]["linear"], *(each["random"]["linear"] for each in (whole, blind))) < 0.7
