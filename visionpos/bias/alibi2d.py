"""Two-dimensional ALiBi: CROMA (Fuller et al. 2023, arXiv 2311.00566)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..places import BiasEncoding
from ..positions import Positions
from ..registry import register_encoding
from .alibi import alibi_slopes
from .offsets import bias_of_offsets, distance


@register_encoding("alibi2d")
class Alibi2D(BiasEncoding):
    """b = -m_h ||p - p'||, the Euclidean distance in units of one grid step, slopes m_h by `alibi_slopes`.

    Isotropic: it knows how far, never in which direction.

    Args:
        num_heads: attention heads.
    """

    paper = "Fuller et al. 2023, arXiv 2311.00566"
    translation_invariant = True
    extrapolation = "run_on"  # to train on small pictures and test on larger ones is what it is made for
    axes = None

    def encode(self, queries: Positions, keys: Positions) -> Tensor:
        slopes = alibi_slopes(self.num_heads, device=queries.coords.device, dtype=queries.coords.dtype)
        return bias_of_offsets(lambda delta: -slopes * distance(delta), queries, keys)

    def formula(self, positions: Positions) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        slopes = alibi_slopes(self.num_heads, device=positions.coords.device, dtype=positions.coords.dtype)
        return lambda head, dy, dx: -slopes[head] * torch.sqrt(dy * dy + dx * dx)
