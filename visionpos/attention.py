"""timm's attention layers with a slot for encodings, and the positions of the forward pass on their way to them.

Each class here is a timm layer whose `__class__` was swapped: same children, same parameter names. A layer without
encodings computes what timm's computes, bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from timm.models.swin_transformer import WindowAttention as TimmWindowAttention
from timm.models.vision_transformer import Attention as TimmAttention
from torch import Tensor

from .encoding import PositionEncoding
from .positions import Positions


@dataclass(frozen=True, eq=False)
class AttentionContext:
    """What a block hands to its attention in place of timm's `attn_mask`: explicit, so that checkpointing keeps it."""

    positions: Positions
    prepared: tuple[tuple[PositionEncoding, Tensor], ...] = ()  # encodings that all layers share, and their tables
    attn_mask: Tensor | None = None  # the caller's own mask


class PositionState:
    """The positions of the forward pass that is under way: written by the model's stem, read by its blocks.

    Nothing outlives the forward pass, and copies and pickles of a model start empty.
    """

    def __init__(self):
        self.clear()

    def clear(self) -> None:
        """Forget the forward pass."""
        self.positions: Positions | None = None
        self.prepared: tuple[tuple[PositionEncoding, Tensor], ...] = ()

    def enter(self, positions: Positions, shared: Iterable[PositionEncoding]) -> None:
        """Start a forward pass, or go on with other tokens; computes the tables of shared encodings once."""
        self.positions = positions
        self.prepared = tuple((encoding, encoding.prepare(positions)) for encoding in shared)

    def keep(self, index: Tensor) -> None:
        """Go on with a subset of the patch tokens, (B, K)."""
        self.enter(self.positions.keep(index), [encoding for encoding, _ in self.prepared])

    def context(self, attn_mask: Tensor | None) -> AttentionContext:
        """The explicit form for one block."""
        if self.positions is None:
            raise RuntimeError("this block got no positions: call it through the model's forward")
        return AttentionContext(self.positions, self.prepared, attn_mask)

    def __deepcopy__(self, memo: dict) -> PositionState:
        return PositionState()

    def __getstate__(self) -> dict[str, Any]:
        return {"positions": None, "prepared": ()}


def apply_encodings(q: Tensor, k: Tensor, prepared: Iterable[tuple[PositionEncoding, Tensor]]):
    """q and k (B, heads, N, d) with every encoding applied, and the summed bias in q's dtype, or None.

    The bias is (1 or B, heads, N, N), as the fused kernels want it.
    """
    bias = None
    for encoding, table in prepared:
        q, k, bias = encoding.modify_attention(q, k, bias, table)
    if bias is None:
        return q, k, None
    return q, k, (bias if bias.ndim == 4 else bias.unsqueeze(0)).to(q.dtype)


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    if mask.dtype == torch.bool:
        return torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, float("-inf"))
    return mask.to(dtype)


class Attention(TimmAttention):
    """Self-attention of ViT and DeiT with encodings; x (B, prefix + N, C)."""

    def forward(self, x: Tensor, attn_mask: AttentionContext | Tensor | None = None, is_causal: bool = False) -> Tensor:
        """`attn_mask` is the context that a block of the converted model passes on."""
        if not isinstance(attn_mask, AttentionContext):
            if len(self.encodings):
                raise RuntimeError("this attention layer needs positions: call it through the model's forward")
            return super().forward(x, attn_mask, is_causal)
        context = attn_mask
        own = [(encoding, encoding.prepare(context.positions)) for encoding in self.encodings]
        if not own and not context.prepared:
            return super().forward(x, context.attn_mask, is_causal)

        gate = getattr(self, "gate", None)  # timm has it from 1.0.28 on
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        q, k, bias = apply_encodings(self.q_norm(q), self.k_norm(k), (*context.prepared, *own))
        if context.attn_mask is not None:
            mask = _additive(context.attn_mask, q.dtype)
            bias = mask if bias is None else bias + mask
        if is_causal and bias is not None:
            above = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool, device=q.device).triu(1)
            bias, is_causal = bias.masked_fill(above, float("-inf")), False
        out = self._attend(q, k, v, bias, is_causal).transpose(1, 2).flatten(2)
        out = self.norm(out)
        if gate is not None:
            out = out * gate(x).sigmoid()
        return self.proj_drop(self.proj(out))

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, is_causal: bool) -> Tensor:
        if self.fused_attn:
            dropout = self.attn_drop.p if self.training else 0.0
            return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=dropout, is_causal=is_causal)
        logits = (q * self.scale) @ k.transpose(-2, -1)
        if is_causal:
            logits = logits + logits.new_full(logits.shape[-2:], float("-inf")).triu(1)
        if bias is not None:
            logits = logits + bias
        return self.attn_drop(logits.softmax(dim=-1)) @ v


class WindowAttention(TimmWindowAttention):
    """Window attention of Swin with encodings; x (B * windows, N, C).

    Encodings see the coordinates of the window, which differ from the grid's by an offset.
    """

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """`mask` is Swin's shift mask, (windows, N, N), added to the logits."""
        positions = Positions.grid(self.window_size, device=x.device)
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        q, k, bias = apply_encodings(q, k, [(encoding, encoding.prepare(positions)) for encoding in self.encodings])
        if self.fused_attn:
            out = self._fused(q, k, v, bias, mask)
        else:
            logits = (q * self.scale) @ k.transpose(-2, -1)
            if bias is not None:
                logits = logits + bias
            if mask is not None:  # every image has the same windows
                logits = logits.unflatten(0, (-1, mask.shape[0])) + mask[None, :, None]
                logits = logits.flatten(0, 1)
            out = self.attn_drop(self.softmax(logits)) @ v
        return self.proj_drop(self.proj(out.transpose(1, 2).flatten(2)))

    def _fused(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, mask: Tensor | None) -> Tensor:
        if mask is not None:
            mask = mask.to(q.dtype).unsqueeze(1)  # (windows, 1, N, N)
            bias = mask if bias is None else bias + mask
            bias = bias.expand(-1, self.num_heads, -1, -1).repeat(q.shape[0] // bias.shape[0], 1, 1, 1)
        dropout = self.attn_drop.p if self.training else 0.0
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=dropout)

    def set_window_size(self, window_size: tuple[int, int]) -> None:
        """Work on another window; tables are resized."""
        self.window_size = tuple(window_size)
        self.window_area = self.window_size[0] * self.window_size[1]
        for encoding in self.encodings:
            encoding.set_feat_shape(self.window_size)

    def reset_parameters(self) -> None:
        """Nothing of its own: the encodings reset theirs."""

    def _init_buffers(self) -> None:
        """Nothing of its own: the encodings compute theirs."""
