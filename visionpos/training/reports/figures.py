"""The pictures of a report, from the content of report.json: seeds as dots, intervals as bars, lines with names."""

import io
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

__all__ = ["draw", "figures", "save"]

FEW = 5  # encodings with colour and name in one figure, beside the baseline, which is black; others are grey
COLORS = ("C0", "C1", "C2", "C3", "C4", "C5", "C6", "C8", "C9")
LABEL_GAP = 0.055  # between the names of two lines, of the panel's height

Rows = list[dict[str, Any]]


def draw(content: dict[str, Any], folder: Path) -> list[str]:
    """Write all figures that the runs allow, and return their names."""
    drawn = figures(content)
    for name, figure in drawn.items():
        save(figure, folder / f"{name}.png")
    return [f"{name}.png" for name in drawn]


def save(figure: Figure, file: Path | io.StringIO) -> None:
    """Write a figure, as PNG or, into a file of that name or into memory, as SVG whose text is text."""
    svg = not isinstance(file, Path) or file.suffix == ".svg"
    with mpl.rc_context({"svg.hashsalt": "visionpos", "svg.fonttype": "none"}):
        figure.savefig(file, dpi=110, format="svg" if svg else "png", metadata={"Date": None} if svg else None)


def figures(content: dict[str, Any]) -> dict[str, Figure]:
    """Return all figures that the runs allow, by name."""
    drawn = {"accuracy": accuracy_figure(content)}
    for how in dict.fromkeys(row["how"] for row in content["sizes"]):
        drawn[how.replace(" ", "-")] = size_figure(content, how)
    for name in content["varied"]:
        if all(isinstance(row["setting"][name], (int, float)) for row in content["rows"]):
            drawn[re.sub("[^a-z_]+", "-", name)] = varied_figure(content, name)
    return drawn


def accuracy_figure(content: dict[str, Any]) -> Figure:
    """Draw accuracy and its difference from the baseline, the best encoding on top; panels by setting and split."""
    cells = {(str(row["setting"]), split): None for row in content["rows"] for split in content["parts"]}
    columns = ["accuracy", *(["difference"] if content["compared"] else [])]
    lines = max(sum(str(row["setting"]) == setting for row in content["rows"]) for setting, _ in cells)
    figure, panels = grid(len(cells), len(columns), 1.2 + 0.28 * lines)
    for (setting, split), line in zip(cells, panels, strict=True):
        rows = [row for row in content["rows"] if str(row["setting"]) == setting][::-1]
        for what, axis in zip(columns, line, strict=True):
            dots(axis, [row[what].get(split) for row in rows])
            axis.set_yticks(range(len(rows)), [row["encoding"] for row in rows] if what == "accuracy" else [])
        line[0].set(title=title(split, rows[0]["setting"]), xlabel="accuracy, %")
        if content["compared"]:
            line[1].axvline(0, color="black", linewidth=0.8)
            line[1].set(title="the same seeds and pictures", xlabel=f"points above {content['baseline']}")
    return figure


def dots(axis: Axes, intervals: Sequence[dict[str, Any] | None]) -> None:
    """Draw one line for each interval: its ends as a bar, its mean as a stroke, every seed as a dot."""
    for height, interval in enumerate(intervals):
        if interval is None:
            continue
        if interval["low"] is not None:
            axis.plot([100 * interval["low"], 100 * interval["high"]], [height] * 2, color="C0", linewidth=2)
            axis.plot(100 * interval["mean"], height, "|", color="C0", markersize=11, markeredgewidth=2)
        seeds = [100 * share for share in interval["per_seed"].values()]
        axis.plot(seeds, [height] * len(seeds), "o", color="black", markersize=3, alpha=0.6)
    axis.set_ylim(-0.6, len(intervals) - 0.4)
    axis.grid(axis="x", color="0.92")


def size_figure(content: dict[str, Any], how: str) -> Figure:
    """Draw accuracy against the size (or the shift) of the pictures; panels by setting, split and coordinates."""
    chosen = [row for row in content["sizes"] if row["how"] == how]
    lines = list(dict.fromkeys((str(row["setting"]), row["part"]) for row in chosen))
    columns = list(dict.fromkeys(row["coordinates"] for row in chosen))
    figure, panels = grid(len(lines), len(columns), 3.6)
    sizes = [tuple(size) for size in sorted({tuple(row["size"]) for row in chosen})]
    colors = colors_of(content, [(row["encoding"], row["accuracy"]) for row in chosen])
    for (setting, split), line in zip(lines, panels, strict=True):
        for coordinates, axis in zip(columns, line, strict=True):
            place = (setting, split, coordinates)
            rows = [row for row in chosen if (str(row["setting"]), row["part"], row["coordinates"]) == place]
            points = [(sizes.index(tuple(row["size"])), row["encoding"], row["accuracy"]) for row in rows]
            curves(axis, points, colors)
            axis.set_xticks(range(len(sizes)), ["x".join(map(str, size)) for size in sizes])
            label = f"{how}: {'down x right' if 'shift' in how else 'height x width'}, pixels"
            axis.set(title=title(f"{split}, {coordinates}", rows[0]["setting"] if rows else {}), xlabel=label)
            axis.set_ylabel("%" if "answers" in how else "accuracy, %")
    return figure


