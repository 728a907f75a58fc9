"""Figures that show themselves in a notebook. Only what draws imports this file, since it imports matplotlib."""

from __future__ import annotations

from io import BytesIO

from matplotlib.figure import Figure

DPI = 144


class NotebookFigure(Figure):
    """A matplotlib figure that a notebook shows without pyplot. Save it with `.savefig("x.png")`."""

    def __init__(self, *args, dpi: float = DPI, layout: str = "constrained", **kwargs):
        super().__init__(*args, dpi=dpi, layout=layout, **kwargs)

    def _repr_png_(self) -> bytes:
        """Return the picture that a notebook shows."""
        buffer = BytesIO()
        self.savefig(buffer, format="png")
        return buffer.getvalue()
