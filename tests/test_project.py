"""What a project tells its visitors: versions that agree, workflows that call what there is, tables that are tables."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import visionpos as vp

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
TARGETS = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M)


def test_the_version_is_the_same_everywhere():
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    newest = re.search(r"^## (\S+)$", (ROOT / "CHANGELOG.md").read_text(), re.M)[1]
    assert (cited["version"], newest) == (vp.__version__, vp.__version__)


@pytest.mark.parametrize("file", sorted((ROOT / ".github" / "workflows").glob("*.yml")), ids=lambda file: file.name)
def test_workflows_call_targets_of_the_makefile(file):
    jobs = yaml.safe_load(file.read_text())["jobs"]
    commands = [step["run"] for job in jobs.values() for step in job["steps"] if "run" in step]
    assert commands
    assert [command for command in commands if command.split()[0] != "make" or command.split()[1] not in TARGETS] == []
    assert {job for job in jobs if jobs[job].get("needs", job) not in jobs} == set()


@pytest.mark.parametrize(
    "file", sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml")), ids=lambda file: file.name
)
def test_issue_templates_are_forms(file):
    form = yaml.safe_load(file.read_text())
    if file.name != "config.yml":
        assert form["name"]
        assert all(field["attributes"]["label"] for field in form["body"])


def broken_rows(text: str) -> list[str]:
    """Return the lines of pipes that belong to no table, or to one whose head has another number of cells."""
    broken: list[str] = []
    text = re.sub(r"^```.*?^```", "", text, flags=re.S | re.M)
    for block in re.split(r"\n\s*\n", text):
        lines = block.strip("\n").splitlines()
        first = next((i for i, line in enumerate(lines) if line.lstrip().startswith("|")), None)
        if first is None:
            continue
        rows = [line for line in lines[first:] if line.lstrip().startswith("|")]
        counts = [len(re.findall(r"(?<!\\)\|", re.sub(r"`[^`]*`", "", row))) for row in rows]
        is_table = len(rows) > 1 and re.fullmatch(r"[\s|:-]+", rows[1])
        broken += [row for row, count in zip(rows, counts, strict=True) if not is_table or count != counts[0]]
    return broken


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_row_of_pipes_is_in_a_table(page):
    assert broken_rows(page.read_text()) == []


def test_a_table_that_a_blank_line_cuts_is_found():
    table = "| a | b |\n| --- | --- |\n| 1 | 2 |\n"
    assert broken_rows(table) == []
    assert broken_rows(table + "\n| 3 | 4 |\n") == ["| 3 | 4 |"]
    assert broken_rows(table + "| 3 | 4 | 5 |\n") == ["| 3 | 4 | 5 |"]


def test_the_answer_of_the_readme_is_that_of_the_results():
    answer = re.search(r"\*\*Which one\?\*\*.*?\n\n", (ROOT / "README.md").read_text(), re.S)[0]
    means = []
    for table in re.findall(r"(?:^\|.*\n)+", (ROOT / "docs" / "results.md").read_text(), re.M):
        header, _, *rows = ([cell.strip() for cell in row.split("|")] for row in table.splitlines())
        if header[1] == "encoding" and "accuracy, %" in header:  # of pictures
            means += [row[header.index("accuracy, %")].split()[0] for row in rows]
    quoted = re.findall(r"(\d+\.\d) %", answer)
    assert quoted
    assert set(quoted) <= {f"{float(mean):.1f}" for mean in means}, (
        "the README quotes another number than docs/results.md"
    )


def test_the_blocks_of_the_readme_run_one_after_another():
    names: dict = {}
    for block in re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S):
        exec(block, names)
    assert names["q"].shape == (2, 3, 197, 64)
    assert names["mask"].hidden.shape == (2, 64)


def test_an_installation_shows_visionpos_alone(tmp_path):
    """An editable one too: somebody's own train.py is theirs, not ours."""
    look = "import importlib.util as u; print([u.find_spec(name) for name in ('train', 'tests', 'benchmarks')])"
    done = subprocess.run([sys.executable, "-I", "-c", look], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout == "[None, None, None]\n", done.stderr


def test_every_page_is_in_the_site():
    pages = re.findall(r"([\w/]+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.M)
    notebooks = [f"notebooks/{file.stem}.md" for file in (ROOT / "docs" / "notebooks").glob("*.ipynb")]
    assert sorted(pages) == sorted([*notebooks, *(file.name for file in (ROOT / "docs").glob("*.md"))])


def test_the_page_of_names_has_every_public_name():
    named = re.findall(r"^::: visionpos\.(\w+)", (ROOT / "docs" / "api.md").read_text(), re.M)
    assert set(named) == set(vp.__all__)


def test_the_page_on_looking_runs():
    script = "\n".join(re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "see.md").read_text(), re.S))
    names: dict = {}
    exec(script, names)
    assert names["vp"].describe(names["model"]).rows[1][0] == "1, 3"
