"""Angles of axial rotation, and how released encoders deal channels and frequencies out to the axes: their dialects.

Tokens on one axis are a row of a picture, with x alone; on three they are those of a video, (t, y, x).
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from ..frequencies import geometric_frequencies, require_multiple, to_float64
from ..positions import Positions
from ..rotation import AxialLayout
from .scaling import FrequencyRotary

Preset = Literal["rope_vit", "moonvit", "pixtral", "qwen_vit", "gemma4", "mrope"]


class Dialect(NamedTuple):
    """One way to deal pairs of channels out to the axes."""

    order: str  # of the axes of a video; tokens have the last of (t, y, x)
    in_turn: bool  # pair after pair; otherwise one block for each axis
    one_series: bool  # a frequency serves one pair; otherwise one pair of each axis
    temperature: float
    layout: AxialLayout
    least: int = 1  # axes that have pairs, though a token has fewer coordinates: those pairs stand still

    def axes(self, count: int) -> list[str]:
        """Return the axes that have pairs where a token has `count` coordinates, in their order.

        Raises:
            ValueError: more than three coordinates.
        """
        if count > 3:
            raise ValueError(f"axial rotation needs 1 to 3 coordinates of a token, got {count}")
        return [axis for axis in self.order if axis in AXES[-max(count, self.least) :]]


AXES = "tyx"  # the coordinates of a token are the last of them
DIALECTS: dict[str, Dialect] = {
    "rope_vit": Dialect("xyt", False, False, 100.0, "interleaved"),
    "moonvit": Dialect("xyt", True, False, 10000.0, "interleaved"),
    "pixtral": Dialect("tyx", False, True, 10000.0, "half"),
    "qwen_vit": Dialect("tyx", False, False, 10000.0, "half"),
    "gemma4": Dialect("xyt", False, False, 100.0, "half_per_axis"),
    "mrope": Dialect("tyx", True, True, 10000.0, "half", least=3),
}


def axial_frequencies(
    pairs: int, temperature: float, dialect: Dialect, count: int = 2, device=None
) -> Float[Tensor, "rounds axes"]:
    """Return the frequencies of each axis, (rounds, axes), float64; read row by row they are those of pairs in turn.

    Raises:
        ValueError: pairs that do not divide among the axes of `count` coordinates.
    """
    axes = len(dialect.axes(count))
    if not (dialect.one_series and dialect.in_turn):
        require_multiple("head_dim", 2 * pairs, 2 * axes, f"pairs of channels for each of {axes} axes")
    if dialect.one_series:
        series = geometric_frequencies(pairs, temperature, device=device)
        return F.pad(series, (0, -pairs % axes)).view(-1, axes)
    return geometric_frequencies(pairs // axes, temperature, device=device).unsqueeze(1).expand(-1, axes)


def scale_axial(rope: FrequencyRotary, frequencies: Tensor, positions: Positions, dialect: Dialect) -> Tensor:
    """Return the frequencies (..., rounds, axes) of a rotation as its scaling has them on the grid at hand."""
    if not rope.scales:
        return frequencies
    axes = dialect.axes(len(positions.feat_shape))
    grids = ((1,) * 3 + tuple(grid) for grid in (positions.feat_shape, rope.trained_shape))
    sizes, trained = ([grid[AXES.index(axis) - 3] for axis in axes] for grid in grids)
    step = math.log(rope.temperature) / rope.num_angles  # of one series; each axis has every second, or its own
    fastest = [math.exp(-step * first) if dialect.one_series else 1.0 for first in range(len(axes))]
    return rope.scale(frequencies.mT, len(axes) * step, sizes, trained, fastest).mT


def axial_angles(
    coords: Float[Tensor, "*batch n count"],
    frequencies: Float[Tensor, "*heads rounds axes"],
    pairs: int,
    dialect: Dialect,
) -> Float[Tensor, "*batch heads n pairs"]:
    """Return the angles of coordinates (y, x), ([B,] heads or 1, N, pairs), in float64 and in the dialect's order."""
    places = F.pad(to_float64(coords), (3 - coords.shape[-1], 0)).unsqueeze(-3).unbind(-1)  # t, y, x: ([B,] 1, N) each
    axes = dialect.axes(coords.shape[-1])
    coords = torch.stack([places[AXES.index(axis)] for axis in axes], dim=-1).unsqueeze(-2)  # ([B,] 1, N, 1, axes)
    angles = coords * frequencies.unsqueeze(-3)  # ([B,] heads or 1, N, rounds, axes)
    return (angles if dialect.in_turn else angles.mT).flatten(-2)[..., :pairs]


def rope_angles_axial(
    feat_shape: tuple[int, ...],
    head_dim: int,
    temperature: float = 100.0,
    *,
    device=None,
    dtype: torch.dtype | None = None,
) -> Float[Tensor, "n pairs"]:
    """Return the angles of a whole grid in radians, (H * W, head_dim / 2): half of them turn with x, then half with y.

    Raises:
        ValueError: `head_dim` is not a multiple of 4, or a temperature that is not positive.

    Example:
        >>> angles = vp.rope_angles_axial((2, 3), head_dim=8)
        >>> angles.shape, vp.apply_rotary(torch.randn(1, 4, 6, 8), angles).shape
        (torch.Size([6, 4]), torch.Size([1, 4, 6, 8]))
    """
    grid, pairs, dialect = Positions.grid(feat_shape, device=device), head_dim // 2, DIALECTS["rope_vit"]
    require_multiple("head_dim", head_dim, 4, "pairs of channels for each of two axes")
    theta = axial_frequencies(pairs, temperature, dialect, len(grid.feat_shape), device)
    return axial_angles(grid.coords, theta, pairs, dialect).squeeze(0).to(dtype or torch.get_default_dtype())
