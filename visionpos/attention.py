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
from torch import Tensor, nn

from .encoding import AttentionTensors, PositionEncoding
from .positions import Positions


@dataclass(frozen=True, eq=False)
class AttentionContext:
    """What a block hands to its attention in place of timm's `attn_mask`: explicit, so that checkpointing keeps it."""

    positions: Positions
    prepared: tuple[tuple[PositionEncoding, Any], ...] = ()  # encodings that all layers share, and their tables
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
        self.prepared: tuple[tuple[PositionEncoding, Any], ...] = ()

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


def encoded(x: Tensor, q: Tensor, k: Tensor, v: Tensor, prepared: Iterable[tuple[PositionEncoding, Any]]):
    """The tensors of an attention layer with every encoding applied; the bias as `fit_bias` leaves it."""
    tensors = AttentionTensors(x, q, k, v)
    for encoding, table in prepared:
        encoding.modify_attention(tensors, table)
    return fit_bias(tensors)


def fit_bias(tensors: AttentionTensors) -> AttentionTensors:
    """The same with the bias, if any, 4-D and in q's dtype: a 3-D one would miss the fused kernels."""
    if tensors.bias is not None:
        bias = tensors.bias if tensors.bias.ndim == 4 else tensors.bias.unsqueeze(0)
        tensors.bias = bias.to(tensors.q.dtype)
    return tensors


def attend(tensors: AttentionTensors, scale: float, dropout: nn.Dropout, fused: bool) -> Tensor:
    """softmax(q k^T scale + bias) v, (B, heads, T, head_dim), plus what encodings add to the output."""
    q, k, v, bias = tensors.q, tensors.k, tensors.v, tensors.bias
    if not fused or tensors.value_terms:
        return attend_logits(tensors, (q * scale) @ k.transpose(-2, -1), dropout)
    p = dropout.p if dropout.training else 0.0
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=p, scale=scale)
    return out if tensors.output is None else out + tensors.output


def softmax_over_keys(logits: Tensor, blind: Tensor | None) -> Tensor:
    """Softmax of (..., T, T); a query that sees no key gets zeros, as from torch's fused attention, and not NaN."""
    if blind is None:
        return logits.softmax(dim=-1)
    return logits.masked_fill(blind, 0).softmax(dim=-1).masked_fill(blind, 0)


def attend_logits(tensors: AttentionTensors, logits: Tensor, dropout: nn.Dropout) -> Tensor:
    """The same from the scaled logits (B, heads, T, T), which get the bias."""
    probabilities = dropout(softmax_over_keys(logits if tensors.bias is None else logits + tensors.bias, tensors.blind))
    out = probabilities @ tensors.v
    for term in tensors.value_terms:
        out = out + term(probabilities).to(out.dtype)
    return out if tensors.output is None else out + tensors.output


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    if mask.dtype == torch.bool:
        return torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, float("-inf"))
    return mask.to(dtype)


Prepared = tuple[tuple[PositionEncoding, Any], ...]  # encodings and the tables that their `prepare` returned


def prepare_encodings(layer: nn.Module, context: AttentionContext | Tensor | None) -> Prepared:
    """The encodings that act in a self-attention layer: those that all layers share, then its own.

    Raises:
        RuntimeError: the layer has encodings, but was called without a context.
    """
    if isinstance(context, AttentionContext):
        return (*context.prepared, *((encoding, encoding.prepare(context.positions)) for encoding in layer.encodings))
    if len(layer.encodings):
        raise RuntimeError("this attention layer needs positions: call it through the model's forward")
    return ()


def self_attention(
    layer: nn.Module,
    x: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prepared: Prepared,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
) -> Tensor:
    """What timm's self-attention layers do once they have q, k, v (B, heads, T, head_dim), with encodings.

    Args:
        layer: has `scale`, `attn_drop`, `fused_attn`, `proj` and `proj_drop`, and may have `norm` and `gate`.
        x: (B, T, C), the layer's input.
        prepared: see `prepare_encodings`.
        attn_mask: the caller's own, boolean (True is seen) or additive.
        is_causal: tokens see no later ones.
    """
    tensors = encoded(x, q, k, v, prepared)
    if attn_mask is not None:
        tensors.add_bias(_additive(attn_mask, q.dtype))
    if is_causal:
        later = torch.ones(q.shape[-2], q.shape[-2], dtype=torch.bool, device=q.device).triu(1)
        tensors.add_bias(_additive(~later, q.dtype))
    if attn_mask is not None:  # no encoding, and no window, hides a token from itself
        tensors.blind = tensors.bias.isneginf().all(dim=-1, keepdim=True)
    out = attend(tensors, layer.scale, layer.attn_drop, layer.fused_attn).transpose(1, 2).flatten(2)
    norm, gate = getattr(layer, "norm", None), getattr(layer, "gate", None)
    out = out if norm is None else norm(out)
    out = out if gate is None else out * gate(x).sigmoid()
    return layer.proj_drop(layer.proj(out))


class Attention(TimmAttention):
    """Self-attention of ViT and DeiT with encodings; x (B, prefix + N, C)."""

    def forward(self, x: Tensor, attn_mask: AttentionContext | Tensor | None = None, is_causal: bool = False) -> Tensor:
        """`attn_mask` is the context that a block of the converted model passes on."""
        prepared = prepare_encodings(self, attn_mask)
        if isinstance(attn_mask, AttentionContext):
            attn_mask = attn_mask.attn_mask
        if not prepared:
            return super().forward(x, attn_mask, is_causal)
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        return self_attention(self, x, self.q_norm(q), self.k_norm(k), v, prepared, attn_mask, is_causal)


class WindowAttention(TimmWindowAttention):
    """Window attention of Swin with encodings; x (B * windows, N, C).

    Encodings see the coordinates of the window, which differ from the grid's by an offset.
    """

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """`mask` is Swin's shift mask, (windows, N, N), added to the logits."""
        positions = Positions.grid(self.window_size, device=x.device)
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        tensors = encoded(x, q, k, v, [(encoding, encoding.prepare(positions)) for encoding in self.encodings])
        if mask is not None:  # the windows of an image are neighbours in the batch
            mask = mask.to(q.dtype).repeat(x.shape[0] // mask.shape[0], 1, 1)
            tensors.add_bias(mask.unsqueeze(1))
        out = attend(tensors, self.scale, self.attn_drop, self.fused_attn)
        return self.proj_drop(self.proj(out.transpose(1, 2).flatten(2)))

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
