"""The pictures of a report, from the content of report.json."""

import re
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

__all__ = ["draw"]

Rows = list[dict[str, Any]]


def draw(content: dict[str, Any], folder: Path) -> list[str]:
    """Write all figures that the runs allow, and return their names."""
    figures = {"accuracy.png": accuracy_figure(content)}
    for how in dict.fromkeys(row["how"] for row in content["sizes"]):
        figures[f"{how.replace(' ', '-')}.png"] = size_figure(content, how)
    for name in content["varied"]:
        if all(isinstance(row["setting"][name], (int, float)) for row in content["rows"]):
            figures[f"{re.sub('[^a-z_]+', '-', name)}.png"] = varied_figure(content, name)
    for name, figure in figures.items():
        figure.savefig(folder / name, dpi=110)
    return list(figures)


def accuracy_figure(content: dict[str, Any]) -> Figure:
    """Draw mean and interval of every encoding, a panel for each setting and split of the test."""
    settings = list(dict.fromkeys(str(row["setting"]) for row in content["rows"]))
    figure, panels = grid(len(settings), len(content["parts"]), 1.5 + 0.3 * len(content["rows"]) / len(settings))
    for setting, line in zip(settings, panels, strict=True):
        rows = [row for row in content["rows"] if str(row["setting"]) == setting][::-1]
        for split, axis in zip(content["parts"], line, strict=True):
            points(axis, [row["encoding"] for row in rows], [row["accuracy"][split] for row in rows])
            axis.set(title=title(split, rows[0]["setting"]), xlabel="accuracy, %")
    return figure


def size_figure(content: dict[str, Any], how: str) -> Figure:
    """Draw accuracy against the size (or the shift) of the pictures; panels by setting, split and coordinates."""
    chosen = [row for row in content["sizes"] if row["how"] == how]
    lines = list(dict.fromkeys((str(row["setting"]), row["part"]) for row in chosen))
    columns = list(dict.fromkeys(row["coordinates"] for row in chosen))
    figure, panels = grid(len(lines), len(columns), 3.5)
    sizes = [tuple(size) for size in sorted({tuple(row["size"]) for row in chosen})]
    for (setting, split), line in zip(lines, panels, strict=True):
        for coordinates, axis in zip(columns, line, strict=True):
            rows = [
                r for r in chosen if (str(r["setting"]), r["part"], r["coordinates"]) == (setting, split, coordinates)
            ]
            for encoding in dict.fromkeys(row["encoding"] for row in rows):
                own = [row for row in rows if row["encoding"] == encoding]
                curve(axis, [sizes.index(tuple(row["size"])) for row in own], own, encoding)
            axis.set_xticks(range(len(sizes)), ["x".join(map(str, size)) for size in sizes])
            label = f"{how}: {'down x right' if 'shift' in how else 'height x width'}, pixels"
            axis.set(title=title(f"{split}, {coordinates}", rows[0]["setting"] if rows else {}), xlabel=label)
            axis.set_ylabel("%" if "answers" in how else "accuracy, %")
    figure.legend(*panels[0][0].get_legend_handles_labels(), loc="outside right center")
    return figure


def varied_figure(content: dict[str, Any], name: str) -> Figure:
    """Draw accuracy against a varied field, such as the epochs; panels by split and by the other fields."""
    others = [{key: value for key, value in row["setting"].items() if key != name} for row in content["rows"]]
    settings = list(dict.fromkeys(map(str, others)))
    figure, panels = grid(len(settings), len(content["parts"]), 3.5)
    for setting, line in zip(settings, panels, strict=True):
        rows = [row for row, other in zip(content["rows"], others, strict=True) if str(other) == setting]
        rest = {key: value for key, value in rows[0]["setting"].items() if key != name}
        for split, axis in zip(content["parts"], line, strict=True):
            for encoding in dict.fromkeys(row["encoding"] for row in rows):
                own = sorted((row for row in rows if row["encoding"] == encoding), key=lambda row: row["setting"][name])
                curve(axis, [row["setting"][name] for row in own], [row["accuracy"][split] for row in own], encoding)
            axis.set(title=title(split, rest), xlabel=name, ylabel="accuracy, %", xscale="log")
    figure.legend(*panels[0][0].get_legend_handles_labels(), loc="outside right center")
    return figure


def grid(rows: int, columns: int, height: float) -> tuple[Figure, list[list[Axes]]]:
    """Return a figure of rows x columns panels, each so many inches high, and its axes."""
    figure = Figure(figsize=(2 + 4.5 * columns, height * rows), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False).tolist()


def title(what: str, setting: dict[str, Any]) -> str:
    """Return a panel's title: what it shows, and the setting of the varied fields."""
    return "; ".join([what, *(f"{key} = {value}" for key, value in setting.items())])


def points(axis: Axes, labels: list[str], intervals: Rows) -> None:
    """Draw one line for each label: the mean, and a bar from end to end of the interval."""
    for index, interval in enumerate(intervals):
        low, high = (interval["mean"] if interval[end] is None else interval[end] for end in ("low", "high"))
        axis.plot([100 * low, 100 * high], [index, index], color="C0")
        axis.plot(100 * interval["mean"], index, "o", color="C0")
    axis.set_yticks(range(len(labels)), labels)


def curve(axis: Axes, x: list[float], intervals: Rows, label: str) -> None:
    """Draw means joined by a line, and intervals as a band."""
    (line,) = axis.plot(x, [100 * interval["mean"] for interval in intervals], marker=".", label=label)
    if all(interval["low"] is not None for interval in intervals):
        ends = [[100 * interval[end] for interval in intervals] for end in ("low", "high")]
        axis.fill_between(x, *ends, color=line.get_color(), alpha=0.15)
