"""Rescaled axial RoPE: EVA-02 (Fang et al. 2023, arXiv 2303.11331)."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from ..encoding import put_in_front
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
        register_temperature: gives register tokens positions; 100 in ViT-5 (Wang et al. 2026, arXiv 2602.08071). R
            registers turn as patches on a grid of sqrt(R) x sqrt(R) do, with this temperature. The number of prefix
            tokens says what they are: a square number are registers, one more has a class token in front of them,
            which does not turn. None: no prefix token turns.

    Raises:
        ValueError: another number of prefix tokens, with `register_temperature`.
    """

    paper = "Fang et al. 2023, arXiv 2303.11331"
    translation_invariant = True
    num_series = 2
    extrapolation = "interpolate"  # into the grid of pretraining, by `locate`

    def __init__(
        self,
        num_heads: Count,
        head_dim: Count,
        temperature: Positive = 10000.0,
        layout: Layout = "interleaved",
        register_temperature: Positive | None = None,
        **grid_options,
    ):
        super().__init__(num_heads, head_dim, layout, **grid_options)
        require_multiple("head_dim", head_dim, 4, "pairs of channels for each of two axes")
        self.temperature, self.register_temperature = temperature, register_temperature

    def locate(self, positions: Positions) -> Positions:
        if self.reference_shape is None or self.runs_on:
            return positions
        sizes = zip(to_float64(positions.coords).unbind(-1), positions.feat_shape, self.reference_shape, strict=True)
        coords = torch.stack([i / n * n_ref for i, n, n_ref in sizes], dim=-1)
        return replace(positions, coords=coords, feat_shape=self.reference_shape, is_grid=False)

    def encode(self, positions: Positions) -> Tensor:
        return self._turned(positions, self.temperature)

    def encode_prefix(self, num_prefix_tokens: int, device: torch.device) -> Tensor | None:
        if self.register_temperature is None:
            return None
        side = math.isqrt(num_prefix_tokens)
        others = num_prefix_tokens - side**2  # a class token
        if others > 1:
            raise ValueError(
                f"{self.name}: register_temperature needs a square number of registers, and at most a class token in "
                f"front of them, got {num_prefix_tokens} prefix tokens"
            )
        return put_in_front(
            self._turned(Positions.grid((side, side), device=device), self.register_temperature), None, others
        )

    def _turned(self, positions: Positions, temperature: float) -> Tensor:
        count = self.head_dim // 4
        theta = geometric_frequencies(count, temperature, device=positions.coords.device)
        theta = self.scale(theta, math.log(temperature) / count, positions.feat_shape, self.trained_shape)
        return (to_float64(positions.coords)[..., None] * theta).flatten(-2).unsqueeze(-3)
