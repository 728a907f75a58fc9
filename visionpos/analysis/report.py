"""Texts on what is known of encodings: facts from the registry, measured properties beside each other."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ..registry import CLAIMS, PLACES, encoding_info, get_encoding_class, list_encodings
from . import kernel as kernels
from .kernel import NotDefined
from .measure import ON_TEST_GRID, PROPERTIES, measure, measure_running_on

OTHER_GRID = {  # `extrapolation` in words
    "interpolate": "coordinates are interpolated",
    "run_on": "coordinates run on",
    "formula": "a frame of its own",
    "resize": "the table is resized",
    "error": "not defined",
}
SMALL = 1e-6  # below it a residual is rounding, whose digits differ from machine to machine


def number(value: float | NotDefined) -> str:
    """Return a number for a table: three significant digits; a dash where a property has no meaning."""
    if isinstance(value, NotDefined):
        return "-"
    if value != 0 and abs(value) < SMALL:
        return "<1e-6"
    return f"{value:.3g}"


def columns(rows: Sequence[Sequence[str]]) -> str:
    """Return rows of text in aligned columns, the first row underlined."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """Return rows of text as a Markdown table."""
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])


def claims(name: str) -> str:
    """Return what an encoding declares of itself, in a few words."""
    info = encoding_info(name)
    words = [claim.replace("_", " ") for claim in CLAIMS if info[claim] is True]
    shared = "one for all layers" if info["shared"] else "one for each layer"
    return ", ".join([*words, shared, f"another grid: {OTHER_GRID[info['extrapolation']]}"])


def listing(pattern: str = "*", place: str | None = None) -> str:
    """Return names, places and summaries of encodings, one a line.

    Raises:
        ValueError: an unknown place, or a pattern that no name fits.
    """
    names = list_encodings(pattern, place=place)
    if not names:
        raise ValueError(f"no encoding fits {pattern!r}; `python -m visionpos list` shows all")
    return columns(
        [("name", "place", "summary"), *((n, *(encoding_info(n)[k] for k in ("place", "summary"))) for n in names)]
    )


def facts(name: str) -> str:
    """Return place, paper, formula, options with defaults, and claims of one encoding."""
    info = encoding_info(name)
    options = ", ".join(f"{key}={value!r}" for key, value in info["options"].items())
    parts = [
        f"{name}: {info['place']} encoding. {info['paper']}".rstrip(),
        f"file     {inspect.getsourcefile(get_encoding_class(name))}",
        f"needs    {', '.join(info['required']) or 'nothing'}",
        f"model    fills in {', '.join(info['from_model']) or 'nothing'}",
        f"options  {options or 'none'}",
        f"claims   {claims(name)}",
    ]
    return "\n".join(parts) + f"\n\n{info['doc']}"


def parse_options(pairs: Iterable[str]) -> dict[str, Any]:
    """Return options as a dict: ["temperature=10", "preset=mae"] becomes {"temperature": 10, "preset": "mae"}.

    Raises:
        ValueError: a pair without "=".
    """
    words, options = {"true": True, "false": False, "none": None, "null": None}, {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        if not equals or not key:
            raise ValueError(f"an option is written key=value, got {pair!r}")
        try:
            options[key] = words[text.lower()] if text.lower() in words else ast.literal_eval(text)
        except (ValueError, SyntaxError):
            options[key] = text
    return options


def parameters(name: str, grid: tuple[int, int] = (14, 14), **options: Any) -> int:
    """Return the number of learnable parameters of one module, in a ViT-Tiny with this grid."""
    return sum(parameter.numel() for parameter in kernels.build(name, grid, **options).parameters())


def label(name: str, options: Mapping[str, Any]) -> str:
    """Return the heading of a column, such as `rope_axial(temperature=10)`."""
    return f"{name}({', '.join(f'{key}={value}' for key, value in options.items())})" if options else name


def comparison(
    specs: Sequence[tuple[str, Mapping[str, Any]]], grid: tuple[int, int], test_grid: tuple[int, int]
) -> str:
    """Return a table of properties, one column for each (name, options); below it why some are not defined.

    What is measured on the test grid has two rows: as a model does it, and with coordinates that run on.
    """
    found = [measure(name, grid, test_grid, **options) for name, options in specs]
    running = [measure_running_on(name, grid, test_grid, **options) for name, options in specs]
    heads = [label(name, options) for name, options in specs]
    rows = []
    for key, each in PROPERTIES.items():
        rows.append((each.label, *(number(values[key]) for values in found)))
        if key in ON_TEST_GRID:
            rows.append((f"{each.label}, running on", *(number(values[key]) if values else "-" for values in running)))
    title = f"grid {grid[0]} x {grid[1]}, test grid {test_grid[0]} x {test_grid[1]}"
    notes = [
        f"- {head}: not defined, {reason}" for head, each in zip(heads, found, strict=True) for reason in reasons(each)
    ]
    return "\n".join([columns([(title, *heads), *rows]), *notes])


def reasons(values: Mapping[str, float | NotDefined]) -> list[str]:
    """Return why some properties are not defined, each reason with its properties; not those of other places."""
    found: dict[str, list[str]] = {}
    for key, value in values.items():
        if isinstance(value, NotDefined) and not str(value).startswith("only for the place"):
            found.setdefault(str(value), []).append(PROPERTIES[key].label)
    return [f"{reason} ({'; '.join(labels)})" for reason, labels in found.items()]


def sections() -> dict[str, list[str]]:
    """Return the names of each place, in order."""
    return {place: names for place in PLACES if (names := list_encodings(place=place))}
