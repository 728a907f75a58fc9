"""timm's attention layers with a slot for encodings, and the positions of the forward pass on their way to them.

Each class here is a timm layer whose `__class__` was swapped: same children, same parameter names. A layer without
encodings computes what timm's computes, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.fx
from timm.models.vision_transformer import Attention as TimmAttention
from torch import Tensor, nn

from ..encoding import AttentionTensors, OneNode, PositionEncoding
from ..kernels import coordinate_attention, rotate_qkv, takes_coordinates
from ..kernels.sdpa import attention
from ..places import ContextualBias, RotaryEncoding
from ..positions import Positions
from ..rotary.split import split_qkv
from .masks import add_masks

Prepared = tuple[tuple[PositionEncoding, Any], ...]  # encodings and the tables that their `prepare` returned
Kept = tuple[Positions, Tensor]  # the positions of all patch tokens, and which of them are left, (B, K)

NO_DROPOUT = nn.Dropout(0.0)  # of families whose attention has none


class AttentionContext:
    """All that attention knows of one forward pass: where the tokens are, and what was computed ahead.

    The model's stem makes it, and every block gets it as an argument.

    Where timm's block has an argument that the family needs for nothing else (`attn_mask`, `rope`,
    `shared_rel_pos_bias`), it carries the context; other blocks have one more. Nothing of it is ever stored in the
    model: threads do not meet, and a block that is computed again in the backward pass sees the same positions.

    It is no dataclass, since FSDP looks into those among a block's arguments and casts their tensors to its precision,
    in which positions and tables must not be.

    Args:
        positions: of the tokens that the blocks see.
        prepared: what the encodings that all layers share have prepared.
        attn_mask: the caller's own mask, where the context stands in the place of timm's.
        is_causal: the caller's own wish, that tokens see no later ones.
        kept: all positions, and which of them are left, (B, K), where `positions` are those of a subset.
    """

    patch_valid: Tensor | None = None  # (B, N), false for padding, of a model that returns it

    def __init__(
        self,
        positions: Positions,
        prepared: Prepared = (),
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        kept: Kept | None = None,
    ):
        self.positions, self.prepared, self.kept = positions, prepared, kept
        self.attn_mask, self.is_causal = attn_mask, is_causal

    @property
    def num_prefix_tokens(self) -> int:
        """Return how many tokens are in front of the patch tokens."""
        return self.positions.num_prefix_tokens

    def __fx_create_arg__(self, tracer: torch.fx.Tracer) -> torch.fx.Node:
        """Return the node of a graph of torch.fx that makes this context, as torch.fx asks of its own classes."""
        values = (self.positions, self.prepared, self.attn_mask, self.is_causal, self.kept)
        return tracer.create_node("call_function", AttentionContext, tuple(map(tracer.create_arg, values)), {})

    @classmethod
    def of(
        cls, positions: Positions, shared: Iterable[PositionEncoding], index: Tensor | None = None
    ) -> AttentionContext:
        """Return the context of a forward pass, with what the shared encodings prepare for all layers.

        Args:
            positions: of all patch tokens.
            shared: the encodings that all layers share.
            index: (B, K), the patch tokens that are left, if some were dropped.
        """
        kept = None if index is None else (positions, index)
        positions = positions if index is None else positions.keep(index)
        return cls(positions, prepare_all(shared, positions, kept), kept=kept)


def prepare_one(encoding: PositionEncoding, positions: Positions, kept: Kept | None) -> Any:
    """Return what one encoding prepares for attention: the positions, where a kernel has the bias's formula."""
    if takes_coordinates(encoding, positions):
        return positions
    if kept is not None and isinstance(encoding, RotaryEncoding):
        whole, index = kept
        if not whole.is_batched and index.numel() > whole.num_patches:  # the table of the whole is the shorter one
            return encoding.take_tokens(encoding.prepare(whole), index, whole.num_prefix_tokens)
    return encoding.prepare(positions)


@torch.fx.wrap  # one call in its graphs: the sizes of a picture are known when they run
def prepare_all(encodings: Iterable[PositionEncoding], positions: Positions, kept: Kept | None = None) -> Prepared:
    """Return the encodings of an attention layer, each with what it prepares."""
    return tuple((encoding, prepare_one(encoding, positions, kept)) for encoding in encodings)


def encoded(x: Tensor, q: Tensor, k: Tensor, v: Tensor, prepared: Iterable[tuple[PositionEncoding, Any]]):
    """Return the tensors of an attention layer with every encoding applied; their bias has four axes (`bias_4d`)."""
    tensors = AttentionTensors(x, q, k, v)
    for encoding, table in prepared:
        encoding.modify_attention(tensors, table)
    return bias_4d(tensors)


