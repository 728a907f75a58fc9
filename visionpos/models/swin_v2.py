"""timm's Swin Transformer V2 as host: cosine attention inside the windows, and what Swin v1's host does."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from timm.layers import use_fused_attn
from timm.models.swin_transformer_v2 import SwinTransformerV2, SwinTransformerV2Block
from timm.models.swin_transformer_v2 import WindowAttention as TimmWindowAttention
from torch import Tensor, nn

from ..attention import attend, attend_logits, encoded
from ..bias.log_cpb import LogCPB
from ..positions import Positions
from .host import Facts, register_host
from .plain import project_qkv
from .swin import EncodedGridBlock, EncodedSwinMixin, SwinHost


class CosineWindowAttention(TimmWindowAttention):
    """Window attention of Swin V2 with encodings: logits tau cos(q, k) + bias; x (B * windows, N, C).

    Encodings get q and k of length 1: rotations turn those, contextual biases are measured in them. `fused_attn`, off
    as in timm but with TIMM_FUSED_ATTN=2, multiplies q by tau first, which changes the last bit.
    """

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """`mask` is Swin's shift mask, (windows, N, N), added to the logits."""
        positions = Positions.grid(self.window_size, device=x.device)
        q, k, v = project_qkv(self, x)
        own = [(encoding, encoding.prepare(positions)) for encoding in self.encodings]
        tensors = encoded(x, F.normalize(q, dim=-1), F.normalize(k, dim=-1), v, own)
        if mask is not None:  # the windows of an image are neighbours in the batch
            tensors.add_bias(mask.to(q.dtype).repeat(x.shape[0] // mask.shape[0], 1, 1).unsqueeze(1))
        tau = self.logit_scale.clamp(max=math.log(100)).exp()  # (heads, 1, 1)
        if self.fused_attn:
            tensors.q = (tensors.q * tau).to(v.dtype)
            out = attend(tensors, 1.0, self.attn_drop, fused=True)
        else:
            out = attend_logits(tensors, tensors.q @ tensors.k.transpose(-2, -1) * tau, self.attn_drop)
        return self.proj_drop(self.proj(out.transpose(1, 2).flatten(2)))

    def set_window_size(self, window_size: tuple[int, int]) -> None:
        """Work on another window; tables are resized."""
        self.window_size = tuple(window_size)
        for encoding in self.encodings:
            encoding.set_feat_shape(self.window_size)

    def _init_buffers(self) -> None:
        """The zeros in place of a key bias; the encodings compute their own buffers."""
        if self.k_bias is not None:
            self.k_bias.zero_()


class EncodedSwinV2Block(EncodedGridBlock, SwinTransformerV2Block):
    """A block of a converted Swin Transformer V2."""


class EncodedSwinTransformerV2(EncodedSwinMixin, SwinTransformerV2):
    """A converted Swin Transformer V2."""


def pretrained_window(attn: TimmWindowAttention) -> tuple[int, int] | None:
    """The window that the continuous bias was trained on; timm's 0 means the window at hand."""
    window = tuple(attn.pretrained_window_size)
    return window if window[0] > 0 else None


class SwinV2Host(SwinHost):
    """Swin V2."""

    name = "SwinTransformerV2 (Swin v2)"
    model_class = SwinTransformerV2
    encoded_class = EncodedSwinTransformerV2
    block_class = EncodedSwinV2Block
    native = LogCPB

    def wrap_attention(self, attn: nn.Module) -> None:
        with torch.device("meta"):
            bias = LogCPB(attn.num_heads, pretrained_window(attn))
        bias.live_in(attn)
        for name in ("relative_coords_table", "relative_position_index"):
            del attn._buffers[name]
        attn.__class__ = CosineWindowAttention
        attn.fused_attn = use_fused_attn(experimental=True)
        attn.encodings = nn.ModuleList([bias])

    def layer_facts(self, model: SwinTransformerV2) -> list[Facts]:
        windows = [pretrained_window(block.attn) for block in self.blocks(model)]
        return [
            {**facts, "pretrained_window": window}
            for facts, window in zip(super().layer_facts(model), windows, strict=True)
        ]


HOST = register_host(SwinV2Host())
