"""LePE: "CSWin Transformer" (Dong et al. 2021, arXiv 2107.00652)."""

from __future__ import annotations

from ..registry import register_encoding
from .depthwise import DepthwiseMixing


@register_encoding("lepe")
class LePE(DepthwiseMixing):
    """A depthwise convolution of the values, added to what attention returns: softmax(q k^T / sqrt(d)) v + conv(v).

    added(y, x) = bias + sum over i, j of kernel[i, j] v(y + i - k // 2, x + j - k // 2), zero outside the grid; in
    window attention the grid is the window, as in the paper.

    Prefix tokens get nothing. Masked or dropped tokens count as zeros, so the result depends on which tokens are
    kept; tokens that share a cell are summed. Real coordinates are rounded to their cells. Any grid size works.

    Args:
        dim: channels of all heads together, head after head.
        kernel_size: k, odd; 3 in the paper.
        padding: "zeros" (the paper), or "circular": the same without a border, which knows no absolute place.

    Attributes:
        proj: depthwise Conv2d, weight (dim, 1, k, k) and bias (dim,); CSWin's code calls it `get_v`.
    """

    paper = "Dong et al. 2021, arXiv 2107.00652"
    site = "values"
