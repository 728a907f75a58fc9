"""Other platforms: nothing that only POSIX has is needed, and a Mac's GPU is a device."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.small import needs_newer_torch
from visionpos.training.errors import ConfigError
from visionpos.training.run.engine import mixed_precision, pick_device

ROOT = Path(__file__).parents[3]
MASKED = """
import sys
for name in ("fcntl", "pwd", "grp", "resource", "termios", "pty", "tty", "posix_ipc"):
    sys.modules[name] = None
import os
for name in ("fork", "getuid", "kill"):
    if hasattr(os, name):
        delattr(os, name)
import importlib
for name in "classify demo evaluate pretrain_mae probe predict report sweep".split():
    importlib.import_module(f"train.{name}")
from pathlib import Path
from visionpos.training.run.lock import hold, holder
with hold(Path(sys.argv[1])) as ours:
    assert ours and holder(Path(sys.argv[1]))
assert holder(Path(sys.argv[1])) is None
"""


def test_scripts_and_the_lock_need_no_module_that_only_posix_has(tmp_path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", MASKED, str(tmp_path / "run")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("mps", "cuda", "auto"), [(False, 0, "cpu"), (True, 0, "mps"), (False, 2, "cuda"), (True, 1, "cuda")]
)
def test_the_devices_there_are(mps, cuda, auto, monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: cuda)
    assert pick_device("auto").type == auto
    assert pick_device("cpu").type == "cpu"
    if mps:
        assert pick_device("mps").type == "mps"
    else:
        with pytest.raises(ConfigError, match="device: 'mps' given; accepted here: auto, cpu"):
            pick_device("mps")
    with pytest.raises(ConfigError, match=f"device: 'cuda:{cuda}' given"):
        pick_device(f"cuda:{cuda}")


@needs_newer_torch
def test_a_mac_computes_in_float32_unless_asked():
    assert not mixed_precision(torch.device("mps"), "auto")._enabled
