"""Attention with a bias that is a formula of the coordinates, computed on the fly: no (N, N) bias exists in memory.

FlexAttention puts the formula into its kernel, and skips blocks of 128 x 128 pairs that an encoding hides. Which
those are follows from the bounding boxes of the blocks' tokens, so that no (N, N) mask exists either.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..bias.alibi import Alibi, alibi_slopes
from ..bias.alibi2d import Alibi2D
from ..bias.lookhere import LookHere
from ..encoding import PositionEncoding
from ..places import BiasEncoding
from ..positions import Positions
from . import choose
from .choose import Kernel

WORTH = 576  # patch tokens from which "auto" prefers it to a bias in memory


class Formula(NamedTuple):
    """b = -slope distance(dy, dx) where the key lies in both half planes n . (key - query) >= 0, hidden elsewhere."""

    distance: Callable[[Tensor, Tensor], Tensor]  # query minus key
    slopes: Tensor  # (heads,)
    edges: Tensor | None = None  # (heads, 2, 2) the normals of two half planes, (y, x)


def euclidean(dy: Tensor, dx: Tensor) -> Tensor:
    """sqrt(dy^2 + dx^2)."""
    return torch.sqrt(dy * dy + dx * dx)


def formula(encoding: BiasEncoding, positions: Positions) -> Formula | None:
    """That of an encoding, whose own `encode` is what defines it; None for one without."""
    tensor = {"device": positions.coords.device, "dtype": torch.float32}
    if type(encoding) is LookHere:
        return Formula(euclidean, encoding.slopes().to(**tensor), encoding.edges.to(**tensor))
    if type(encoding) is Alibi2D:
        return Formula(euclidean, alibi_slopes(encoding.num_heads, **tensor))
    if type(encoding) is Alibi:
        width = encoding.locate(positions).feat_shape[1]
        return Formula(lambda dy, dx: torch.abs(dy * width + dx), alibi_slopes(encoding.num_heads, **tensor))
    return None


def plain(q: Tensor, k: Tensor, v: Tensor, encoding: BiasEncoding, positions: Positions, scale: float) -> Tensor:
    """softmax(scale q k^T + bias) v, (B, heads, T, head_dim) as q, k and v; the bias is `encoding.bias(positions)`."""
    bias = encoding.bias(positions)
    bias = (bias if positions.is_batched else bias.unsqueeze(0)).to(q.dtype)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale)


def fused(q: Tensor, k: Tensor, v: Tensor, encoding: BiasEncoding, positions: Positions, scale: float) -> Tensor:
    """The same by FlexAttention, compiled."""
    from .coordinates_flex import attend

    return attend(q, k, v, formula(encoding, positions), encoding.locate(positions), scale)


def has_formula(encoding: PositionEncoding, positions: Positions) -> bool:
    """Whether the bias of these tokens is a formula of their coordinates in the plane."""
    plane = len(positions.feat_shape) == 2 and not positions.coords.requires_grad
    return plane and type(encoding) in (Alibi, Alibi2D, LookHere)


def takes_coordinates(encoding: PositionEncoding, positions: Positions) -> bool:
    """Whether attention should be given the positions, for `coordinate_attention`, and not a bias computed ahead.

    True on CUDA from 576 patch tokens on, and wherever there is a formula under `use("fused")`.
    """
    worth = choose.mode() == "fused" or positions.num_patches >= WORTH
    return choose.considered(positions.coords) and worth and has_formula(encoding, positions)


def unfit(q: Tensor, k: Tensor, v: Tensor, encoding: BiasEncoding, positions: Positions, scale: float) -> str:
    """Why the kernel cannot run, or ""."""
    if not has_formula(encoding, positions):
        return f"the bias of {encoding.name} is no formula of two coordinates"
    if not 16 <= q.shape[-1] <= 256:
        return f"it takes 16 to 256 channels per head, got {q.shape[-1]}"
    if q.device.type != "cuda" and torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)):
        return f"FlexAttention has no gradients on {q.device.type}"
    if q.device.type != "cuda" and torch.compiler.is_compiling():
        return f"inductor cannot compile it with the formula into one graph on {q.device.type}"
    return ""


def facts(q: Tensor, k: Tensor, v: Tensor, encoding: BiasEncoding, positions: Positions, scale: float) -> tuple:
    """What the kernel is compiled for."""
    return type(encoding), int(q.shape[1]), int(q.shape[-1]), positions.num_prefix_tokens, positions.is_batched


def example(
    device: torch.device, dtype: torch.dtype, encoding: type, heads: int, head_dim: int, prefix: int, batched: bool
) -> tuple:
    """Two samples of a grid of two blocks."""
    generator = torch.Generator().manual_seed(0)
    positions = Positions.grid((10, 15), prefix, device=device)
    if batched:
        positions = positions.keep(torch.stack([torch.arange(140), torch.arange(149, 9, -1)]).to(device))
    shape = 2, heads, positions.num_tokens, head_dim
    qkv = [torch.randn(shape, generator=generator).to(device, dtype).requires_grad_() for _ in range(3)]
    options = {"layer": 0, "depth": 1} if encoding is LookHere else {}
    return *qkv, encoding(heads, **options), positions, 1 / math.sqrt(head_dim)


coordinate_attention = Kernel("coordinate_attention", plain, fused, unfit, facts, example, compiles=True)