def bias_4d(tensors: AttentionTensors) -> AttentionTensors:
    """Return the tensors with their bias, if any, as (B or 1, heads, T, T): a 3-D one would miss the fused kernels."""
    if tensors.bias is not None and tensors.bias.ndim == 3:
        tensors.bias = tensors.bias.unsqueeze(0)  # (1, heads, T, T)
    return tensors


def encoded_pairs(
    x: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    encodings: Iterable[PositionEncoding],
    queries: Positions,
    keys: Positions,
) -> AttentionTensors:
    """Return the tensors of an attention layer whose queries or keys were pooled, with every encoding applied.

    Args:
        x: (B, Nq, C), what the queries are made of.
        q: queries, (B, heads, Nq, head_dim), not scaled.
        k: keys, (B, heads, Nk, head_dim).
        v: values.
        encodings: of the layer.
        queries: where the queries stand.
        keys: where the keys stand, on the same grid.
    """
    tensors = AttentionTensors(x, q, k, v)
    for encoding in encodings:
        if encoding.place == "rotary":
            tensors.q, tensors.k = encoding(tensors.q, tensors.q, queries)[0], encoding(tensors.k, tensors.k, keys)[1]
        elif isinstance(encoding, ContextualBias):
            tensors.add_bias(encoding.bias(queries, keys, getattr(tensors, encoding.content_source)))
        else:
            tensors.add_bias(encoding.bias(queries, keys))
    return bias_4d(tensors)


def bias_of_formula(tensors: AttentionTensors) -> AttentionTensors:
    """Return the tensors with the bias computed that was left to a kernel, where no kernel takes attention over."""
    if tensors.formula is not None:
        encoding, positions = tensors.formula
        tensors.formula = None
        tensors.add_bias(encoding.bias(positions))
    return bias_4d(tensors)


def math_is_faster(x: Tensor, bias: Tensor | None = None) -> bool:
    """Return whether plain operations train faster than torch's fused attention, whatever `fused_attn` says.

    On a CPU its backward is 3 to 8 times slower in bfloat16, and a bias that wants a gradient makes it fall back.
    """
    if x.device.type != "cpu" or not torch.is_grad_enabled():
        return False
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
    return dtype == torch.bfloat16 or (bias is not None and bias.requires_grad)


def attend(tensors: AttentionTensors, scale: float, dropout: nn.Dropout, fused: bool) -> Tensor:
    """Return softmax(q k^T scale + bias) v, (B, heads, T, head_dim), plus what encodings add to the output."""
    p = dropout.p if dropout.training else 0.0
    q, k, v = tensors.q, tensors.k, tensors.v  # (B, heads, T, head_dim) each
    if tensors.formula is not None:
        encoding, positions = tensors.formula
        if tensors.bias is None and not tensors.value_terms and not p:
            out = coordinate_attention(q, k, v, encoding, positions, scale)  # (B, heads, T, head_dim)
            return out if tensors.output is None else out + tensors.output
        bias_of_formula(tensors)
    tensors.bias = bias = None if tensors.bias is None else tensors.bias.to(q.dtype)  # as torch's fused attention wants
    if not fused or tensors.value_terms or math_is_faster(q, bias):
        return attend_logits(tensors, (q * scale) @ k.transpose(-2, -1), dropout)
    out = attention(q, k, v, bias, scale, p)  # (B, heads, T, head_dim)
    return out if tensors.output is None else out + tensors.output


def softmax_over_keys(logits: Tensor, fully_masked: Tensor | None) -> Tensor:
    """Return the softmax of logits (..., T, T) over the keys.

    A query that sees no key gets zeros, as from torch's fused attention, and not NaN. `fully_masked` (..., T, 1) is
    true for such queries; None if there is none.
    """
    if fully_masked is None:
        return logits.softmax(dim=-1)
    return logits.masked_fill(fully_masked, 0).softmax(dim=-1).masked_fill(fully_masked, 0)


def attend_logits(tensors: AttentionTensors, logits: Tensor, dropout: Callable[[Tensor], Tensor]) -> Tensor:
    """Return what `attend` does, from scaled logits (B, heads, T, T), which get the bias in the wider dtype of both.

    `dropout` acts on the probabilities.
    """
    bias = bias_of_formula(tensors).bias
    logits = logits if bias is None else logits + bias  # (B, heads, T, T)
    probabilities = dropout(softmax_over_keys(logits, tensors.fully_masked)).to(tensors.v.dtype)
    del logits  # their memory is as large as any, and the product can have it
    out = probabilities @ tensors.v  # (B, heads, T, head_dim)
    for term in tensors.value_terms:
        out = out + term(probabilities).to(out.dtype)
    return out if tensors.output is None else out + tensors.output


