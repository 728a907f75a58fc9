"""Rescaled axial RoPE: EVA-02 (Fang et al. 2023, arXiv 2303.11331)."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from ..frequencies import geometric_frequencies, require_multiple, to_float64
from ..options import Count, Positive
from ..positions import Positions
from ..registry import register_encoding
from ..rotation import Layout
from .scaling import FrequencyRotary


@register_encoding("rope_eva")
class RopeEva(FrequencyRotary):
    """Half of the pairs turn with the row, half with the column, in the steps of the grid that was trained on.

    angles = [y' theta | x' theta], theta_k = temperature ** (-4k / head_dim), k < head_dim / 4, on the coordinates
    i' = i / n * n_ref of an axis of n cells. Grids of different size align at their top-left tokens, not end to end
    as `reference_shape` does in other encodings. q . k depends on the offset (dy, dx) alone. EVA-02 also has a learned
    table at the input: `["learned", "rope_eva"]`.

    Args:
        num_heads: attention heads (all turn alike).
        head_dim: channels of a head, a multiple of 4.
        temperature: 10000 in the paper.
        layout: "interleaved" (the paper) or "half".
        scaling: of the frequencies on a larger grid, see `visionpos.rotary.scaling.FrequencyRotary`.
    """

    paper = "Fang et al. 2023, arXiv 2303.11331"
    translation_invariant = True
    extrapolation = "interpolate"  # into the grid of pretraining, by `locate`

    def __init__(
        self,
        num_heads: Count,
        head_dim: Count,
        temperature: Positive = 10000.0,
        layout: Layout = "interleaved",
        **grid_options,
    ):
        super().__init__(num_heads, head_dim, layout, **grid_options)
        require_multiple("head_dim", head_dim, 4, "pairs of channels for each of two axes")
        self.temperature = temperature

    def locate(self, positions: Positions) -> Positions:
        if self.reference_shape is None or self.runs_on:
            return positions
        sizes = zip(to_float64(positions.coords).unbind(-1), positions.feat_shape, self.reference_shape, strict=True)
        coords = torch.stack([i / n * n_ref for i, n, n_ref in sizes], dim=-1)
        return replace(positions, coords=coords, feat_shape=self.reference_shape, is_grid=False)

    def encode(self, positions: Positions) -> Tensor:
        count = self.head_dim // 4
        theta = geometric_frequencies(count, self.temperature, device=positions.coords.device)
        theta = self.scale(theta, math.log(self.temperature) / count, positions.feat_shape, self.trained_shape)
        return (to_float64(positions.coords)[..., None] * theta).flatten(-2).unsqueeze(-3)
