"""The caller's own masks, among what encodings add to the logits."""

from __future__ import annotations

import torch
from torch import Tensor

from ..encoding import AttentionTensors


def additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a mask as numbers to add to logits: 0 where a boolean one is true, minus infinity elsewhere."""
    if mask.dtype == torch.bool:
        return torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, float("-inf"))
    return mask.to(dtype)


def add_masks(tensors: AttentionTensors, attn_mask: Tensor | None, is_causal: bool) -> AttentionTensors:
    """Return the tensors of an attention layer with the caller's masks in their bias.

    Args:
        tensors: with every encoding applied.
        attn_mask: boolean (True is seen) or additive, ([B, heads,] T or 1, T); None for none.
        is_causal: tokens see no later ones.
    """
    if attn_mask is not None:
        tensors.add_bias(additive(attn_mask, tensors.q.dtype))
    if is_causal:
        length = tensors.q.shape[-2]
        later = torch.ones(length, length, dtype=torch.bool, device=tensors.q.device).triu(1)  # (T, T)
        tensors.add_bias(additive(~later, tensors.q.dtype))
    if attn_mask is not None:  # no encoding, and no window, hides a token from itself
        tensors.fully_masked = tensors.bias.isneginf().all(dim=-1, keepdim=True)  # (..., T, 1)
    return tensors
