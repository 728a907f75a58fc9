"""A report in Markdown, from the content of report.json."""

import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

__all__ = ["markdown"]

ENOUGH_SEEDS = 5  # seeds, below which a table must say so


def markdown(content: dict[str, Any]) -> str:
    """Return the report in Markdown."""
    sections = ["# Comparison of position encodings", provenance(content)]
    for split in content["parts"]:
        sections += [f"## Accuracy: {split}", caption(content), accuracy_table(content, split)]
    sections += ["## Cost", caption(content), cost_table(content)]
    kinds = {(row["how"], row["coordinates"], row["part"]): None for row in content["sizes"]}
    for how, coordinates, split in kinds:
        sections += [f"## {how.capitalize()}, {coordinates} coordinates: {split}", caption(content)]
        sections += [size_table(content, how, coordinates, split)]
    if content["figures"]:
        sections += ["## Figures", *(f"![{name}]({name})" for name in content["figures"])]
    return "\n\n".join(section for section in sections if section) + "\n"


def provenance(content: dict[str, Any]) -> str:
    """Return a list of what the numbers are based on."""
    data, weights = content["data"], {"ema": "averaged weights (EMA)", "raw": "raw weights"}[content["weights"]]
    versions = "; ".join(", ".join(f"{key} {value}" for key, value in each.items()) for each in content["versions"])
    fewest, most = content["fewest_seeds"], max(len(row["seeds"]) for row in content["rows"])
    lines = [
        f"{content['runs']} runs, {f'{fewest} to {most}' if fewest < most else most} seeds for each encoding.",
        f"Data: {data['name']}, {data['test_size']:,} test pictures, chance {content['chance']:.1%}.",
        f"Accuracy is that of the {weights} of the last step only, never the best of several looks.",
        "Intervals are of 95 %: a two-level bootstrap, wider for few seeds, where it says 'seeds and pictures'; "
        "Student's t over seeds where it says 'seeds only' (no predictions.safetensors), and for other sizes.",
        f"Hardware: {', '.join(content['hardware'])}. Versions: {versions}.",
    ]
    if len(content["hardware"]) > 1:
        lines.append("Images per second and seconds were not all measured on the same hardware.")
    if content["tuned"]:
        lines.append(f"Chosen for each encoding on training pictures held out: {', '.join(content['tuned'])}.")
    if content["baseline"] is None:
        lines.append("No run is without a position encoding, and no --baseline was given: there are no differences.")
    if content["unfinished"]:
        lines.append(f"Not finished, and left out: {', '.join(content['unfinished'])}.")
    return "\n".join(f"- {line}" for line in lines)


def caption(content: dict[str, Any]) -> str:
    """Return what a table must say by itself, wherever it is copied to."""
    data = content["data"]
    few = f" **Fewer than five seeds ({content['fewest_seeds']}).**" if content["fewest_seeds"] < ENOUGH_SEEDS else ""
    return f"{data['test_size']:,} test pictures; {data['note']}.{few}"


def accuracy_table(content: dict[str, Any], split: str) -> str:
    """Return a row for each encoding and setting: accuracy, and its difference from the baseline."""
    above = f"above {content['baseline']} (95 %)"
    head = [*content["varied"], "encoding", "as built", *content["tuned"]]
    head += ["accuracy (95 %), %", "seeds", "interval from", above, "seed by seed"]
    rows = []
    for row in content["rows"]:
        accuracy, difference = row["accuracy"][split], row["difference"].get(split)
        cells = [*row["setting"].values(), row["encoding"], row["options"], *row["tuned"].values()]
        cells += [percent(accuracy, "{:.2f}"), len(row["seeds"]), accuracy["basis"]]
        cells += [percent(difference, "{:+.2f}") if difference else ""]
        cells += [", ".join(f"{100 * each:+.2f}" for each in difference["per_seed"].values()) if difference else ""]
        rows.append(cells)
    if content["baseline"] is None:
        head, rows = head[:-2], [row[:-2] for row in rows]
    return table(head, rows)


def cost_table(content: dict[str, Any]) -> str:
    """Return a row for each encoding and setting: its speed and its parameters."""
    head = [*content["varied"], "encoding", "images per second", "seconds", "parameters", "of the encoding"]
    rows = []
    for row in content["rows"]:
        cost = [f"{row['images_per_second']:,.0f}", f"{row['seconds']:.1f}"]
        cost += [f"{row['parameters']:,}", f"{row['encoding_parameters']:,}"]
        rows.append([*row["setting"].values(), row["encoding"], *cost])
    return table(head, rows)


def size_table(content: dict[str, Any], how: str, coordinates: str, split: str) -> str:
    """Return a column for each size or shift, in pixels; the last one is the mean gain over the baseline."""
    chosen = [
        row for row in content["sizes"] if (row["how"], row["coordinates"], row["part"]) == (how, coordinates, split)
    ]
    sizes = sorted({tuple(row["size"]) for row in chosen})
    rows = []
    by_group: Callable[[dict[str, Any]], str] = lambda row: f"{row['setting']} {row['encoding']}"  # noqa: E731
    for _, group in itertools.groupby(chosen, by_group):
        found = {tuple(row["size"]): row for row in group}
        gaps = [row["above_baseline"] for row in found.values() if row["above_baseline"] is not None]
        first = next(iter(found.values()))
        cells = [percent(found[size], "{:.1f}") if size in found else "" for size in sizes]
        gap = f"{100 * np.mean(gaps):+.2f}" if gaps else ""
        name = f"{first['encoding']}, as the model does it" if first["own"] else first["encoding"]
        rows.append([*first["setting"].values(), name, *cells, gap])
    names = ["x".join(map(str, size)) for size in sizes]
    return table([*content["varied"], "encoding", *names, f"mean above {content['baseline']}"], rows)


def percent(interval: dict[str, Any], form: str) -> str:
    """Return a mean with its interval, in percent."""
    if interval["low"] is None:
        return form.format(100 * interval["mean"])
    mean, low, high = (form.format(100 * interval[key]) for key in ("mean", "low", "high"))
    return f"{mean} ({low} to {high})"


def table(head: Sequence[object], rows: Iterable[Sequence[object]]) -> str:
    """Return a Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(str(cell) for cell in line)} |" for line in lines)
