"""What attention layers make of their input before anything turns: queries, keys and values, cut into heads."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def project(attn: nn.Module, x: Tensor) -> Tensor:
    """Return q, k and v (B, T, 3, heads, head_dim) of layers, which may have a bias of q and v alone: EVA's, BEiT's."""
    if getattr(attn, "q_bias", None) is None:
        qkv = attn.qkv(x)
    else:
        bias = torch.cat((attn.q_bias, attn.k_bias, attn.v_bias))
        qkv = attn.qkv(x) + bias if attn.qkv_bias_separate else F.linear(x, attn.qkv.weight, bias)
    return qkv.unflatten(-1, (3, attn.num_heads, -1))


def into_heads(head_dim: int, *parts: Tensor) -> list[Tensor]:
    """Return parts (B, T, heads * head_dim), each with any number of heads, as (B, heads, T, head_dim)."""
    return [part.unflatten(-1, (-1, head_dim)).transpose(1, 2) for part in parts]
