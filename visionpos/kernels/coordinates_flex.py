"""The kernel of `coordinates.py`, by FlexAttention."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from ..materialize import materialize
from ..places import BORDER
from ..positions import Positions
from .choose import one_thread

BLOCK = 128  # tokens, FlexAttention's
# Tiles that leave registers for a formula. With torch's own the forward kernel takes 6.5 times as long on an H200.
TILES = {
    **{"fwd_BLOCK_M": 64, "fwd_BLOCK_N": 32, "fwd_num_warps": 4, "fwd_num_stages": 3},
    **{"bwd_BLOCK_M1": 64, "bwd_BLOCK_N1": 64, "bwd_BLOCK_M2": 64, "bwd_BLOCK_N2": 64},
    **{"bwd_num_warps": 4, "bwd_num_stages": 2},
}
TILES_MAX_HEAD_DIM = 64  # what they were measured with; wider heads take more of a processor's memory
MAX_GRAPHS = 1024  # of sizes, dtypes, formulas and modes; beyond its 8 torch would compute all pairs in memory
BEYOND = 1e9  # grid steps: how far a prefix token reaches, which sees and is seen from everywhere

_compiled = torch.compile(flex_attention, dynamic=False)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    formula: Callable[[Tensor, Tensor, Tensor], Tensor],
    half_planes: Tensor | None,
    positions: Positions,
    scale: float,
) -> Tensor:
    """Return softmax(scale q k^T + bias) v, (B, heads, T, head_dim) as q, k and v; see `modifiers`."""
    score_mod, blocks = modifiers(formula, half_planes, positions)
    options = {"score_mod": score_mod, "block_mask": blocks, "scale": scale}
    if q.is_cuda and q.shape[-1] <= TILES_MAX_HEAD_DIM:
        options["kernel_options"] = TILES
    if torch.compiler.is_compiling():
        return flex_attention(q, k, v, **options)
    limits = torch._dynamo.config.patch(recompile_limit=MAX_GRAPHS, accumulated_recompile_limit=MAX_GRAPHS)
    with one_thread, limits:
        return _compiled(q, k, v, **options)


def modifiers(
    formula: Callable[[Tensor, Tensor, Tensor], Tensor], half_planes: Tensor | None, positions: Positions
) -> tuple[Callable, BlockMask | None]:
    """Return FlexAttention's score_mod and block_mask. Prefix tokens have no bias and are never hidden.

    Args:
        formula: see `BiasEncoding.formula`.
        half_planes: (heads, P, 2), see `BiasEncoding.half_planes`, or None.
        positions: of all tokens, on the grid that was trained on.
    """
    prefix, coords = positions.num_prefix_tokens, positions.coords  # ([B,] N, 2)
    y, x = (materialize(axis.contiguous()) for axis in coords.unbind(-1))  # ([B,] N), dense for inductor

    def offset(b, query, key):  # prefix tokens stand where the first patch does, and nothing asks where that is
        q, k = ((token - prefix).clamp(min=0) for token in (query, key)) if prefix else (query, key)
        q, k = ((b, q), (b, k)) if positions.is_batched else (q, k)
        return y[q] - y[k], x[q] - x[k]

    def score_mod(score, b, h, query, key):
        biased = score + formula(h, *offset(b, query, key))
        return torch.where((query >= prefix) & (key >= prefix), biased, score) if prefix else biased

    if half_planes is None:
        return score_mod, None
    normals = half_planes.to(coords)

    def mask_mod(b, h, query, key):
        dy, dx = offset(b, query, key)
        seen = normals[h, 0, 0] * dy + normals[h, 0, 1] * dx <= BORDER
        for i in range(1, normals.shape[1]):
            seen = seen & (normals[h, i, 0] * dy + normals[h, i, 1] * dx <= BORDER)
        return seen | (query < prefix) | (key < prefix)

    return score_mod, block_mask(normals, coords, prefix, mask_mod)


def block_mask(normals: Tensor, coords: Tensor, num_prefix_tokens: int, mask_mod: Callable) -> BlockMask:
    """Return the blocks of which some or all pairs lie in all half planes of `mask_mod`.

    Args:
        normals: (heads, P, 2), see `BiasEncoding.half_planes`.
        coords: ([B,] N, 2).
        num_prefix_tokens: tokens before those, which are never hidden.
        mask_mod: the same for pairs.
    """
    num_tokens = num_prefix_tokens + coords.shape[-2]
    front, back = (0, 0, num_prefix_tokens, 0), (0, 0, 0, -num_tokens % BLOCK)

    def fill(reach: float) -> Tensor:  # tokens after the last one have no part in a bounding box
        return F.pad(F.pad(coords, front, value=reach), back, value=-reach).unflatten(-2, (-1, BLOCK))

    low, high = fill(-BEYOND).amin(-2), fill(BEYOND).amax(-2)  # corners of the boxes, ([B,] blocks, 2)
    nearest = low[..., None, :, :] - high[..., :, None, :]  # of key minus query: ([B,] blocks, blocks, 2)
    farthest = high[..., None, :, :] - low[..., :, None, :]
    nearest, farthest = (x[..., None, None, :, :, :] for x in (nearest, farthest))
    planes = normals.shape[1]
    normals = torch.cat([normals, normals.sum(1, keepdim=True)], dim=1)  # what is in all half planes is in their sum's
    normals = normals[:, :, None, None, :]  # (heads, P + 1, 1, 1, 2)
    ends = torch.stack([normals * nearest, normals * farthest])  # (2, [B,] heads, P + 1, blocks, blocks, 2)
    some = (ends.amax(0).sum(-1) >= -planes * BORDER).all(-3)  # ([B,] heads, blocks, blocks)
    every = (ends.amin(0).sum(-1) >= -BORDER).all(-3)
    whole = torch.arange(every.shape[-1], device=coords.device) < num_tokens // BLOCK  # the last block may be ragged
    every = every & whole & whole[:, None]
    if coords.ndim == 2:
        some, every = some[None], every[None]
    lists = [part for mask in (some & ~every, every) for part in (mask.sum(-1).int(), _first_true(mask))]
    return BlockMask.from_kv_blocks(*lists, BLOCK, mask_mod, (num_tokens, num_tokens))


def _first_true(mask: Tensor) -> Tensor:
    """Return indices of the last axis, (..., n) -> (..., n), with those of the true entries first."""
    return mask.int().argsort(dim=-1, descending=True, stable=True).int()
