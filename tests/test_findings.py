"""tests/FINDINGS.md names tests that exist, and the README what cannot work."""

import ast
import re
from collections import Counter
from pathlib import Path

import pytest
import timm
import torch

import visionpos as vp
from tests.small import VIT

TESTS = Path(__file__).parent
PAGE = (TESTS / "FINDINGS.md").read_text()
ROWS = re.findall(r"^\| ([A-Z]\d+) \| .* \| `(.+\.py)::(\w+)` \| \w+ \|$", PAGE, re.M)
STEPS = re.findall(
    r"^\| (.+) \| (works|friction|fails)\b.* \| (works|friction|fails)\b.* \| `(.+\.py)::(\w+)` \|$", PAGE, re.M
)


def test_every_line_of_the_table_is_a_row():
    assert len(ROWS) == len(re.findall(r"^\| [A-Z]\d", PAGE, re.M)) > 40
    assert len(ROWS) + len(STEPS) == len(re.findall(r"^\| .*`(.+\.py)::", PAGE, re.M))


def test_the_steps_are_counted():
    _, before, now, *_ = zip(*STEPS, strict=True)
    for edition, outcomes in {"First edition": before, "Now": now}.items():
        counted = Counter(outcomes)
        line = f"{edition}: {counted['works']} work, {counted['friction']} friction, {counted['fails']} fail"
        assert line in " ".join(PAGE.split())


@pytest.mark.parametrize(("finding", "file", "name"), ROWS + [(step, file, name) for step, _, _, file, name in STEPS])
def test_the_test_exists(finding, file, name):
    assert name.startswith("test_")
    assert name in {node.name for node in ast.parse((TESTS / file).read_text()).body if hasattr(node, "name")}


def test_the_readme_says_what_cannot_work():
    text = (TESTS.parent / "README.md").read_text()
    assert "torch.jit.script" in text
    assert "AttentionExtract" in text
    model = vp.set_encoding(timm.create_model("vit_tiny_patch16_224", **VIT), "rope_axial")
    with pytest.raises(Exception, match=r".") as caught:  # the day it works, the README's sentence goes
        torch.jit.script(model)
    assert caught.value is not None
