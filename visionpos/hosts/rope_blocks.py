"""Attention and blocks of timm's that take a rope: EVA's, the rope ViTs', and those of some vision towers."""

from __future__ import annotations

from typing import ClassVar

from timm.layers import AttentionRope
from timm.models.eva import EvaAttention, EvaBlock, EvaBlockPostNorm
from torch import Tensor

from ..encoding import OneNode
from .attention import AttentionContext, caller_masks, math_is_faster, prepare_encodings, self_attention, split_heads
from .isotropic import mix
from .projections import into_heads, project


class EncodedRopeMixin:
    """Self-attention with encodings, on tokens x (B, prefix + N, C)."""

    def forward(self, x: Tensor, rope: AttentionContext | None = None, attn_mask=None, is_causal: bool = False):
        """Return tokens (B, prefix + N, C).

        `rope`, timm's way from the model to its attention layers, carries the context here.
        """
        prepared = prepare_encodings(self, rope)
        if attn_mask is None:
            attn_mask, is_causal = caller_masks(rope, is_causal)
        if not prepared and not math_is_faster(x):
            return super().forward(x, None, attn_mask, is_causal)
        if self.q_proj is None:
            parts = split_heads(self, project(self, x), prepared)
        else:
            head_dim = self.proj.in_features // self.num_heads
            q, k, v = into_heads(head_dim, self.q_proj(x), self.k_proj(x), self.v_proj(x))
            q, k = self.q_norm(q), self.k_norm(k)
            if k.shape[1] < q.shape[1]:  # keys and values that several query heads share
                k, v = (part.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for part in (k, v))
            parts = q, k, v, prepared
        return self_attention(self, x, *parts, attn_mask, is_causal)


class EncodedEvaAttention(OneNode, EncodedRopeMixin, EvaAttention):
    """Self-attention of EVA with encodings."""


class EncodedAttentionRope(OneNode, EncodedRopeMixin, AttentionRope):
    """Self-attention of the rope ViTs with encodings."""


class EncodedEvaMixin:
    """A block after which conditional encodings may mix the tokens."""

    def forward(self, x: Tensor, rope: AttentionContext | None = None, attn_mask=None, is_causal: bool = False):
        """Return the tokens (B, prefix + N, C) after the block."""
        return mix(super().forward(x, rope, attn_mask, is_causal), self.mixers, rope)


class EncodedEvaBlock(EncodedEvaMixin, EvaBlock):
    """A block of a converted Eva."""


class EncodedEvaBlockPostNorm(EncodedEvaMixin, EvaBlockPostNorm):
    """A block of a converted Eva that normalises after its branches."""


class EvaBlocks:
    """The part of a host that knows the blocks of timm's EVA."""

    blocks: ClassVar = {EvaBlock: EncodedEvaBlock, EvaBlockPostNorm: EncodedEvaBlockPostNorm}
    attentions: ClassVar = {EvaAttention: EncodedEvaAttention, AttentionRope: EncodedAttentionRope}
