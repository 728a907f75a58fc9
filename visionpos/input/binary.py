"""The position in binary digits: a control between the index itself and the sinusoid."""

from __future__ import annotations

import torch
from torch import Tensor

from ..frequencies import flat_index, to_float64
from ..options import Count
from ..places import InputEncoding
from ..positions import Positions
from ..registry import register_encoding


@register_encoding("binary")
class Binary(InputEncoding):
    """Add bit i of the flat row-major index p = y W + x to channel i: e_i(p) = floor(p / 2^i) mod 2, 0 or 1.

    A control. It is bounded, and channel i swings 2^i times slower than channel 0: a sinusoid is the smooth version of
    it. What fails are the steps. Neighbours such as 7 = 0111 and 8 = 1000 differ in every digit, e(p + k) is no linear
    map of e(p), since digits carry over, and e(p) . e(q), the number of ones that p and q share, jumps with the
    distance instead of falling. Real coordinates are rounded to the nearest index.

    Args:
        dim: channels of a token; those beyond the digits of the grid's last index are 0, and an index of more digits
            loses its highest.

    Example:
        >>> vp.create_encoding("binary", dim=3).embed(vp.Positions.grid((1, 6))).long().tolist()
        [[0, 0, 0], [1, 0, 0], [0, 1, 0], [1, 1, 0], [0, 0, 1], [1, 0, 1]]
    """

    paper = "a control; Fleetwood 2024, huggingface.co/blog/designing-positional-encoding"
    axes = None
    continuous = False
    extrapolation = "run_on"  # the index of the grid at hand: between whole ones there are no digits

    def __init__(self, dim: Count):
        super().__init__(dim)

    def encode(self, positions: Positions) -> Tensor:
        index = flat_index(positions.coords, positions.feat_shape).round()  # (..., N)
        weights = 2.0 ** to_float64(torch.arange(self.dim, device=index.device))  # (dim,)
        return (index[..., None] / weights).floor() % 2
