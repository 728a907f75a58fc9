"""iRPE: "Rethinking and Improving Relative Position Encoding for Vision Transformer" (Wu et al. 2021)."""

from __future__ import annotations

import math
from typing import Annotated, Literal

import torch
from torch import Tensor

from ..options import Count, Natural, Range, Spread
from ..registry import register_encoding
from .buckets import BucketBias

Method = Literal["product", "euclid", "quant", "cross"]
Ratio = Annotated[float, Range(lambda value: 0.01 <= value <= 64, "a number from 0.01 to 64")]


def piecewise_index(x: Tensor, ratio: float) -> Tensor:
    """Return iRPE's g: exact near zero, logarithmic farther off, int64 in [-int(beta), int(beta)].

    g(x) = round(x) for |x| <= alpha, else sign(x) min(beta, round(alpha + ln(|x| / alpha) / ln(gamma / alpha)
    (beta - alpha))), with alpha, beta, gamma = ratio, 2 ratio, 8 ratio.
    """
    distance = x.abs()
    far = ratio * (1 + (distance.clamp(min=ratio) / ratio).log() / math.log(8))  # 1 beyond ratio, at most 2 at 8 ratio
    return (x.sign() * torch.where(distance <= ratio, distance, far).round().clamp(max=int(2 * ratio))).long()


@register_encoding("irpe")
class IRPE(BucketBias):
    """Offsets fall into buckets, finer near by; each has a vector that the query meets: b = q . r[bucket] / sqrt(d).

    Offsets (dy, dx) are query minus key, S = 2 int(2 ratio) + 1, c = int(2 ratio), and g is `piecewise_index`:
        product: bucket (g(dy) + c) S + g(dx) + c, S^2 in all; 49 by default.
        euclid: g(round(sqrt(dy^2 + dx^2))) + c, S in all, of which half are used, as in the reference code.
        quant: g(dy^2 + dx^2) + c, as the reference code computes it (the paper counts distinct distances instead).
        cross: two tables, g(dy) + c and g(dx) + c, whose biases are added.

    q is scaled as in the logits: the reference code multiplies q by head_dim ** -0.5 first. Contextual on keys is the
    paper's best single choice. With `values` the output also gets sum_j p_ij r'[bucket], which leaves the fused
    attention kernel. Real offsets are rounded. All heads share the vectors and, as by default in the reference code,
    the numbers of "bias" mode. Pairs with a prefix token have a bucket of their own, the last, where the encoding is
    built with prefix tokens; without, they have no bias.

    Args:
        num_heads: attention heads.
        head_dim: channels of a head.
        num_prefix_tokens: 0, or more for the bucket of pairs with a prefix token.
        method: "product" (the paper's default), "euclid", "quant" or "cross".
        mode: "contextual", or "bias": a number per bucket, whatever the query, not scaled.
        ratio: 1.9 in the paper; alpha, beta, gamma are 1, 2 and 8 times it.
        values: vectors on the value side as well; contextual whatever the mode.
        init_std: standard deviation of the normal initialisation; 0 in the reference code.
        shared_head: False, in "bias" mode alone, gives every head numbers of its own.

    Attributes:
        key_table: Parameter (1, or 2 for "cross", buckets, head_dim); in "bias" mode the last is 1, or heads.
        value_table: Parameter (1 or 2, buckets, head_dim), or None.
    """

    paper = "Wu et al. 2021, arXiv 2107.14222"
    learnable = True
    from_model = ("num_prefix_tokens",)
    translation_invariant = True
    extrapolation = "run_on"  # its buckets hold every offset in grid steps
    continuous = False

    def __init__(
        self,
        num_heads: Count,
        head_dim: Count,
        num_prefix_tokens: Natural = 0,
        method: Method = "product",
        mode: Literal["contextual", "bias"] = "contextual",
        ratio: Ratio = 1.9,
        values: bool = False,
        init_std: Spread = 0.0,
        shared_head: bool = True,
        **grid_options,
    ):
        super().__init__(num_heads, **grid_options)
        if values and mode == "bias":
            raise ValueError("values=True needs mode='contextual': in bias mode iRPE has no value side")
        if mode == "contextual" and not shared_head:
            raise ValueError("shared_head=False needs mode='bias': the vectors of contextual mode are for all heads")
        self.method, self.mode, self.ratio, self.shared_head = method, mode, ratio, shared_head
        per_axis = 2 * int(2 * ratio) + 1
        buckets = per_axis**2 if method == "product" else per_axis
        channels = head_dim if mode == "contextual" else 1 if shared_head else num_heads
        shape = (2 if method == "cross" else 1, buckets, channels)
        self.create_tables(head_dim, shape, num_prefix_tokens, values, init_std)

    def bucket(self, delta: Tensor) -> Tensor:
        if self.method == "euclid":
            delta = torch.linalg.vector_norm(delta, dim=-1, keepdim=True).round()
        elif self.method == "quant":
            delta = delta.square().sum(-1, keepdim=True)
        centre = int(2 * self.ratio)
        index = (piecewise_index(delta, self.ratio) + centre).movedim(-1, 0)
        return index[:1] * (2 * centre + 1) + index[1:] if self.method == "product" else index

    def scores(self, content: Tensor) -> Tensor:
        if self.mode == "contextual":
            return super().scores(content)
        numbers = self.key_table.to(content.dtype).transpose(1, 2)[:, None, :, None]  # (tables, 1, 1 or heads, 1, rows)
        return numbers.expand(-1, *content.shape[:3], -1)
