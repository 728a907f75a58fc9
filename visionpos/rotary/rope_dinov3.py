"""RoPE on a centred box: DINOv3 (Simeoni et al. 2025, arXiv 2508.10104)."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from ..encoding import Shape
from ..frequencies import geometric_frequencies, require_multiple, to_float64
from ..options import Count, Positive
from ..positions import Positions
from ..registry import register_encoding
from ..rotation import Layout
from .scaling import FrequencyRotary


@register_encoding("rope_dinov3")
class RopeDinoV3(FrequencyRotary):
    """Half of the pairs turn with the row, half with the column, on the box [-1, 1] whatever the grid.

    angles = 2 pi [y' / period | x' / period], i' = 2 (i + 1/2) / n - 1 on an axis of n cells, period_k =
    temperature ** (4k / head_dim), k < head_dim / 4. A larger grid samples the same box more densely. q . k depends on
    the offset (dy, dx) alone. Shift, jitter and rescaling of coordinates in training belong to the positions.

    The fastest pair has the period 1 on a box of length 2: two tokens half an image apart look the same to it, and on
    a grid of two rows both rows do. Tiny grids need a longer `min_period`.

    Args:
        num_heads: attention heads (all turn alike).
        head_dim: channels of a head, a multiple of 4.
        temperature: longest period that the geometric series would reach; 100 in the paper.
        min_period: shortest period, together with `max_period` in place of `temperature`.
        max_period: longest period; both ends are included.
        normalize: n is the axis' own size ("separate"), or the larger ("max") or smaller ("min") of both. With "max"
            and "min" a grid that is not square is not centred, and "min" leaves the box.
        layout: "half" (the paper) or "interleaved".
        scaling: of the frequencies on a larger grid, see `visionpos.rotary.scaling.FrequencyRotary`.
        zero_fraction: share of the frequencies, the lowest, that are 0.

    Raises:
        ValueError: one period without the other, periods that are not 0 < min_period <= max_period, or none at all.
    """

    paper = "Simeoni et al. 2025, arXiv 2508.10104"
    translation_invariant = True
    num_series = 2
    extrapolation = "formula"  # the box

    def __init__(
        self,
        num_heads: Count,
        head_dim: Count,
        temperature: Positive | None = 100.0,
        min_period: Positive | None = None,
        max_period: Positive | None = None,
        normalize: Literal["separate", "max", "min"] = "separate",
        layout: Layout = "half",
        **grid_options,
    ):
        super().__init__(num_heads, head_dim, layout, **grid_options)
        require_multiple("head_dim", head_dim, 4, "pairs of channels for each of two axes")
        if (min_period is None) != (max_period is None):
            raise ValueError(f"min_period and max_period come together, got {min_period} and {max_period}")
        if min_period is not None and min_period > max_period:
            raise ValueError(f"periods must be 0 < min_period <= max_period, got {min_period} and {max_period}")
        if min_period is not None and temperature not in (None, 100.0):
            raise ValueError(f"temperature={temperature} and min_period, max_period exclude each other: give one")
        if min_period is None and temperature is None:
            raise ValueError("temperature must be a number where min_period and max_period are not given, got None")
        self.temperature = temperature if min_period is None else None
        self.min_period, self.max_period, self.normalize = min_period, max_period, normalize

    def locate(self, positions: Positions) -> Positions:
        return positions

    def normalizers(self, feat_shape: Shape) -> Shape:
        """Return n of each axis of a grid."""
        if self.normalize == "separate":
            return feat_shape
        return ({"max": max, "min": min}[self.normalize](feat_shape),) * len(feat_shape)

    def encode(self, positions: Positions) -> Tensor:
        sizes, count, coords = self.normalizers(positions.feat_shape), self.head_dim // 4, to_float64(positions.coords)
        box = torch.stack([2 * (i + 0.5) / n - 1 for i, n in zip(coords.unbind(-1), sizes, strict=True)], dim=-1)
        if self.min_period is None:
            longest, shortest, inclusive = self.temperature, 1.0, False
        else:
            longest, shortest, inclusive = self.max_period / self.min_period, self.min_period, True
        frequencies = geometric_frequencies(count, longest, inclusive=inclusive, device=box.device) / shortest
        if self.runs_on:
            trained = self.normalizers(self.trained_shape)
            box = torch.stack([u * (n / t) for u, n, t in zip(box.unbind(-1), sizes, trained, strict=True)], dim=-1)
            fastest = [4 * math.pi / n / shortest for n in trained]
            ratio = math.log(longest) / max(count - inclusive, 1)
            frequencies = self.scale(frequencies, ratio, positions.feat_shape, self.trained_shape, fastest)
        return (2 * math.pi * box[..., None] * frequencies).flatten(-2).unsqueeze(-3)
