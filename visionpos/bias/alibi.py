"""ALiBi over the flat token index: "Train Short, Test Long" (Press et al. 2021, arXiv 2108.12409)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from ..frequencies import flat_index, to_float64
from ..places import BiasEncoding
from ..positions import Positions
from ..registry import register_encoding


def alibi_slopes(num_heads: int, *, device=None, dtype: torch.dtype | None = None) -> Float[Tensor, " heads"]:
    """Return one slope per head, (heads,); computed on the device, without a copy from the host.

    For a power of two: 2 ** (-8 (i + 1) / heads), i = 0 .. heads - 1. Otherwise the slopes of the next lower power of
    two, then every other one of the next higher: the order is not monotone.

    Raises:
        ValueError: `num_heads` is not positive.

    Example:
        >>> vp.alibi_slopes(4).tolist()
        [0.25, 0.0625, 0.015625, 0.00390625]
    """
    if num_heads < 1:
        raise ValueError(f"num_heads must be positive, got {num_heads}")
    lower = 2 ** (num_heads.bit_length() - 1)

    def powers(count: int) -> Tensor:
        return 2.0 ** (-8 * to_float64(torch.arange(1, count + 1, device=device)) / count)

    slopes = torch.cat([powers(lower), powers(2 * lower)[0::2][: num_heads - lower]])
    return slopes.to(dtype or torch.get_default_dtype())


@register_encoding("alibi")
class Alibi(BiasEncoding):
    """b = -m_h |i - j| on flat row-major indices i = y W + x, slopes m_h by `alibi_slopes`.

    The symmetric form for attention in both directions. It falls with every step of distance and is unbounded.

    Args:
        num_heads: attention heads.
    """

    paper = "Press et al. 2021, arXiv 2108.12409"
    translation_invariant = True
    extrapolation = "run_on"  # to train short and test long is what it is made for
    axes = None

    def encode(self, queries: Positions, keys: Positions) -> Tensor:
        q = flat_index(queries.coords, queries.feat_shape)
        k = flat_index(keys.coords, keys.feat_shape)
        distance = (q[..., :, None] - k[..., None, :]).abs()
        slopes = alibi_slopes(self.num_heads, device=q.device, dtype=q.dtype)
        return -slopes[:, None, None] * distance.unsqueeze(-3)

    def formula(self, positions: Positions) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        slopes = alibi_slopes(self.num_heads, device=positions.coords.device, dtype=positions.coords.dtype)
        width = positions.feat_shape[1]
        return lambda head, dy, dx: -slopes[head] * torch.abs(dy * width + dx)
