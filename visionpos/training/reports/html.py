"""A report as one HTML file that needs no other: figures as SVG inside it, tables that a click on a head sorts."""

import io
from collections.abc import Iterable
from html import escape
from typing import Any

from matplotlib.figure import Figure

from visionpos.training.reports.figures import figures, save
from visionpos.training.reports.tables import Table, provenance, tables

__all__ = ["html"]

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 75rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
div { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: 0.2rem 0.8rem; border-bottom: 1px solid #ddd; text-align: left; white-space: nowrap; }
th button { all: unset; cursor: pointer; font-weight: bold; }
th button:focus-visible { outline: 2px solid; }
th[aria-sort=ascending] button::after { content: " \\2191"; }
th[aria-sort=descending] button::after { content: " \\2193"; }
svg { max-width: 100%; height: auto; }
"""
# Cells are compared by the number they begin with, or as text where they begin with none; empty ones come last.
SCRIPT = """
for (const button of document.querySelectorAll("th button")) button.onclick = () => {
  const head = button.parentElement, body = head.closest("table").tBodies[0], column = head.cellIndex;
  const sign = head.ariaSort === "descending" ? 1 : -1;
  for (const other of head.parentElement.cells) other.ariaSort = "none";
  head.ariaSort = sign === 1 ? "ascending" : "descending";
  const key = row => row.cells[column].textContent, number = text => parseFloat(text.replaceAll(",", ""));
  const compare = (a, b) => {
    if (a === "" || b === "") return (a === "") - (b === "");
    const difference = number(a) - number(b);
    return sign * (Number.isNaN(difference) ? a.localeCompare(b) : difference);
  };
  body.append(...[...body.rows].sort((one, other) => compare(key(one), key(other))));
};
"""


def html(content: dict[str, Any]) -> str:
    """Return the report as one HTML page without a request to anywhere."""
    title = "Comparison of position encodings"
    facts = "".join(f"<li>{escape(line)}</li>" for line in provenance(content))
    drawn = "".join(svg(figure) for figure in figures(content).values())
    body = "".join(table_html(table) for table in tables(content))
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>\n'
        f"<style>{STYLE}</style></head>\n<body><h1>{title}</h1>\n<ul>{facts}</ul>\n{drawn}\n{body}"
        f"<script>{SCRIPT}</script></body></html>\n"
    )


def table_html(table: Table) -> str:
    """Return a table with its title and caption; each head is a button that sorts by its column."""
    head = row("th", (f'<button type="button">{escape(name)}</button>' for name in table.head))
    rows = "".join(row("td", map(escape, cells)) for cells in table.rows)
    caption = escape(table.caption.replace("**", ""))
    top = f"<h2>{escape(table.title)}</h2>\n<p>{caption}</p>\n"
    return f"{top}<div><table><thead>{head}</thead><tbody>{rows}</tbody></table></div>\n"


def row(kind: str, cells: Iterable[str]) -> str:
    """Return a row of cells of a kind, th or td."""
    return f"<tr>{''.join(f'<{kind}>{cell}</{kind}>' for cell in cells)}</tr>\n"


def svg(figure: Figure) -> str:
    """Return a figure as an SVG element, its text as text."""
    file = io.StringIO()
    save(figure, file)
    text = file.getvalue()
    return text[text.index("<svg") :]
