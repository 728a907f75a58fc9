"""The position itself as a vector: a control that shows why encodings are not made so."""

from __future__ import annotations

import math

import torch.nn.functional as F
from torch import Tensor

from ..frequencies import flat_index
from ..options import Count
from ..places import InputEncoding
from ..positions import Positions
from ..registry import register_encoding


@register_encoding("scalar")
class Scalar(InputEncoding):
    """Add the flat row-major index p = y W + x to the first channel of a token, or p / N with N = H W.

    A control, the first idea of how to encode a position. The index is not bounded, and drowns what the tokens say.
    Divided by the length it is, but then two neighbours are as far apart as the length of the grid says, 1 / N. Nor is
    e(p + k) a linear map of e(p): p + k is none of p. And e(p) . e(q) = p q grows with q instead of falling with the
    distance. It stands in one channel, because a layer norm takes away what all channels share.

    Args:
        dim: channels of a token.
        divided: by the length: p / N in place of p.

    Example:
        >>> vp.create_encoding("scalar", dim=2).embed(vp.Positions.grid((2, 2))).tolist()
        [[0.0, 0.0], [1.0, 0.0], [2.0, 0.0], [3.0, 0.0]]
    """

    paper = "a control; Fleetwood 2024, huggingface.co/blog/designing-positional-encoding"
    axes = None
    extrapolation = "run_on"  # the index of the grid at hand

    def __init__(self, dim: Count, divided: bool = False):
        super().__init__(dim)
        self.divided = divided

    def encode(self, positions: Positions) -> Tensor:
        index = flat_index(positions.coords, positions.feat_shape)  # (..., N)
        if self.divided:
            index = index / math.prod(positions.feat_shape)
        return F.pad(index[..., None], (0, self.dim - 1))
