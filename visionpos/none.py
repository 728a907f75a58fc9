"""The control of every comparison: no position at all."""

from __future__ import annotations

from torch import Tensor

from .encoding import PositionEncoding
from .positions import Positions
from .registry import register_encoding


@register_encoding("none")
class NoEncoding(PositionEncoding):
    """Nothing is added anywhere: the model sees a set of patches. The control of every comparison."""

    place = "none"
    translation_invariant = True
    extrapolation = "formula"

    def __init__(self):
        super().__init__()

    def forward(self, x: Tensor, positions: Positions) -> Tensor:
        """Return x as it is."""
        return x
