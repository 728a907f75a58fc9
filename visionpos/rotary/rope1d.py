"""RoPE over the flat token index: RoFormer (Su et al. 2021, arXiv 2104.09864)."""

from __future__ import annotations

import math

from torch import Tensor

from ..frequencies import flat_index, geometric_frequencies
from ..options import Count, Positive
from ..positions import Positions
from ..registry import register_encoding
from ..rotation import Layout
from .scaling import FrequencyRotary


@register_encoding("rope1d")
class Rope1D(FrequencyRotary):
    """Pair i turns by p theta_i, p = y W + x, theta_i = temperature ** (-2i / head_dim), i < head_dim / 2.

    q . k depends on the difference of the flat indices alone. On images rows wrap: the last token of a row is next to
    the first of the row below.

    Args:
        num_heads: attention heads (all turn alike).
        head_dim: channels of a head, even.
        temperature: 10000 in the paper.
        layout: "interleaved" or "half".
        scaling: of the frequencies on a larger grid, see `visionpos.rotary.scaling.FrequencyRotary`.
    """

    paper = "Su et al. 2021, arXiv 2104.09864"
    translation_invariant = True
    num_series = 1
    extrapolation = "run_on"  # the paper's formula of the index
    axes = None

    def __init__(
        self,
        num_heads: Count,
        head_dim: Count,
        temperature: Positive = 10000.0,
        layout: Layout = "interleaved",
        **grid_options,
    ):
        super().__init__(num_heads, head_dim, layout, **grid_options)
        self.temperature = temperature

    def encode(self, positions: Positions) -> Tensor:
        count = self.head_dim // 2
        theta = geometric_frequencies(count, self.temperature, device=positions.coords.device)
        if self.scales:  # one axis, of all tokens
            tokens = [math.prod(shape) for shape in (positions.feat_shape, self.trained_shape)]
            theta = self.scale(theta, math.log(self.temperature) / count, tokens[:1], tokens[1:])
        return (flat_index(positions.coords, positions.feat_shape)[..., None] * theta).unsqueeze(-3)