def positions_of(context: AttentionContext | Tensor | None, caller: str) -> Positions:
    """Return the positions of the tokens that a context describes.

    Raises:
        RuntimeError: there is none: the caller, "block" or "attention layer", has encodings, but no model called it.
    """
    if not isinstance(context, AttentionContext):
        raise RuntimeError(f"this {caller} needs positions: call it through the model's forward")
    return context.positions


def prepare_encodings(layer: nn.Module, context: AttentionContext | Tensor | None) -> Prepared:
    """Return the encodings that act in a self-attention layer: those that all layers share, then its own.

    Raises:
        RuntimeError: the layer has encodings, or shares some, but was called without a context.
    """
    if isinstance(context, AttentionContext):
        return (*context.prepared, *prepare_all(layer.encodings, context.positions, context.kept))
    if any(len(encodings) for encodings in (layer.encodings, *getattr(layer, "shared", ()))):
        positions_of(context, "attention layer")  # raises
    return ()


def caller_masks(
    context: AttentionContext | Tensor | None, is_causal: bool
) -> tuple[AttentionContext | Tensor | None, bool]:
    """Return the caller's own mask, which the context carries or stands in the place of, and whether it is causal."""
    if isinstance(context, AttentionContext):
        return context.attn_mask, is_causal or context.is_causal
    return context, is_causal


def is_hooked(module: nn.Module) -> bool:
    """Return whether a hook, of the module or of all modules, gets what the module returns."""
    return bool(module._forward_hooks or nn.modules.module._global_forward_hooks)


def split_heads(layer: nn.Module, qkv: Tensor, prepared: Prepared) -> tuple[Tensor, Tensor, Tensor, Prepared]:
    """Return q, k, v (B, heads, T, head_dim) of the buffer qkv (B, T, 3, heads, head_dim), and what is left to apply.

    A rotation that comes first is applied on the way, unless the layer has norms of q and k, which come before it.
    """
    norms = layer._modules.get("q_norm"), layer._modules.get("k_norm")
    if not all(norm is None or (isinstance(norm, nn.Identity) and not is_hooked(norm)) for norm in norms):
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # (B, heads, T, head_dim) each
        return layer.q_norm(q), layer.k_norm(k), v, prepared
    if prepared and isinstance(prepared[0][0], RotaryEncoding) and prepared[0][0].turns_pairs:
        encoding, table = prepared[0]
        if rotate_qkv.runs(qkv, table, encoding.layout):
            return *rotate_qkv.fused(qkv, table, encoding.layout), prepared[1:]
        unseen = type(layer.qkv) is nn.Linear and not is_hooked(layer.qkv)  # by a hook that keeps the output
        return *split_qkv(qkv, table, encoding.layout, overwrite=unseen), prepared[1:]
    return *split_qkv(qkv), prepared


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
    """Return the output (B, T, C) of a self-attention layer with encodings, from q, k, v (B, heads, T, head_dim).

    Args:
        layer: has `scale`, `attn_drop`, `fused_attn`, `proj` and `proj_drop`, and may have `norm` and `gate`.
        x: (B, T, C), the layer's input.
        q: queries, not scaled.
        k: keys.
        v: values.
        prepared: see `prepare_encodings`.
        attn_mask: the caller's own, boolean (True is seen) or additive.
        is_causal: tokens see no later ones.
    """
    tensors = add_masks(encoded(x, q, k, v, prepared), attn_mask, is_causal)
    out = attend(tensors, layer.scale, layer.attn_drop, layer.fused_attn)  # (B, heads, T, head_dim)
    out = out.transpose(1, 2).flatten(2)  # (B, T, heads * head_dim)
    norm, gate = layer._modules.get("norm"), layer._modules.get("gate")  # quicker than an attribute that is not there
    out = out if norm is None else norm(out)
    out = out if gate is None else out * gate(x).sigmoid()
    return layer.proj_drop(layer.proj(out))  # (B, T, C)


class Attention(OneNode, TimmAttention):
    """Self-attention of ViT and DeiT with encodings, on tokens x (B, prefix + N, C)."""

    def forward(self, x: Tensor, attn_mask: AttentionContext | Tensor | None = None, is_causal: bool = False) -> Tensor:
        """Return tokens (B, prefix + N, C).

        `attn_mask`, timm's way from the model to its attention layers, carries the context here.
        """
        prepared = prepare_encodings(self, attn_mask)
        attn_mask, is_causal = caller_masks(attn_mask, is_causal)
        if not prepared and not math_is_faster(x):
            return super().forward(x, attn_mask, is_causal)
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, -1))  # (B, T, 3, heads, head_dim)
        return self_attention(self, x, *split_heads(self, qkv, prepared), attn_mask, is_causal)
