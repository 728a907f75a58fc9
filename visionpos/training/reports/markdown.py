"""A report in Markdown, from the content of report.json."""

from collections.abc import Iterable, Sequence
from typing import Any

from visionpos.training.reports.tables import provenance, tables

__all__ = ["markdown", "markdown_table"]


def markdown(content: dict[str, Any]) -> str:
    """Return the report in Markdown."""
    sections = ["# Comparison of position encodings", "\n".join(f"- {line}" for line in provenance(content))]
    sections += [f"![{name}]({name})" for name in content["figures"]]
    for table in tables(content):
        sections += [f"## {table.title}", table.caption, markdown_table(table.head, table.rows)]
    return "\n\n".join(sections) + "\n"


def markdown_table(head: Sequence[object], rows: Iterable[Sequence[object]]) -> str:
    """Return a table in Markdown; a bar within a cell stays one."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(str(cell).replace('|', chr(92) + '|') for cell in line)} |" for line in lines)
