"""Type checkers see what each name builds."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest

import visionpos as vp
from visionpos import names

ROOT = Path(__file__).parents[1]
WRONG = """
import visionpos as vp

positions = vp.Positions.grid((2, 3))
bias: int = vp.create_encoding("alibi2d", num_heads=2).bias(positions)
vp.create_encoding("learned", dim=8, feat_shape=(2, 3)).embed((2, 3))
vp.create_model("vit_tiny_patch16_224", encoding=3)
"""


@pytest.mark.parametrize("place", ["input", "rotary", "bias", "conditional"])
def test_the_types_have_every_name_of_the_package(place):
    """An encoding of this package that is missing there is no bias or embedding to a type checker."""
    classes = {name: vp.registry.get_encoding_class(name) for name in vp.list_encodings(place=place)}
    own = {name for name, cls in classes.items() if cls.__module__.startswith(f"visionpos.{place}.")}
    assert set(get_args(getattr(names, f"{place.capitalize()}Name"))) == own


def mypy(*files: Path) -> tuple[int, str]:
    """The exit code and the words of `mypy --strict`, which reads the package as one that is installed, by py.typed."""
    command = [sys.executable, "-m", "mypy", "--strict", "--follow-imports=silent", "--hide-error-context"]
    environment = {**os.environ, "MYPYPATH": str(ROOT)}
    done = subprocess.run(
        [*command, *map(str, files)], cwd=files[0].parent, capture_output=True, text=True, env=environment
    )
    return done.returncode, done.stdout + done.stderr


@pytest.mark.slow
def test_a_typed_script_passes_and_wrong_types_are_found(tmp_path):
    pytest.importorskip("mypy")
    right, wrong = tmp_path / "right.py", tmp_path / "wrong.py"
    right.write_text((ROOT / "tests" / "typed_user.py").read_text())
    wrong.write_text(WRONG)
    status, said = mypy(right, wrong)
    assert status == 1
    errors = [line.split(": ", 2) for line in said.splitlines() if ": error: " in line]
    assert [place for place, *_ in errors] == ["wrong.py:5", "wrong.py:6", "wrong.py:7"], said
