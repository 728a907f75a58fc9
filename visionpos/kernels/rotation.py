"""Queries and keys of a qkv buffer, rotated in one pass.

The kernel reads every element of q and k once and writes it once, and v stays where it is. The backward pass rotates
the other way, and writes the gradients of q, k and v straight into the gradient of the buffer.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..rotary.split import split_qkv as plain
from ..rotation import Layout
from .choose import Kernel, needs_gpu


def fused(qkv: Tensor, table: Tensor, layout: Layout) -> tuple[Tensor, Tensor, Tensor]:
    """Return what `plain` does, for a table without a gradient."""
    from .rotation_triton import RotateQKV

    return RotateQKV.apply(qkv, *table.unbind(0), layout == "interleaved")


def unfit(qkv: Tensor, table: Tensor, layout: Layout) -> str:
    """Return why the kernel cannot run, or ""."""
    if table.requires_grad and torch.is_grad_enabled():
        return "learned angles need a gradient, which only the plain version computes"
    if qkv.dtype not in (torch.float32, torch.float16, torch.bfloat16) or table.dtype != torch.float32:
        return f"it takes float32, float16 and bfloat16 with a float32 table, got {qkv.dtype} and {table.dtype}"
    if qkv.numel() >= 2**31:
        return "the buffer has 2^31 elements or more"
    return needs_gpu(qkv)


def facts(qkv: Tensor, table: Tensor, layout: Layout) -> tuple:
    """Return what the kernel is compiled for."""
    return int(qkv.shape[3]), int(qkv.shape[4]), layout


def example(device: torch.device, dtype: torch.dtype, heads: int, head_dim: int, layout: Layout) -> tuple:
    """Return arguments: two samples of a prefix token and four others."""
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(2, 5, 3, heads, head_dim, generator=generator).to(device, dtype).requires_grad_()
    angles = torch.randn(heads, 5, head_dim // 2, generator=generator).to(device)
    angles[:, 0] = 0
    return qkv, torch.stack([angles.cos(), angles.sin()]), layout


rotate_qkv = Kernel("rotate_qkv", plain, fused, unfit, facts, example)
