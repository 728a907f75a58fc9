"""PEG: "Conditional Positional Encodings for Vision Transformers" (Chu et al. 2021, arXiv 2102.10882)."""

from __future__ import annotations

from ..registry import register_encoding
from .depthwise import DepthwiseMixing


@register_encoding("peg")
class PEG(DepthwiseMixing):
    """A depthwise convolution of the token grid after the first block: x += conv(x), zero padding tells the place.

    added(y, x) = bias + sum over i, j of kernel[i, j] token(y + i - k // 2, x + j - k // 2), zero outside the grid.

    Prefix tokens pass by. Masked or dropped tokens count as zeros, so the result depends on which tokens are kept;
    tokens that share a cell are summed. Real coordinates are rounded to their cells. Any grid size works.

    Args:
        dim: channels of a token.
        kernel_size: k, odd; 3 in the paper.
        padding: "zeros" (the paper), or "circular": the same without a border, which knows no absolute place.

    Attributes:
        proj: depthwise Conv2d, weight (dim, 1, k, k) and bias (dim,); timm's Twins has it as `pos_block.*.proj.0`.
    """

    paper = "Chu et al. 2021, arXiv 2102.10882"
    site = "tokens"
