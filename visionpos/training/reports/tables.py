"""What a report says in words and tables, from the content of report.json: for Markdown, for HTML and as CSV."""

import csv
import io
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

__all__ = ["Table", "csv_text", "largest_table", "percent", "provenance", "tables"]

ENOUGH_SEEDS = 5  # seeds, below which a table must say so


@dataclass
class Table:
    """Hold one table of a report: what it is, what must be said beside it, its head and its rows of text."""

    title: str
    caption: str
    head: list[str]
    rows: list[list[str]]


def tables(content: dict[str, Any]) -> Iterator[Table]:
    """Yield all tables of a report: accuracy by split, other sizes, parameters; the best encoding first."""
    for split in content["parts"]:
        yield Table(f"Accuracy: {split}", caption(content), *accuracy_rows(content, split))
    for how, coordinates, split in {(row["how"], row["coordinates"], row["part"]): None for row in content["sizes"]}:
        title = f"{how.capitalize()}, {coordinates} coordinates: {split}"
        chosen = [r for r in content["sizes"] if (r["how"], r["coordinates"], r["part"]) == (how, coordinates, split)]
        yield Table(title, caption(content), *size_rows(content, chosen, "accuracy", "{:.1f}"))
        if any(row["difference"] for row in chosen):
            above = f"{title}, above {content['baseline']}"
            yield Table(above, caption(content), *size_rows(content, chosen, "difference", "{:+.1f}"))
    head = [*content["varied"], "encoding", "as built", "parameters", "of the encoding"]
    note = "Speed is not compared: `python -m benchmarks.speed` measures it, the log of a training does not."
    rows = []
    for row in content["rows"]:
        counts = [f"{row['parameters']:,}", f"{row['encoding_parameters']:,}"]
        rows.append([*map(str, row["setting"].values()), row["encoding"], row["options"], *counts])
    yield Table("Parameters", note, head, rows)


def provenance(content: dict[str, Any]) -> list[str]:
    """Return what the numbers are based on, a sentence or two each."""
    data, weights = content["data"], {"ema": "averaged weights (EMA)", "raw": "raw weights"}[content["weights"]]
    versions = "; ".join(", ".join(f"{key} {value}" for key, value in each.items()) for each in content["versions"])
    fewest, most = content["fewest_seeds"], max(len(row["seeds"]) for row in content["rows"])
    seeds = f"{fewest} to {most} seeds" if fewest < most else "one seed" if most == 1 else f"{most} seeds"
    note = f" {data['note'][0].upper()}{data['note'][1:]}." if data["note"] else ""
    lines = [
        f"{content['runs']} runs, {seeds} for each encoding.",
        f"Data: {data['name']}, {data['test_size']:,} test pictures, chance {content['chance']:.1%}.{note}",
        f"Accuracy is that of the {weights} of the last step only, never the best of several looks.",
        "Intervals are of 95 %, over seeds and pictures; there is none for one seed, nor where the answers to the "
        "pictures were not kept. Differences are paired: the same seeds on the same pictures.",
        f"Hardware: {', '.join(content['hardware'])}. Versions: {versions}.",
    ]
    if content["compared"] > 1 and most > 1:
        lines.append(
            f"{content['compared']} differences are looked at in each table: by chance alone, one in 20 intervals "
            "misses the truth. A star marks those that exclude 0 with all of them taken together "
            f"({100 - 5 / content['compared']:.1f} % each, Bonferroni)."
        )
    if content["tuned"]:
        lines.append(f"Chosen for each encoding on training pictures held out: {', '.join(content['tuned'])}.")
    if content["baseline"] is None:
        lines.append("No run is without a position encoding, and no --baseline was given: there are no differences.")
    if content["unfinished"]:
        lines.append(f"Not finished, and left out: {', '.join(content['unfinished'])}.")
    return lines


def caption(content: dict[str, Any]) -> str:
    """Return what a table must say by itself, wherever it is copied to."""
    few = f" **Fewer than five seeds ({content['fewest_seeds']}).**" if content["fewest_seeds"] < ENOUGH_SEEDS else ""
    return f"{content['data']['test_size']:,} test pictures.{few}"


