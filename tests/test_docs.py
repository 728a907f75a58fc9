"""The generated page is up to date, and the page on own encodings runs."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import visionpos as vp
from visionpos.analysis import page

ROOT = Path(__file__).parents[1]
COMMAND = "run `make docs`"


def test_facts_on_the_page_are_up_to_date():
    text = (ROOT / "docs" / "encodings.md").read_text()
    assert page.HEADER in text, COMMAND
    assert page.overview() in text, COMMAND
    assert page.glossary() in text, COMMAND
    for name in vp.list_encodings():
        assert page.facts(name) in text, f"{name}: {COMMAND}"


def test_measured_section_is_up_to_date():
    assert page.section("alibi2d") in (ROOT / "docs" / "encodings.md").read_text(), COMMAND


@pytest.mark.slow
def test_whole_page_is_up_to_date():
    assert page.page() == (ROOT / "docs" / "encodings.md").read_text(), COMMAND


def test_pictures_are_there_and_small():
    for name in vp.list_encodings():
        picture = ROOT / "docs" / "pictures" / f"{name}.png"
        assert name == "none" or 0 < picture.stat().st_size < 60_000, COMMAND


def test_what_the_page_says_against_common_claims():
    rises, last, lowest = page.sinusoid_decay()
    assert (rises, round(last, 3), round(lowest, 3)) == (35, 0.477, 0.372)
    _, spread, aligned = page.rotary_logits()
    assert max(spread) / min(spread) < 1.1, "independent q and k: no decay"
    assert aligned[-1] < 0.7 * aligned[0], "aligned q and k: decay"
    assert page.model_translation("none") < 1e-5 < 1e-3 < page.model_translation("rope_axial")


def test_add_your_own_runs(tmp_path):
    text = (ROOT / "docs" / "add_your_own.md").read_text()
    assert [line[3] for line in re.findall(r"^## .*", text, re.MULTILINE)] == list("12345")
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(blocks) == 5
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    (tmp_path / "ring.py").write_text(blocks[0])
    script = "\n".join(blocks[1:])
    assert script.count("steps = 400") == 1
    (tmp_path / "try_it.py").write_text(script.replace("steps = 400", "steps = 2"))
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "try_it.py"], cwd=tmp_path, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert "bias ['ring']" in done.stdout
    assert [line.split()[0] for line in done.stdout.splitlines()[-5::2]] == ["none", "alibi2d", "ring"]
    assert (tmp_path / "ring.png").exists()
