"""The generated page of encodings is up to date."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import visionpos as vp
from visionpos.analysis import evidence, page

ROOT = Path(__file__).parents[1]
COMMAND = "run `make docs`"


def test_facts_on_the_page_are_up_to_date():
    text = (ROOT / "docs" / "encodings.md").read_text()
    assert page.HEADER in text, COMMAND
    assert page.evidence() in text, COMMAND
    assert page.overview() in text, COMMAND
    assert page.glossary() in text, COMMAND
    for name in vp.list_encodings():
        assert page.facts(name) in text, f"{name}: {COMMAND}"


def test_evidence_is_of_encodings_and_of_kept_runs():
    assert set(evidence.EVIDENCE) <= set(vp.list_encodings())
    shares = []
    for seed in (0, 1, 2):
        run = json.loads((evidence.STUDY / f"rope_axial-seed{seed}.json").read_text())
        rows = [row for report in run["evaluations"] for row in report["rows"] if row["how"] == "scale"]
        shares.append([row["accuracy"] for row in rows])
    means = [sum(each) / 3 for each in zip(*shares, strict=True)]
    trained, at_48, run_on = means[0], means[3], means[8]  # 32, 24, 40, 48, 64, then the same run on
    assert evidence.measured_here()["rope_axial"] == f"{100 * trained:.1f} / {100 * at_48:.1f} / {100 * run_on:.1f}"
    assert "learned(init_std=0.2)" not in evidence.measured_here()


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
