"""Figures that show themselves in a notebook. Only what draws imports this file, since it imports matplotlib."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image

try:
    from matplotlib.figure import Figure
except ModuleNotFoundError as missing:
    raise ModuleNotFoundError(
        "matplotlib draws this and is not installed: pip install 'visionpos[train]'", name=missing.name
    ) from missing

DPI = 144


class NotebookFigure(Figure):
    """A matplotlib figure that a notebook shows without pyplot. Save it with `.savefig("x.png")`."""

    def __init__(self, *args, dpi: float = DPI, layout: str = "constrained", **kwargs):
        super().__init__(*args, dpi=dpi, layout=layout, **kwargs)

    def savefig(self, fname: Any, **options: Any) -> None:
        """Save the figure as matplotlib does; a PNG has a palette of 256 colours, and so a third of the bytes."""
        if (options.get("format") or Path(str(fname)).suffix[1:]) != "png":
            return super().savefig(fname, **options)
        buffer = BytesIO()
        super().savefig(buffer, **{**options, "format": "png"})
        Image.open(buffer).convert("RGB").quantize(256).save(fname, format="PNG", optimize=True)

    def _repr_png_(self) -> bytes:
        """Return the picture that a notebook shows."""
        buffer = BytesIO()
        self.savefig(buffer, format="png")
        return buffer.getvalue()
