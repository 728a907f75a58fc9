"""Axial RoPE: "Rotary Position Embedding for Vision Transformer" (Heo et al. 2024, arXiv 2403.13298)."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from ..frequencies import geometric_frequencies, require_multiple, to_float64
from ..options import Count, Positive
from ..places import RotaryEncoding
from ..positions import Positions
from ..registry import register_encoding
from ..rotation import Layout


def _encode(coords: Tensor, head_dim: int, temperature: float) -> Tensor:
    theta = geometric_frequencies(head_dim // 4, temperature, device=coords.device)
    y, x = (to_float64(coords)[..., None] * theta).unbind(-2)
    return torch.cat([x, y], dim=-1)  # (..., N, head_dim / 2)


def rope_angles_axial(
    feat_shape: tuple[int, int],
    head_dim: int,
    temperature: float = 100.0,
    *,
    device=None,
    dtype: torch.dtype | None = None,
) -> Float[Tensor, "n pairs"]:
    """Angles of a whole grid in radians, (H * W, head_dim / 2): the first half turns with x, the second with y.

    Raises:
        ValueError: `head_dim` is not a multiple of 4, or a temperature that is not positive.

    Example:
        >>> angles = vp.rope_angles_axial((2, 3), head_dim=8)
        >>> angles.shape, vp.apply_rotary(torch.randn(1, 4, 6, 8), angles).shape
        (torch.Size([6, 4]), torch.Size([1, 4, 6, 8]))
    """
    require_multiple("head_dim", head_dim, 4, "pairs of channels for each of two axes")
    coords = Positions.grid(tuple(feat_shape), device=device).coords
    return _encode(coords, head_dim, temperature).to(dtype or torch.get_default_dtype())


@register_encoding("rope_axial")
class RopeAxial(RotaryEncoding):
    """Half of the pairs turn with the column, half with the row.

    angles = [x theta | y theta], theta_k = temperature ** (-4k / head_dim), k < head_dim / 4, in units of one grid
    step. q . k depends on the offset (dy, dx) alone.

    Args:
        num_heads: attention heads (all turn alike).
        head_dim: channels of a head, a multiple of 4.
        temperature: 100 in the paper (50 in its Swin).
        layout: "interleaved" (the paper) or "half".
    """

    paper = "Heo et al. 2024, arXiv 2403.13298"
    translation_invariant = True
    num_series = 2

    def __init__(
        self,
        num_heads: Count,
        head_dim: Count,
        temperature: Positive = 100.0,
        layout: Layout = "interleaved",
        **grid_options,
    ):
        super().__init__(num_heads, head_dim, layout, **grid_options)
        require_multiple("head_dim", head_dim, 4, "pairs of channels for each of two axes")
        self.temperature = temperature

    def encode(self, positions: Positions) -> Tensor:
        return _encode(positions.coords, self.head_dim, self.temperature).unsqueeze(-3)
