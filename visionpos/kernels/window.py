"""Attention inside the windows of a grid: roll, partition, bias, shift mask, softmax and the way back in one kernel.

Tokens stay in the layout of the image; the kernel computes where those of a window are. The backward pass computes the
probabilities again. Each of its programs adds up the gradient of the bias over its windows on chip and writes it once:
nothing is added atomically, and the result repeats bit for bit.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .choose import Kernel, needs_gpu
from .window_reference import reference

MAX_TILE = 64  # tokens of a window, and channels of a head: what one program holds on chip


def fused(qkv: Tensor, bias: Tensor, window: tuple[int, int], shift: tuple[int, int], scale: float) -> Tensor:
    """Return the same by a kernel."""
    from .window_triton import WindowAttention, window_attention

    attend = window_attention if torch.compiler.is_compiling() else WindowAttention.apply
    return attend(qkv, bias, list(window), list(shift), scale)


def why_unsupported(qkv: Tensor, bias: Tensor, window: tuple[int, int], shift: tuple[int, int], scale: float) -> str:
    """Return why the kernel cannot run, or ""."""
    (height, width), (h, w), head_dim = qkv.shape[1:3], window, qkv.shape[-1]
    if height % h or width % w:
        return f"the window {(h, w)} does not divide the grid {(height, width)}"
    if h * w > MAX_TILE or head_dim > MAX_TILE:
        return f"a window has {h * w} tokens of {head_dim} channels per head, more than {MAX_TILE}"
    if bias.ndim != 3:
        return "the bias differs between samples"
    if qkv.dtype not in (torch.float16, torch.bfloat16) and (qkv.is_cuda or qkv.dtype != torch.float32):
        return f"it takes float16 and bfloat16, got {qkv.dtype}"  # float32 would leave the tensor cores and spill
    if qkv.numel() >= 2**31:
        return "the buffer has 2^31 elements or more"
    return needs_gpu(qkv)


def compile_key(qkv: Tensor, bias: Tensor, window: tuple[int, int], shift: tuple[int, int], scale: float) -> tuple:
    """Return what the kernel is compiled for."""
    return (*window, any(shift), int(qkv.shape[-2]), int(qkv.shape[-1]))


def example(device: torch.device, dtype: torch.dtype, h: int, w: int, shifted: bool, heads: int, head_dim: int):
    """Return arguments: one image of two by three windows."""
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(1, 2 * h, 3 * w, 3, heads, head_dim, generator=generator).to(device, dtype).requires_grad_()
    bias = torch.randn(heads, h * w, h * w, generator=generator).to(device).requires_grad_()
    return qkv, bias, (h, w), (h // 2, w // 2) if shifted else (0, 0), head_dim**-0.5


window_attention = Kernel("window_attention", reference, fused, why_unsupported, compile_key, example)
