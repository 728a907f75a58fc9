"""The pages that add something run as they stand, and what they say to a contributor leaves the repository green."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch

from visionpos.hosts.host import timm_is_from

ROOT = Path(__file__).parents[1]
FOLDERS = ("visionpos", "train", "benchmarks", "tests", "docs", "configs", "results")
FILES = ("README.md", "CONTRIBUTING.md", "pyproject.toml")


def blocks(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / "docs" / page).read_text(), re.DOTALL)


def python(*arguments: str, root: Path = ROOT, cwd: Path) -> str:
    """What Python prints in a process of its own that imports the package of `root`."""
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *arguments]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_add_your_own_runs(tmp_path):
    ring, *scripts = blocks("add_your_own.md")[:5]
    script = "\n".join(scripts)
    assert script.count("steps = 400") == 1
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    (tmp_path / "ring.py").write_text(ring)
    (tmp_path / "try_it.py").write_text(script.replace("steps = 400", "steps = 2"))
    said = python("try_it.py", cwd=tmp_path)
    assert "bias ['ring']" in said
    first = [line.split()[0] for line in said.splitlines() if line.strip()]
    assert [word for word in first if word in ("none", "alibi2d", "ring")][-3:] == ["none", "alibi2d", "ring"]
    assert (tmp_path / "ring.png").exists()


def test_add_a_host_runs(tmp_path):
    family, host, script, saving = blocks("add_a_host.md")
    assert host.count("\n") < 60
    (tmp_path / "pico.py").write_text(family)
    (tmp_path / "pico_host.py").write_text(host)
    records_arguments = timm_is_from("1.0.31")
    (tmp_path / "try_it.py").write_text(script + (saving if records_arguments else ""))
    python("try_it.py", cwd=tmp_path)


def test_layers_run():
    """Five models, each of which checks its own shapes, and a sixth from the meta device."""
    scripts = blocks("layers.md")
    assert len(scripts) == 7
    exec("\n".join(scripts), {"__name__": "layers"})


def test_the_arithmetic_of_many_gpus_is_right():
    """A block of assertions, from which the text has its numbers; the parameters are those of timm's model."""
    (script,), found = blocks("scale.md"), {}
    exec(script, found)
    with torch.device("meta"):
        model = timm.create_model("vit_small_patch16_224")
    assert found["parameters"] == sum(parameter.numel() for parameter in model.parameters())


def test_weights_run(monkeypatch):
    monkeypatch.chdir(ROOT)
    (script,) = blocks("weights.md")
    exec(script, {})


def insert(page: Path, before: str, new: str) -> None:
    assert page.read_text().count(before) == 1
    page.write_text(page.read_text().replace(before, new + before))


def contribute(root: Path) -> None:
    """A copy of the repository in which the steps by hand are done."""
    for folder in FOLDERS:
        shutil.copytree(ROOT / folder, root / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for file in FILES:
        shutil.copy(ROOT / file, root)
    encoding, parity = blocks("add_your_own.md")[5:]
    (root / "visionpos" / "bias" / "ring.py").write_text(encoding)
    (root / "tests" / "parity" / "test_ring.py").write_text(parity)
    insert(root / "docs" / "architecture.md", "    alibi.py ", "    ring.py                heads that look at a ring\n")
    insert(root / "README.md", "`alibi` ", "`ring` ")
    insert(root / "visionpos" / "names.py", '    "shaw",\n', '    "ring",\n')


GENERATE = """
from pathlib import Path
from visionpos.analysis import page, plot_encoding

path = Path("docs/encodings.md")
text = path.read_text()
start, end = text.index("## All encodings"), text.index("\\n\\n## Input")
text = text[:start] + page.overview() + text[end:]
start = text.index("## Which one")
text = text[:start] + page.evidence() + text[text.index("\\n\\n## ", text.index("## What speaks for each")) :]
path.write_text(text.replace("### shaw", page.section("ring") + "\\n\\n### shaw"))
plot_encoding("ring", page.GRID).savefig("docs/pictures/ring.png")
"""
CHECKED = ["tests/test_contract.py", "tests/test_architecture.py", "tests/test_docs.py", "tests/parity/test_ring.py"]


def test_a_contribution_is_green(tmp_path):
    """With the part of `make docs` that is about the new encoding, and the tests that are about it or the pages."""
    contribute(tmp_path)
    python("-c", GENERATE, root=tmp_path, cwd=tmp_path)
    for command in (["check"], ["format", "--check"]):
        python(
            "-m", "ruff", *command, "visionpos/bias/ring.py", "tests/parity/test_ring.py", root=tmp_path, cwd=tmp_path
        )
    python("-m", "pytest", "-q", "-k", "ring or page or map or facts", *CHECKED, root=tmp_path, cwd=tmp_path)


@pytest.mark.slow
def test_a_contribution_is_green_after_make_docs(tmp_path):
    """With the whole of `make docs`, and the tests that go over all encodings."""
    contribute(tmp_path)
    python("-m", "visionpos", "docs", root=tmp_path, cwd=tmp_path)
    (tmp_path / "docs" / "hosts.md").write_text(python("-m", "visionpos", "hosts", root=tmp_path, cwd=tmp_path))
    checked = [*CHECKED, "tests/hosts/test_every_host.py", "tests/test_registry.py", "tests/test_facts.py"]
    python("-m", "pytest", "-q", "-m", "slow or not slow", *checked, root=tmp_path, cwd=tmp_path)
