"""timm's Swin Transformer V2 as host: cosine attention inside the windows, and what Swin v1's host does."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import ClassVar

import torch
from timm.layers import use_fused_attn
from timm.models.swin_transformer_v2 import SwinTransformerV2, SwinTransformerV2Block
from timm.models.swin_transformer_v2 import WindowAttention as TimmWindowAttention
from torch import Tensor, nn

from ..bias.log_cpb import LogCPB
from ..encoding import AttentionTensors, LayerFacts, OneNode
from ..rotary.split import split_qkv
from .attention import encoded
from .host import register_host
from .parameters import adopt_parameters
from .projections import project
from .shifted_windows import EncodedGridBlock
from .swin import EncodedIdentity, EncodedSwinMixin, SwinHost
from .window_attention import attend_windows, hide_regions, prepare_windows, takes_fused_path

# Up to this tau, a key at -100 has less than e^-20 of the probability of a seen one, and -inf gives the same.
MAX_TAU_THAT_HIDES = 32


def to_length(x: Tensor, length: Tensor | float = 1.0) -> Tensor:
    """Return x (..., D) scaled to a Euclidean length; as in timm, nothing is divided by less than 1e-12."""
    wider = torch.promote_types(x.dtype, torch.float32)
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=wider).clamp_min(1e-12)
    return (x * (length / norm)).to(x.dtype)


def hide_by_temperature(tensors: AttentionTensors, mask: Tensor | None, tau: Tensor) -> None:
    """Hide keys as timm does, by its shift mask (windows, N, N), in cosine attention of temperature tau (heads, 1, 1).

    Logits reach from -tau to tau + 16: with a large tau, keys at -100 are seen nevertheless.
    """
    hide_regions(tensors, mask, torch.where(tau > MAX_TAU_THAT_HIDES, -100.0, -math.inf))


class CosineWindowAttention(OneNode, TimmWindowAttention):
    """Window attention of Swin V2 with encodings, on tokens x (B * windows, N, C): logits tau cos(q, k) + bias.

    Encodings get q of length 1 and k of length tau: rotations turn those, contextual biases are measured in q. That tau
    comes with the length of k and not after the product, as in timm, is faster and changes the last bits.
    """

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return tokens (B * windows, N, C); `mask` (windows, N, N) is Swin's shift mask, added to the logits."""
        q, k, v = split_qkv(project(self, x))
        fused = takes_fused_path(self, x)
        if not fused:  # copied once, not anew for every product forward and backward
            q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
        tau = self.logit_scale.clamp(max=math.log(100)).exp()  # (heads, 1, 1)
        tensors = encoded(x, to_length(q), to_length(k, tau), v, prepare_windows(self, x))
        hide_by_temperature(tensors, mask, tau)
        return attend_windows(self, tensors, fused)

    def set_window_size(self, window_size: tuple[int, int]) -> None:
        """Work on another window from now on; tables are resized."""
        self.window_size = tuple(window_size)
        for encoding in self.encodings:
            encoding.set_feat_shape(self.window_size)

    def _init_buffers(self) -> None:
        """Compute the zeros in place of a key bias; the encodings compute their own buffers."""
        if self.k_bias is not None:
            self.k_bias.zero_()


class EncodedSwinV2Block(EncodedGridBlock, SwinTransformerV2Block):
    """A block of a converted Swin Transformer V2."""


class EncodedSwinTransformerV2(EncodedSwinMixin, SwinTransformerV2):
    """A Swin Transformer V2 whose positions are encodings of this package."""


def pretrained_window(attn: TimmWindowAttention) -> tuple[int, int] | None:
    """Return the window that the continuous bias was trained on; None, timm's 0, means the window at hand."""
    window = tuple(attn.pretrained_window_size)
    return window if window[0] > 0 else None


class SwinV2Host(SwinHost):
    """The family of Swin v2."""

    name = "SwinTransformerV2 (Swin v2)"
    models: ClassVar = {SwinTransformerV2: EncodedSwinTransformerV2}
    parts: ClassVar = {
        SwinTransformerV2Block: EncodedSwinV2Block,
        TimmWindowAttention: CosineWindowAttention,
        nn.Identity: EncodedIdentity,
    }
    native = LogCPB

    def adopt_table(self, attn: nn.Module) -> LogCPB:
        attn.fused_attn = use_fused_attn(experimental=True)
        for name in ("relative_coords_table", "relative_position_index"):
            del attn._buffers[name]
        return adopt_parameters(attn, LogCPB, num_heads=attn.num_heads, pretrained_window=pretrained_window(attn))

    def layer_facts(self, model: SwinTransformerV2) -> list[LayerFacts]:
        return [
            replace(facts, pretrained_window=pretrained_window(block.attn) or facts.feat_shape)
            for block, facts in zip(self.blocks(model), super().layer_facts(model), strict=True)
        ]


HOST = register_host(SwinV2Host())
