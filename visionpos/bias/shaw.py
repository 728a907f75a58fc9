"""Relative position vectors: "Self-Attention with Relative Position Representations" (Shaw et al. 2018)."""

from __future__ import annotations

import torch
from torch import Tensor

from ..frequencies import require_multiple
from ..options import Count, Natural, Spread
from ..registry import register_encoding
from .buckets import BucketBias


@register_encoding("shaw")
class Shaw(BucketBias):
    """Every offset has a key vector that the query meets: b = q . [a_x[clip(dx)] | a_y[clip(dy)]] / sqrt(head_dim).

    Offsets are key minus query, as in the paper, clipped at +-clip per axis. q is scaled as in the logits:
    (q . k + q . a) / sqrt(head_dim). All heads share the vectors. The paper is about text; its images are by the
    public CIFAR comparison (s-chh), where half of a head's channels belong to x and half to y.

    With `values` each offset also has a value vector: out_i += sum_j p_ij [c_x[clip(dx)] | c_y[clip(dy)]]. That needs
    the probabilities, so the fused attention kernel is left; hence an option, though both sources have it.

    Real offsets go to the nearest integer. Pairs with a prefix token share one vector, as in the CIFAR comparison,
    where the encoding is built with prefix tokens; without, they have no bias.

    Args:
        num_heads: attention heads.
        head_dim: channels of a head, even.
        num_prefix_tokens: 0, or more for the row of pairs with a prefix token.
        clip: largest offset that is told apart; 2 in the CIFAR comparison, 16 for text in the paper, which finds
            little difference from 2 on.
        values: value vectors as well.
        init_std: standard deviation of the normal initialisation; None: head_dim ** -0.5. 1 in the CIFAR comparison.

    Attributes:
        key_table: Parameter (2, 2 clip + 1, head_dim / 2), x then y, row clip + offset; the last row, if the encoding
            was built with prefix tokens, is one more, for them.
        value_table: the same, or None.
    """

    paper = "Shaw et al. 2018, arXiv 1803.02155"
    learnable = True
    from_model = ("num_prefix_tokens",)
    translation_invariant = True
    extrapolation = "run_on"  # offsets are clipped so that longer sequences have none that is new
    continuous = False

    def __init__(
        self,
        num_heads: Count,
        head_dim: Count,
        num_prefix_tokens: Natural = 0,
        clip: Count = 2,
        values: bool = False,
        init_std: Spread | None = None,
        **grid_options,
    ):
        super().__init__(num_heads, **grid_options)
        require_multiple("head_dim", head_dim, 2, "half of the channels for each axis")
        self.clip = clip
        init_std = head_dim**-0.5 if init_std is None else init_std
        self.create_tables(head_dim, (2, 2 * clip + 1, head_dim // 2), num_prefix_tokens, values, init_std)

    def bucket(self, delta: Tensor) -> Tensor:
        dy, dx = (-delta).round().clamp(-self.clip, self.clip).long().unbind(-1)
        return torch.stack([dx, dy]) + self.clip
