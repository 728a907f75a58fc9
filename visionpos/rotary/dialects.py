"""How released encoders deal channels and frequencies out to the axes of axial rotation: their dialects as records."""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from ..frequencies import geometric_frequencies, to_float64
from ..positions import Positions
from ..rotation import AxialLayout
from .scaling import FrequencyRotary

Preset = Literal["rope_vit", "moonvit", "pixtral", "qwen_vit", "gemma4", "mrope"]


class Dialect(NamedTuple):
    """One way to deal pairs of channels out to the axes."""

    axes: str  # in which order they come; t, the time of a video, stands still in a picture
    in_turn: bool  # pair after pair; otherwise one block for each axis
    one_series: bool  # a frequency serves one pair; otherwise one pair of each axis
    temperature: float
    layout: AxialLayout


DIALECTS: dict[str, Dialect] = {
    "rope_vit": Dialect("xy", False, False, 100.0, "interleaved"),
    "moonvit": Dialect("xy", True, False, 10000.0, "interleaved"),
    "pixtral": Dialect("yx", False, True, 10000.0, "half"),
    "qwen_vit": Dialect("yx", False, False, 10000.0, "half"),
    "gemma4": Dialect("xy", False, False, 100.0, "half_per_axis"),
    "mrope": Dialect("tyx", True, True, 10000.0, "half"),
}


def axial_frequencies(pairs: int, temperature: float, dialect: Dialect, device=None) -> Float[Tensor, "rounds axes"]:
    """Return the frequencies of each axis, (rounds, axes), float64; read row by row they are those of pairs in turn."""
    axes = len(dialect.axes)
    if dialect.one_series:
        series = geometric_frequencies(pairs, temperature, device=device)
        return F.pad(series, (0, -pairs % axes)).view(-1, axes)
    return geometric_frequencies(pairs // axes, temperature, device=device).unsqueeze(1).expand(-1, axes)


def scale_axial(rope: FrequencyRotary, frequencies: Tensor, positions: Positions, dialect: Dialect) -> Tensor:
    """Return the frequencies (..., rounds, axes) of a rotation as its scaling has them on the grid at hand."""
    if not rope.scales:
        return frequencies
    grids = positions.feat_shape, rope.trained_shape
    sizes, trained = ([(*grid, 1)["yxt".index(axis)] for axis in dialect.axes] for grid in grids)
    step = math.log(rope.temperature) / rope.num_angles  # of one series; each axis has every second, or its own
    fastest = [math.exp(-step * first) if dialect.one_series else 1.0 for first in range(len(dialect.axes))]
    return rope.scale(frequencies.mT, len(dialect.axes) * step, sizes, trained, fastest).mT


def axial_angles(
    coords: Float[Tensor, "*batch n 2"], frequencies: Float[Tensor, "*heads rounds axes"], pairs: int, dialect: Dialect
) -> Float[Tensor, "*batch heads n pairs"]:
    """Return the angles of coordinates (y, x), ([B,] heads or 1, N, pairs), in float64 and in the dialect's order."""
    y, x = to_float64(coords).unsqueeze(-3).unbind(-1)  # ([B,] 1, N)
    axes = {"t": torch.zeros_like(y), "y": y, "x": x}
    coords = torch.stack([axes[axis] for axis in dialect.axes], dim=-1).unsqueeze(-2)  # ([B,] 1, N, 1, axes)
    angles = coords * frequencies.unsqueeze(-3)  # ([B,] heads or 1, N, rounds, axes)
    return (angles if dialect.in_turn else angles.mT).flatten(-2)[..., :pairs]