def varied_figure(content: dict[str, Any], name: str) -> Figure:
    """Draw accuracy against a varied field, such as the epochs; panels by split and by the other fields."""
    others = [{key: value for key, value in row["setting"].items() if key != name} for row in content["rows"]]
    settings = list(dict.fromkeys(map(str, others)))
    figure, panels = grid(len(settings), len(content["parts"]), 3.6)
    every = [(row["encoding"], row["accuracy"][split]) for row in content["rows"] for split in content["parts"]]
    colors = colors_of(content, every)
    for setting, line in zip(settings, panels, strict=True):
        rows = [row for row, other in zip(content["rows"], others, strict=True) if str(other) == setting]
        rest = {key: value for key, value in rows[0]["setting"].items() if key != name}
        for split, axis in zip(content["parts"], line, strict=True):
            points = [(row["setting"][name], row["encoding"], row["accuracy"][split]) for row in rows]
            curves(axis, points, colors)
            axis.set(title=title(split, rest), xlabel=name, ylabel="accuracy, %", xscale="log")
    return figure


def colors_of(content: dict[str, Any], accuracies: Iterable[tuple[str, dict[str, Any]]]) -> dict[str | None, str]:
    """Return a colour for the baseline and for the encodings that are best on average over all (encoding, accuracy).

    An encoding has the same colour in all figures.
    """
    baseline = content["baseline"]
    means: dict[str, list[float]] = {}
    for encoding, accuracy in accuracies:
        means.setdefault(encoding, []).append(accuracy["mean"])
    best_first = sorted(means, key=lambda name: sum(means[name]) / len(means[name]), reverse=True)
    others = [name for name in best_first if name != baseline]
    order = list(dict.fromkeys(row["encoding"] for row in content["rows"]))
    return {baseline: "black"} | {name: COLORS[order.index(name) % len(COLORS)] for name in others[:FEW]}


def curves(axis: Axes, points: Iterable[tuple[float, str, dict[str, Any]]], colors: dict[str | None, str]) -> None:
    """Draw a line for each encoding; those that have a colour with a band and a name.

    Args:
        axis: Where to draw.
        points: x, the encoding and its accuracy there.
        colors: Of those encodings that have one.
    """
    lines: dict[str, list[tuple[float, dict[str, Any]]]] = {}
    for x, encoding, accuracy in points:
        lines.setdefault(encoding, []).append((x, accuracy))
    ends = {}
    for name in sorted(lines, key=lambda name: name in colors):  # grey below
        x, each = zip(*sorted(lines[name], key=lambda point: point[0]), strict=True)
        color = colors.get(name, "0.75")
        axis.plot(x, [100 * one["mean"] for one in each], marker=".", color=color, linewidth=1 + (name in colors))
        if name in colors:
            ends[name] = x[-1], 100 * each[-1]["mean"], color
            if all(one["low"] is not None for one in each):
                band = [[100 * one[end] for one in each] for end in ("low", "high")]
                axis.fill_between(x, *band, color=color, alpha=0.12, linewidth=0)
    if len(lines) > len(ends):
        text = f"grey: {len(lines) - len(ends)} others"
        axis.text(0.02, 0.02, text, color="0.5", transform=axis.transAxes, fontsize=8)
    name_lines(axis, ends)


def name_lines(axis: Axes, ends: dict[str, tuple[float, float, str]]) -> None:
    """Write the name of each line beside its end (x, y), moved up where it would cover another."""
    low, high = axis.get_ylim()
    lowest = low
    for name, (x, y, color) in sorted(ends.items(), key=lambda item: item[1][1]):
        lowest = max(lowest, y)
        axis.annotate(
            name,
            (x, y),
            xytext=(1.03, (lowest - low) / (high - low)),
            textcoords="axes fraction",
            color=color,
            fontsize=8,
            va="center",
            arrowprops={"arrowstyle": "-", "color": color, "linewidth": 0.5},
        )
        lowest += LABEL_GAP * (high - low)


def grid(rows: int, columns: int, height: float) -> tuple[Figure, list[list[Axes]]]:
    """Return a figure of rows x columns panels, each so many inches high, and its axes."""
    figure = Figure(figsize=(1.5 + 5 * columns, height * rows), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False).tolist()


def title(what: str, setting: dict[str, Any]) -> str:
    """Return a panel's title: what it shows, and the setting of the varied fields."""
    return "; ".join([what, *(f"{key} = {value}" for key, value in setting.items())])
