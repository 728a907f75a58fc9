"""docs/results.md: what the studies in results/ found, each as a question, an answer in words, a table and figures.

Every number and every sentence about one comes from the files of the runs; `study.json` gives the words around them:

what       what was trained, in a line; the heading
question   what the study asks
contrast   pairs of encodings [a, b] whose difference was of interest before the runs were made
limits     what the study does not say, a sentence each
command    what made the runs; `commit`, `date` and `card` with which they were made
vary, tune fields that differ between runs on purpose, and those chosen for each encoding
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from visionpos.training.errors import ConfigError
from visionpos.training.reports.claims import claims_table
from visionpos.training.reports.collect import find_runs, group_runs
from visionpos.training.reports.figures import figures, save
from visionpos.training.reports.markdown import markdown_table
from visionpos.training.reports.summary import summarize
from visionpos.training.reports.tables import ENOUGH_SEEDS, largest_table, percent, provenance, tables

__all__ = ["page", "study_content", "write_page"]

SHOWN = ("accuracy", "scale", "canvas")  # figures of the page; `train.report` draws the others
INTRODUCTION = """# Results

What the encodings do, measured: written from `results/`, which has one file for each finished run, by

    python -m train.report results/* --page docs/results.md

Intervals count seeds and pictures (`visionpos/training/reports/statistics.py`)."""


def write_page(folders: Sequence[Path], file: Path) -> None:
    """Write the page of these folders of results/ and, in `pictures` beside it, its figures."""
    contents = {folder.name: study_content(folder) for folder in folders}
    pictures = file.parent / "pictures"
    pictures.mkdir(parents=True, exist_ok=True)
    for name, content in contents.items():
        drawn = figures(content)
        for shown in drawn.keys() & SHOWN:
            save(drawn[shown], pictures / picture_name(name, shown))
    file.write_text(page(contents))


def page(contents: dict[str, dict[str, Any]]) -> str:
    """Return the page in Markdown, of what `study_content` returns for each folder's name."""
    sections = [INTRODUCTION, *(study_section(*study) for study in contents.items())]
    if claims := claims_table(list(contents.values())):
        sections += [f"## {claims.title}", claims.caption, markdown_table(claims.head, claims.rows)]
    return "\n\n".join(sections) + "\n"


def study_content(path: Path) -> dict[str, Any]:
    """Return everything that a report of a folder of results/ says, as numbers."""
    found = find_runs([path], [])
    if found.study is None:
        raise ConfigError(f"{path}: no folder of results/: it has no study.json")
    groups = group_runs(found)
    return summarize(found, groups, "none" if any(group.label == "none" for group in groups) else None)


def study_section(name: str, content: dict[str, Any]) -> str:
    """Return one study: question, answer, tables, figures, what it does not say, how to repeat it."""
    study = content["study"]
    lines = [f"## {study['what']}"]
    if "question" in study:
        lines.append(f"**Question.** {study['question']}")
    lines.append("**Answer.** " + "\n\n".join(answers(content)))
    of_sizes = filter(None, (largest_table(content, split) for split in content["parts"]))
    for table in [*list(tables(content))[: len(content["parts"])], *of_sizes]:
        lines += [f"{table.title}; {table.caption}", markdown_table(table.head, table.rows)]
    shown = [each for each in SHOWN if each == "accuracy" or any(row["how"] == each for row in content["sizes"])]
    lines += [f"![{each}](pictures/{picture_name(name, each)})" for each in shown]
    lines.append("**What it does not say, and what it is based on.**")
    lines.append("\n".join(f"- {line}" for line in [*study.get("limits", []), *provenance(content)]))
    made = f"commit {study['commit']}, {study['date']}, {study['card']}"
    commands = f"    {study['command']}\n    python -m train.report results/{name} --output runs/report"
    lines.append(f"**To repeat it** ({made}):\n\n{commands}")
    return "\n\n".join(lines)


def picture_name(study: str, figure: str) -> str:
    """Return the file name of a figure of a study."""
    return f"results-{study.replace('_', '-')}-{figure}.svg"


def answers(content: dict[str, Any]) -> list[str]:
    """Return what the numbers say, a paragraph of up to three sentences for each setting and each split of the test."""
    paragraphs = []
    for setting in dict.fromkeys(str(row["setting"]) for row in content["rows"]):
        rows = [row for row in content["rows"] if str(row["setting"]) == setting]
        several = [f"{key} {value}" for key, value in rows[0]["setting"].items()]
        for split in content["parts"]:
            place = ", ".join([*several, *([split] if len(content["parts"]) > 1 else [])])
            text = " ".join(
                filter(None, [ranking(rows, split), above(rows, split, content), contrast(rows, content, split)])
            )
            paragraphs.append(f"{place}: {text}" if place else text)
    return paragraphs


def ranking(rows: list[dict[str, Any]], split: str) -> str:
    """Return which encodings have the highest and the lowest mean accuracy."""
    order = sorted(rows, key=lambda row: -row["accuracy"][split]["mean"])
    best, worst = (
        f"{row['encoding']} with {percent(row['accuracy'][split], '{:.1f}')} %" for row in (order[0], order[-1])
    )
    if len(rows) == 1:
        return f"The only encoding is {best}."
    return f"Of {len(rows)} encodings the highest mean is that of {best}, the lowest that of {worst}."


def above(rows: list[dict[str, Any]], split: str, content: dict[str, Any]) -> str:
    """Return which encodings differ from the baseline for sure, all differences taken together."""
    found = {row["encoding"]: row["difference"][split] for row in rows if row["difference"].get(split)}
    if not found:
        return ""
    if all(difference["low"] is None for difference in found.values()):
        one = f"no difference from {content['baseline']} has an interval"
        if all(len(difference["per_seed"]) > 1 for difference in found.values()):
            return f"The answers to the pictures were not kept: {one}."
        return f"Not enough seeds: {one}, and the order may change with the next."
    sure = [name for name, each in found.items() if each["holds"]]
    unsure = [name for name in found if name not in sure]
    told = f"from {content['baseline']}, all {content['compared']} taken together"
    if not sure:
        return f"No difference {told}, is beyond doubt."
    return f"Different {told}, are {', '.join(sure)}" + (f"; not beyond doubt {', '.join(unsure)}." if unsure else ".")


def contrast(rows: list[dict[str, Any]], content: dict[str, Any], split: str) -> str:
    """Return the differences that the study asked for before it was made."""
    sentences = []
    for pair in content["contrasts"]:
        if pair["setting"] != rows[0]["setting"]:
            continue
        difference, names = pair["difference"][split], f"{pair['encodings'][0]} minus {pair['encodings'][1]}"
        text = f"{names} is {percent(difference, '{:+.1f}')} points"
        seeds = len(difference["per_seed"])
        if seeds == 1:
            text += ", by one seed, which says nothing of the next"
        elif difference["low"] is None:
            text += f" ({seeds} seeds), without an interval"
        else:
            text += f" ({seeds} seeds): " + ("0 is excluded" if difference["holds"] else "not different at this scale")
            text += ", though by fewer than five seeds" if seeds < ENOUGH_SEEDS else ""
        sentences.append(text + ".")
    return " ".join(sentences)
