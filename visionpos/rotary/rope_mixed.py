"""RoPE-Mixed: "Rotary Position Embedding for Vision Transformer" (Heo et al. 2024, arXiv 2403.13298)."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ..frequencies import geometric_frequencies, require_multiple, to_float64
from ..options import Count, Positive
from ..positions import Positions
from ..registry import register_encoding
from ..rotation import Layout, mixed_angles
from .scaling import FrequencyRotary, LearnedScaling


@register_encoding("rope_mixed")
class RopeMixed(FrequencyRotary):
    """Every pair of every head turns along a learned direction: angle = freqs[0] x + freqs[1] y.

    At the start a head is `rope_axial` with its axes turned by a random angle a: half of the pairs turn along
    (cos a, sin a), the others along (cos(a + pi/2), sin(a + pi/2)), both with the magnitudes
    temperature ** (-4k / head_dim), k < head_dim / 4. q . k depends on the offset (dy, dx) alone.

    rope-vit keeps the frequencies of all L layers in one (2, L, heads * head_dim / 2) and timm in one
    (2, L, heads, head_dim / 2), in the same memory order; here every layer has its own slice [:, l].

    Args:
        num_heads: attention heads.
        head_dim: channels of a head, a multiple of 4.
        temperature: 10 in the paper; of the initialisation only.
        layout: "interleaved" (the paper) or "half".
        scaling: on a larger grid: "interpolate", "run_on" or "linear", see `visionpos.rotary.scaling`. Learned
            frequencies are no geometric series, whose ends NTK and YaRN would need.

    Attributes:
        freqs: Parameter (2, heads, head_dim / 2); row 0 multiplies x, row 1 y.
    """

    paper = "Heo et al. 2024, arXiv 2403.13298"
    learnable = True
    translation_invariant = True
    num_series = 2
    extrapolation = "run_on"  # raw grid steps at every size, as in the authors' code

    def __init__(
        self,
        num_heads: Count,
        head_dim: Count,
        temperature: Positive = 10.0,
        layout: Layout = "interleaved",
        scaling: LearnedScaling | None = None,
        **grid_options,
    ):
        super().__init__(num_heads, head_dim, layout, scaling, **grid_options)
        require_multiple("head_dim", head_dim, 4, "pairs of channels for each of two directions")
        self.temperature = temperature
        self.freqs = nn.Parameter(torch.empty(2, num_heads, head_dim // 2))
        self.reset_parameters()

    @staticmethod
    def initial_freqs(
        rotations: Float[Tensor, " heads"], head_dim: int, temperature: float = 10.0
    ) -> Float[Tensor, "2 heads pairs"]:
        """The frequencies before training, for given head rotations in radians: (2, heads, head_dim / 2), float64."""
        magnitude = geometric_frequencies(head_dim // 4, temperature, device=rotations.device)
        directions = torch.stack([to_float64(rotations), to_float64(rotations) + math.pi / 2], dim=-1)  # (heads, 2)
        unit = torch.stack([directions.cos(), directions.sin()])  # (2, heads, 2)
        return (unit.unsqueeze(-1) * magnitude).flatten(2)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw a rotation for every head, uniform in [0, 2 pi)."""
        rotations = 2 * math.pi * torch.rand(self.num_heads, device=self.freqs.device)
        self.freqs.copy_(self.initial_freqs(rotations, self.head_dim, self.temperature))

    def encode(self, positions: Positions) -> Tensor:
        return mixed_angles(self.shrink(positions), self.freqs)