def accuracy_rows(content: dict[str, Any], split: str) -> tuple[list[str], list[list[str]]]:
    """Return head and rows of a table of accuracy and of its difference from the baseline."""
    head = [*content["varied"], "encoding", *content["tuned"], "accuracy, %", "seeds"]
    if content["baseline"] is not None:
        head += [f"above {content['baseline']}", "seed by seed"]
    rows = []
    for row in content["rows"]:
        difference = row["difference"].get(split)
        cells = [*row["setting"].values(), row["encoding"], *row["tuned"].values()]
        cells += [percent(row["accuracy"][split], "{:.2f}"), len(row["seeds"])]
        if content["baseline"] is not None:
            each = difference["per_seed"].values() if difference else ()
            cells += [percent(difference, "{:+.2f}"), ", ".join(f"{100 * value:+.2f}" for value in each)]
        rows.append([str(cell) for cell in cells])
    return head, rows


def size_rows(
    content: dict[str, Any], chosen: list[dict[str, Any]], what: str, form: str
) -> tuple[list[str], list[list[str]]]:
    """Return head and rows of a table with a column for each size or shift, in pixels."""
    sizes = sorted({tuple(row["size"]) for row in chosen})
    found: dict[tuple[str, ...], dict[tuple[int, ...], str]] = {}
    for row in chosen:
        by_itself = ", as the model does it" * row["own"]
        name = (*map(str, row["setting"].values()), row["encoding"] + by_itself)
        if row[what]:
            found.setdefault(name, {})[tuple(row["size"])] = percent(row[what], form)
    head = [*content["varied"], "encoding", *("x".join(map(str, size)) for size in sizes)]
    return head, [[*name, *(cells.get(size, "") for size in sizes)] for name, cells in found.items()]


def largest_table(content: dict[str, Any], split: str) -> Table | None:
    """Return accuracy at the largest size, a column for each way to have coordinates; None if there is one size."""
    rows = [row for row in content["sizes"] if row["how"] == "scale" and row["part"] == split]
    if len({tuple(row["size"]) for row in rows}) < 2:
        return None
    height, width = max((row["size"] for row in rows), key=math.prod)
    ways = list(dict.fromkeys(row["coordinates"] for row in rows))
    found: dict[tuple[str, ...], dict[str, str]] = {}
    for row in rows:
        if row["size"] == [height, width]:
            name = (*map(str, row["setting"].values()), row["encoding"])
            found.setdefault(name, {})[row["coordinates"]] = percent(row["accuracy"], "{:.1f}")
    head = [*content["varied"], "encoding", *ways]
    cells = [[*name, *(each.get(way, "") for way in ways)] for name, each in found.items()]
    return Table(f"At {height}x{width}, by what happens to coordinates: {split}", caption(content), head, cells)


def percent(interval: dict[str, Any] | None, form: str) -> str:
    """Return a mean with its interval, in percent, a star behind a difference that holds; nothing for None."""
    if interval is None:
        return ""
    star = "*" * interval.get("holds", False)
    if interval["low"] is None:
        return form.format(100 * interval["mean"])
    mean, low, high = (form.format(100 * interval[key]) for key in ("mean", "low", "high"))
    return f"{mean}{star} ({low} to {high})"


def csv_text(content: dict[str, Any]) -> str:
    """Return every accuracy as CSV, a line for each encoding, split and size; shares of 1, nothing where unknown."""
    file = io.StringIO()
    names = [*content["varied"], "encoding", "how", "coordinates", "height", "width", "part", "seeds"]
    ends = ("mean", "low", "high")
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow([*names, *ends, *(f"difference_{end}" for end in ends), "holds"])
    finals = [
        {**row, "how": "final", "coordinates": "", "size": ("", ""), "part": split}
        | {"accuracy": row["accuracy"][split], "difference": row["difference"].get(split)}
        for row in content["rows"]
        for split in content["parts"]
    ]
    for row in [*finals, *content["sizes"]]:
        accuracy, difference = row["accuracy"], row["difference"] or {}
        place = [row["how"], row["coordinates"], *row["size"], row["part"], len(accuracy["per_seed"])]
        numbers = [*(accuracy[end] for end in ends), *(difference.get(end) for end in ends), difference.get("holds")]
        writer.writerow([*row["setting"].values(), row["encoding"], *place, *numbers])
    return file.getvalue()
