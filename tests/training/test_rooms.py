"""Who may import whom: the scripts stand on the machinery, and its rooms on those below them."""

import ast
import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted(path.stem for path in (ROOT / "train").glob("*.py") if path.stem != "__init__")
ROOMS = ("data", "config", "run", "sweeps", "reports")  # from the ground up; errors.py and files.py lie below them all


def imports(path: Path) -> set[str]:
    """Return the modules that a file imports, wherever in it; `from x import y` counts as x and as x.y."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom) and node.level == 0:  # a relative one stays within its package
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def test_nothing_in_the_package_imports_a_script():
    for path in (ROOT / "visionpos").rglob("*.py"):
        assert not {name for name in imports(path) if name.split(".")[0] == "train"}, path


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_stands_on_its_own(script):
    assert not {name for name in imports(ROOT / "train" / f"{script}.py") if name.split(".")[0] == "train"}
    assert callable(importlib.import_module(f"train.{script}").main)


@pytest.mark.parametrize("room", [*ROOMS, "errors"])
def test_rooms_of_training_import_only_those_below(room):
    package = ROOT / "visionpos" / "training"
    below = {"errors", "files", *ROOMS[: ROOMS.index(room)]} if room in ROOMS else set()
    for path in (package / room).rglob("*.py") if room in ROOMS else [package / "errors.py"]:
        used = {name.split(".")[2] for name in imports(path) if name.startswith("visionpos.training.")}
        assert used <= below | {room}, path
