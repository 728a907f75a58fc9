"""LookHere: attention heads that look in one direction (Fuller et al. 2024, arXiv 2405.13985)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from ..frequencies import to_float64
from ..options import Count, Finite, Natural
from ..places import BORDER, HIDDEN, BiasEncoding
from ..positions import Positions
from ..registry import register_encoding
from .offsets import bias_of_offsets, distance

# The width of every field of view, then the directions of the first and of the second family, in degrees:
# 0 is right, 90 up, 180 left, 270 down.
PRESETS = {
    "lh180": (180, (90, 270, 180, 0), (45, 135, 315, 225)),  # half planes, straight and diagonal
    "lh90": (90, (135, 45, 225, 315), (90, 270, 180, 0)),  # corners, triangles
    "lh45": (45, (112.5, 247.5, 157.5, 22.5), (67.5, 292.5, 202.5, 337.5)),  # the eight halves of the triangles
}


def family_sizes(num_heads: int) -> tuple[int, int, int]:
    """Return the heads of the two directed families and of the undirected one.

    As in the authors' code for 6 heads (4, 0, 2) and from 12 on: whole sets of the four directions, the first family
    the largest (16 heads: 8, 4, 4). For other numbers below 12, which they leave open, thirds, rounded down.
    """
    if num_heads == 6:
        return 4, 0, 2
    if num_heads < 12:
        return num_heads // 3, num_heads // 3, num_heads - 2 * (num_heads // 3)
    sets, more = divmod(num_heads // 4, 3)
    first, second = 4 * (sets + (more > 0)), 4 * (sets + (more > 1))
    return first, second, num_heads - first - second


def field_edges(direction: float, width: float) -> list[tuple[int, int]]:
    """Return the two half planes n . (dy, dx) >= 0, n in (y, x), whose intersection is the field of view."""
    angles = [math.radians(direction + turn) for turn in (90 - width / 2, width / 2 - 90)]
    return [(round(-math.sin(angle)), round(math.cos(angle))) for angle in angles]  # whole: multiples of 45 degrees


@register_encoding("lookhere")
class LookHere(BiasEncoding):
    """Each head sees a cone of directions, and a bias that falls with distance inside it.

    b = -g s_l m_h ||p - p'|| where the key lies in head h's field of view, borders included, and -10000 elsewhere; a
    token always sees itself. g is the global slope, s_l goes linearly from 1.5 in the first layer to 0.5 in the last.

    Heads come in three families, two with the preset's directions and one that sees everything. In a directed family
    head j has the direction j mod 4 and m = 0.5 ** (1 + j // 4); undirected heads have m = 1/4, 1/16, 1/64, 1/256,
    each equally often. `family_sizes` divides any number of heads; the paper has 12, the authors' code also 6 and 16.

    Presets, with the directions of the two families in the order of the authors' code:
        lh180: half planes up, down, left, right; and up right, up left, down right, down left.
        lh90: corners up left, up right, down left, down right; triangles up, down, left, right.
        lh45: the left halves of the triangles up and down, the upper halves of left and right; then the other halves.

    A directed head tells left from right. On another grid it is the formula of grid steps, as in the authors' code;
    with extrapolate=False distances count in steps of the trained grid, by one factor for both axes.

    Args:
        num_heads: attention heads.
        layer: index of the layer, from 0.
        depth: layers of the model.
        preset: "lh45", "lh90" or "lh180", the angle of the fields of view.
        global_slope: g.
        layer_slopes: s of the first and of the last layer.

    Attributes:
        exponents: buffer (heads,) int64, -log2 of m; not in the state dict.
        edges: buffer (heads, 2, 2) int64, normals (y, x) of the two half planes of each field of view; likewise.

    Raises:
        ValueError: a layer outside the model, or an unknown preset.
    """

    paper = "Fuller et al. 2024, arXiv 2405.13985"
    translation_invariant = True
    extrapolation = "run_on"  # its fields of view are those of raw grid steps

    def __init__(
        self,
        num_heads: Count,
        layer: Natural,
        depth: Count,
        preset: Literal["lh45", "lh90", "lh180"] = "lh90",
        global_slope: Finite = 2.0,
        layer_slopes: tuple[Finite, Finite] = (1.5, 0.5),
        **grid_options,
    ):
        super().__init__(num_heads, **grid_options)
        if not 0 <= layer < depth:
            raise ValueError(f"layer must lie in [0, depth), got layer={layer}, depth={depth}")
        self.layer, self.depth, self.preset = layer, depth, preset
        self.global_slope, self.layer_slopes = global_slope, tuple(layer_slopes)
        self.register_buffer("exponents", torch.empty(num_heads, dtype=torch.long), persistent=False)
        self.register_buffer("edges", torch.empty(num_heads, 2, 2, dtype=torch.long), persistent=False)
        self.reinit_buffers()

    def reinit_buffers(self) -> None:
        """Compute the exponents and the edges again. They are whole numbers, which no cast to half precision rounds."""
        width, *families = PRESETS[self.preset]
        *directed, everything = family_sizes(self.num_heads)
        exponents = [1 + j // 4 for heads in directed for j in range(heads)]
        exponents += [2 + 2 * (4 * j // max(everything, 4)) for j in range(everything)]
        directions = [family[j % 4] for family, heads in zip(families, directed, strict=True) for j in range(heads)]
        edges = [field_edges(direction, width) for direction in directions] + [[(0, 0), (0, 0)]] * everything
        self.exponents = torch.tensor(exponents, device=self.exponents.device)
        self.edges = torch.tensor(edges, device=self.edges.device)

    def slopes(self) -> Tensor:
        """Return g s_l m_h of every head, (heads,) float64."""
        first, last = self.layer_slopes
        layer_slope = first + (last - first) * self.layer / max(self.depth - 1, 1)
        return self.global_slope * layer_slope * torch.exp2(-to_float64(self.exponents))

    def locate(self, positions: Positions) -> Positions:
        """Return the positions in the units of the trained grid, both axes by one factor: fields of view stay."""
        if self.reference_shape is None or self.runs_on:
            return positions
        shapes = zip(self.reference_shape, positions.feat_shape, strict=True)
        shorter = min((new - 1) / max(old - 1, 1) for new, old in shapes)  # the whole grid lies in the trained one
        return replace(positions, coords=positions.coords * shorter, is_grid=False)

    def encode(self, queries: Positions, keys: Positions) -> Tensor:
        slopes, edges = self.slopes().to(queries.coords), self.edges.to(queries.coords)  # (heads,), (heads, edge, axis)

        def bias(delta: Tensor) -> Tensor:
            dy, dx = -delta[..., :1], -delta[..., 1:]  # the key as the query sees it, (..., 1)
            inside = [dy * y + dx * x >= -BORDER for y, x in edges.permute(1, 2, 0)]
            return torch.where(inside[0] & inside[1], -slopes * distance(delta), HIDDEN)

        return bias_of_offsets(bias, queries, keys)

    def formula(self, positions: Positions) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        slopes = self.slopes().to(positions.coords)  # (heads,)
        return lambda head, dy, dx: -slopes[head] * torch.sqrt(dy * dy + dx * dx)

    def half_planes(self) -> Tensor:
        return self.edges
