"""docs/architecture.md names every file and nothing else, and what a stranger must read is as short as it says."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
HOSTS = ROOT / "visionpos" / "hosts"
PAGE = (ROOT / "docs" / "architecture.md").read_text()


def section(title: str) -> str:
    return PAGE.split(f"\n## {title}\n", 1)[1].split("\n## ", 1)[0]


def mapped() -> list[str]:
    """The paths of the map, by indentation; on lines of names alone, two or more spaces stand between them."""
    paths, folders = [], {}
    for line in re.search(r"```text\n(.*?)```", section("The map"), re.DOTALL)[1].splitlines():
        depth = (len(line) - len(line.lstrip())) // 2
        names = [word for word in re.split(r"\s{2,}", line.strip()) if re.fullmatch(r"\S+(/|\.\w+)", word)]
        paths += [folders.get(depth - 1, "") + name for name in names]
        folders[depth] = paths[-1]
    return paths


def rows(title: str) -> list[list[str]]:
    return [[cell.strip() for cell in row.split("|")[1:-1]] for row in re.findall(r"^\|.*", section(title), re.M)[2:]]


def test_the_map_names_every_file_and_nothing_else():
    paths = mapped()
    assert len(paths) == len(set(paths))
    assert [path for path in paths if not (ROOT / path).exists()] == []
    folders = {path for path in paths if path.endswith("/")}
    files = {str(f.relative_to(ROOT)) for folder in ("visionpos", "train") for f in (ROOT / folder).rglob("*.py")}
    inits = {file for file in files if file.endswith("__init__.py")}
    assert files - inits == {path for path in paths if path.startswith(("visionpos", "train")) and path.endswith(".py")}
    assert {file.removesuffix("__init__.py") for file in inits} <= folders
    for outside in ("tests", "configs", "docs"):
        inside = {f"{f.relative_to(ROOT)}/" for f in (ROOT / outside).iterdir() if f.is_dir() and f.name[0] not in "._"}
        assert inside - {"docs/pictures/"} <= folders, outside


def lines(path: str, names: str = "") -> int:
    """Lines of a file, or of the classes and functions in it that are named."""
    text = (ROOT / path).read_text()
    if not names:
        return text.count("\n")
    defined = {node.name: node for node in ast.parse(text).body if hasattr(node, "name")}
    nodes = [defined[name] for name in names.split(", ")]
    return sum(node.end_lineno + 1 - min([node.lineno, *(d.lineno for d in node.decorator_list)]) for node in nodes)


def test_a_stranger_reads_little():
    limits = {}
    for what, files, limit in rows("What a stranger reads"):
        read = sum(lines(*entry.split(": ", 1)) for entry in re.findall(r"`([^`]+)`", files))
        limits[what] = int(limit)
        assert read <= int(limit), f"{what}: {read} lines"
    assert limits["a learned encoding"] <= 600
    assert limits["a host"] <= 700


def test_the_layers_are_those_that_lint_holds():
    contract = (ROOT / "pyproject.toml").read_text().split('containers = ["visionpos"]')[1].split("\n]\n")[0]
    layers = [layer.split(" | ") for layer in re.findall(r'^  "(.*)",', contract, re.M)]
    lines = re.search(r"```text\n(.*?)```", section("Which imports are allowed"), re.DOTALL)[1].splitlines()
    assert [re.split(r"\s{2,}", line)[0].split(", ") for line in lines] == [["train", "benchmarks"], *layers]


def test_the_glossary_is_short():
    words = [row[0] for row in rows("Words")]
    assert len(words) <= 30


@pytest.mark.parametrize("page", sorted((ROOT / "docs").glob("*.md")) + sorted(ROOT.glob("*.md")), ids=lambda p: p.name)
def test_links_and_paths_lead_somewhere(page):
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    links = [target.split("#")[0] for target in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in target]
    assert [link for link in links if link and not (page.parent / link).exists()] == []
    roots = ("visionpos", "train", "tests", "configs", "docs", "benchmarks")
    paths = re.findall(rf"`((?:{'|'.join(roots)})/[\w./]+\.(?:py|md|yaml|sh))`", text)
    invented = ("/ring.py", "/test_ring.py", "/pico.py")  # by the pages that add an encoding and a host
    assert [path for path in paths if not (ROOT / path).exists() and not path.endswith(invented)] == []


LONG_FAMILIES = {  # and what they have twice
    "gemma4_vit.py": 200,  # an encoder and a classifier, pictures and padded patches, two tables in one parameter
    "hiera.py": 240,  # tokens in an order of its own, masks, pooled queries
    "mvitv2.py": 160,  # queries, keys and values pooled each for itself
    "naflexvit.py": 220,  # pictures and padded patches, two kinds of blocks, three kinds of tables
}


def test_a_family_is_short():
    families = [path for path in HOSTS.glob("*.py") if "\nHOST = register_host(" in path.read_text()]
    assert len(families) > 30
    for path in families:
        assert path.read_text().count("\n") <= LONG_FAMILIES.get(path.name, 120), path.name


def test_what_families_share_is_for_two_or_more():
    files = {path.stem: path.read_text() for path in HOSTS.glob("*.py") if path.stem != "__init__"}
    for name, text in files.items():
        users = [other for other in files.values() if re.search(rf"^from \.{name} import", other, re.MULTILINE)]
        assert "\nHOST = register_host(" in text or len(users) > 1, name
