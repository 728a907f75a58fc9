"""Attention with a bias that is a formula of the offset, computed on the fly: no (N, N) bias exists in memory.

FlexAttention puts `BiasEncoding.formula` into its kernel, and skips blocks of 128 x 128 pairs that lie outside of the
encoding's half planes. Which those are follows from the bounding boxes of the blocks' tokens, so that no (N, N) mask
exists either.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from ..encoding import PositionEncoding
from ..places import BiasEncoding
from ..positions import Positions
from . import choose
from .choose import Kernel
from .sdpa import attention

FLEX_MIN_TOKENS = 4096  # patch tokens from which "auto" prefers it to a bias in memory, which is faster while it fits


def reference(q: Tensor, k: Tensor, v: Tensor, encoding: BiasEncoding, positions: Positions, scale: float) -> Tensor:
    """Return softmax(scale q k^T + bias) v, (B, heads, T, head_dim) as q, k and v, by `encoding.bias(positions)`."""
    bias = encoding.bias(positions)  # ([B,] heads, T, T)
    bias = (bias if positions.is_batched else bias.unsqueeze(0)).to(q.dtype)
    return attention(q, k, v, bias, scale)


def fused(q: Tensor, k: Tensor, v: Tensor, encoding: BiasEncoding, positions: Positions, scale: float) -> Tensor:
    """Return the same by FlexAttention, compiled."""
    from .coordinates_flex import attend

    return attend(q, k, v, *pairwise(encoding, positions), scale)


def pairwise(encoding: BiasEncoding, positions: Positions) -> tuple[Callable, Tensor | None, Positions]:
    """Return an encoding's formula in float32, its half planes, and the positions that both are for."""
    located = encoding.locate(positions)
    located = replace(located, coords=located.coords.float())
    return encoding.formula(located), encoding.half_planes(), located


def has_formula(encoding: PositionEncoding, positions: Positions) -> bool:
    """Return whether the bias of these tokens is a formula of their offsets in the plane, with nothing to learn."""
    fixed = isinstance(encoding, BiasEncoding) and not encoding.learnable and not positions.coords.requires_grad
    return fixed and len(positions.feat_shape) == 2 and encoding.formula(positions) is not None


def takes_coordinates(encoding: PositionEncoding, positions: Positions) -> bool:
    """Return whether attention should get the positions, for `coordinate_attention`, and not a bias computed ahead.

    True on CUDA from 4,096 patch tokens on, and wherever there is a formula under `use("fused")`.
    """
    worth = choose.mode() == "fused" or positions.num_patches >= FLEX_MIN_TOKENS
    return choose.considered(positions.coords) and worth and has_formula(encoding, positions)


def why_unsupported(q: Tensor, k: Tensor, v: Tensor, encoding: BiasEncoding, positions: Positions, scale: float) -> str:
    """Return why the kernel cannot run, or ""."""
    if not has_formula(encoding, positions):
        return f"the bias of {encoding.name} is no formula of two coordinates"
    if q.dtype == torch.float64:
        return "the formula is computed in float32"
    if not 16 <= q.shape[-1] <= 256:
        return f"it takes 16 to 256 channels per head, got {q.shape[-1]}"
    if q.shape[-1] != v.shape[-1]:
        return f"queries of {q.shape[-1]} channels are wider than values of {v.shape[-1]}"
    if q.device.type != "cuda" and torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)):
        return f"FlexAttention has no gradients on {q.device.type}"
    if q.device.type != "cuda" and torch.compiler.is_compiling():
        return f"inductor cannot compile it with the formula into one graph on {q.device.type}"
    return ""


def compile_key(q: Tensor, k: Tensor, v: Tensor, encoding: BiasEncoding, positions: Positions, scale: float) -> tuple:
    """Return what a selftest holds for: the arguments of `example` after the device and the dtype."""
    hides = encoding.half_planes() is not None
    return hides, int(q.shape[1]), int(q.shape[-1]), positions.num_prefix_tokens, positions.is_batched


class Example(BiasEncoding):
    """The bias of a selftest, in place of any encoding: heads prefer some distance, and may look up or to a side."""

    def __init__(self, num_heads: int, hides: bool):
        super().__init__(num_heads)
        self.hides = hides

    def formula(self, positions: Positions) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        slopes = torch.linspace(0.1, 1, self.num_heads, device=positions.coords.device)  # (heads,)
        return lambda head, dy, dx: -slopes[head] * torch.abs(torch.sqrt(dy * dy + dx * dx) - head)

    def half_planes(self) -> Tensor | None:
        quarter = torch.arange(self.num_heads) % 4 * (math.pi / 2)
        normals = torch.stack([-quarter.cos(), quarter.sin()], dim=-1).round()  # (heads, 2): up, right, down, left
        return normals.unsqueeze(1) if self.hides else None


def example(
    device: torch.device, dtype: torch.dtype, hides: bool, heads: int, head_dim: int, prefix: int, batched: bool
) -> tuple:
    """Return arguments: two samples of a grid of two blocks."""
    generator = torch.Generator().manual_seed(0)
    positions = Positions.grid((10, 15), prefix, device=device)
    if batched:
        positions = positions.keep(torch.stack([torch.arange(140), torch.arange(149, 9, -1)]).to(device))
    shape = 2, heads, positions.num_tokens, head_dim
    qkv = [torch.randn(shape, generator=generator).to(device, dtype).requires_grad_() for _ in range(3)]
    return *qkv, Example(heads, hides), positions, 1 / math.sqrt(head_dim)


coordinate_attention = Kernel(
    "coordinate_attention", reference, fused, why_unsupported, compile_key, example, compiles=True
)
