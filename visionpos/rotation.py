"""Rotation of channel pairs by angles: RoFormer (Su et al. 2021, arXiv 2104.09864).

Which channels of a head form pair 0, 1, ... and turn together (head_dim 8):

    channel         0    1    2    3    4    5    6    7
    interleaved    a0   b0   a1   b1   a2   b2   a3   b3     neighbours: the memory of a complex number
    half           a0   a1   a2   a3   b0   b1   b2   b3     one from each half of the head
    half_per_axis  a0   a1   b0   b1   a2   a3   b2   b3     the halves of each half: a block for each of two axes
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from .frequencies import require_multiple, to_float64

Layout = Literal["interleaved", "half"]
AxialLayout = Literal["interleaved", "half", "half_per_axis"]


def lies_in_pairs(x: Tensor) -> bool:
    """Return whether the memory of x (..., D) can be read as complex numbers."""
    *outer, inner = x.stride()
    return inner == 1 and not any(step % 2 for step in (*outer, x.storage_offset()))


def in_pairs(x: Tensor) -> Tensor:
    """(..., D) -> (..., D / 2, 2). A view, as `unflatten`, which batches of gradients do not know."""
    return x.view(*x.shape[:-1], x.shape[-1] // 2, 2)


def as_pairs(x: Tensor) -> Tensor:
    """Return x (..., D) as complex numbers (..., D / 2) of neighbours; a copy where the memory does not allow it."""
    hidden = torch._C._are_functorch_transforms_active()  # axes of `vmap`, whose strides nobody tells
    x = x if lies_in_pairs(x) and not hidden else x.clone(memory_format=torch.contiguous_format)
    return torch.view_as_complex(in_pairs(x))


def channels(x: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
    """Return the first and the second channels of all pairs of x (..., D), (..., D / 2) each."""
    return in_pairs(x).unbind(-1) if layout == "interleaved" else x.chunk(2, dim=-1)


def swap_middle_quarters(x: Tensor) -> Tensor:
    """Return x (..., D) with its channels in the order "half" if they were in "half_per_axis", and the other way."""
    a, b, c, d = x.chunk(4, dim=-1)
    return torch.cat([a, c, b, d], dim=-1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, layout: AxialLayout) -> Tensor:
    """Return x (..., N, D) with its channel pairs rotated, in x's dtype; cos and sin (..., N, D / 2) say how precisely.

    A pair is a complex number and its rotation one product, which in eager mode is three times as fast as real
    arithmetic. Compilers fuse the real lines and break on complex ones.
    """
    if layout == "half_per_axis":
        return swap_middle_quarters(rotate(swap_middle_quarters(x), cos, sin, "half"))
    exact = x.to(torch.promote_types(x.dtype, cos.dtype))
    interleaved = layout == "interleaved"
    a, b = channels(exact, layout)  # (..., N, D / 2)
    if torch.compiler.is_compiling():
        turned = a * cos - b * sin, a * sin + b * cos
    else:
        pairs = as_pairs(exact) if interleaved else torch.complex(a, b)
        pairs = pairs * torch.complex(cos, sin).to(pairs.dtype)
        if interleaved:
            return torch.view_as_real(pairs).reshape(*pairs.shape[:-1], 2 * pairs.shape[-1]).to(x.dtype)
        turned = pairs.real, pairs.imag
    rotated = torch.stack(turned, dim=-1).flatten(-2) if interleaved else torch.cat(turned, dim=-1)
    return rotated.to(x.dtype)


def apply_rotary(
    x: Float[Tensor, "*batch n d"], angles: Float[Tensor, "*heads n pairs"], layout: AxialLayout = "interleaved"
) -> Float[Tensor, "*batch n d"]:
    """Rotate each channel pair (a, b) of x to (a cos t - b sin t, a sin t + b cos t).

    Args:
        x: (..., N, D) queries or keys, D even.
        angles: (..., N, D / 2) in radians, broadcast over leading axes such as batch and heads.
        layout: "interleaved" pairs channels (2i, 2i + 1), as LLaMA and RoPE-ViT; "half" pairs (i, i + D / 2), as
            DINOv3 and Qwen-VL; "half_per_axis" does so in each half of the head, as Gemma 4, with D a multiple of 4.

    Returns:
        (..., N, D) in x's dtype; angles, cosines and products are not computed in less than float32.

    Raises:
        ValueError: another number of tokens or pairs, or an unknown layout.

    Example:
        >>> x = torch.tensor([[1.0, 0.0, 0.0, 1.0]])  # one token, pairs (1, 0) and (0, 1)
        >>> vp.apply_rotary(x, torch.full((1, 2), torch.pi / 2)).round().int().tolist()
        [[0, 1, -1, 0]]
    """
    if layout not in get_args(AxialLayout):
        raise ValueError(f"layout must be one of {', '.join(map(repr, get_args(AxialLayout)))}, got {layout!r}")
    if layout == "half_per_axis":
        require_multiple("D", x.shape[-1], 4, "two blocks of pairs of channels")
    if x.shape[-1] != 2 * angles.shape[-1] or x.shape[-2] != angles.shape[-2]:
        raise ValueError(
            f"angles of shape (..., N, D / 2) are needed for x {tuple(x.shape)}, got {tuple(angles.shape)}"
        )
    angles = angles if angles.dtype == torch.float64 else angles.float()
    return rotate(x, angles.cos(), angles.sin(), layout)


def mixed_angles(
    coords: Float[Tensor, "*batch n axes"], freqs: Float[Tensor, "axes heads pairs"]
) -> Float[Tensor, "*batch heads n pairs"]:
    """Return the angles x freqs[0] + y freqs[1] of coordinates (y, x), in float64: each pair has its own direction.

    On one axis and on three it is the same sum, the last axis first.
    """
    last_first = to_float64(coords)[..., None, :, :, None].unbind(-2)[::-1]  # (..., 1, N, 1) each
    turns = to_float64(freqs).unsqueeze(-2)  # (axes, heads, 1, pairs)
    first, *others = (x * along_x for x, along_x in zip(last_first, turns, strict=True))
    return sum(others, first)


def map_qk_rows(rows: Tensor, num_heads: int, change: Callable[[Tensor], Tensor], fused: bool = True) -> Tensor:
    """Return the weight or bias of a projection with `change` applied to its query and key rows, head by head.

    Args:
        rows: (3 * heads * head_dim, C) or (3 * heads * head_dim,) of a fused qkv; without the 3 where `fused` is False.
        num_heads: attention heads.
        change: maps (2, heads, head_dim, C), queries and keys, or (1, heads, head_dim, C) where `fused` is False, to a
            tensor of the same shape; a bias comes with C = 1.
        fused: queries, keys and values in one projection; the rows of the values stay as they are.

    Raises:
        ValueError: the rows do not divide into heads.
    """
    heads = 3 * num_heads if fused else num_heads
    require_multiple("rows", rows.shape[0], heads, "query, key and value heads" if fused else "heads")
    table = rows.reshape(heads, rows.shape[0] // heads, -1)  # (all heads, head_dim, C or 1)
    turned, kept = table.split([2 * num_heads, num_heads] if fused else [num_heads, 0])
    turned = change(turned.unflatten(0, (-1, num_heads))).flatten(0, 1)
    return torch.cat([turned, kept]).reshape(rows.shape)


def convert_qk_layout(
    rows: Tensor, num_heads: int, source: Layout, target: Layout, *, fused: bool = True, block: int = 2
) -> Tensor:
    """Return the weight or bias of a query and key projection in the order of the other pairing of channels. Exact.

    With both projections converted, attention under the layout `target` computes what it did under `source`: only the
    order of the channels changes, half(x[order]) = interleaved(x)[order], order = the even channels, then the odd.

    Args:
        rows: weight (R, C) or bias (R,), R = 3 * heads * head_dim of a fused qkv. What acts on a head's channels after
            the projection (q_norm, k_norm) is converted too: its (head_dim,) vectors with num_heads=1, fused=False.
        num_heads: attention heads.
        source: the layout that the projection was made for.
        target: the layout that it will be used with.
        fused: False for a projection of queries or of keys alone, R = heads * head_dim.
        block: channels that turn together; more than 2 for the block rotations of `liere` and `comrope`.

    Raises:
        ValueError: an unknown layout, or rows that do not divide into heads and blocks.

    Example:
        >>> bias = torch.tensor([0.0, 1.0, 2.0, 3.0])  # of the queries of one head, channels in pairs (0, 1), (2, 3)
        >>> vp.convert_qk_layout(bias, num_heads=1, source="interleaved", target="half", fused=False).tolist()
        [0.0, 2.0, 1.0, 3.0]
    """
    for layout in (source, target):
        if layout not in ("interleaved", "half"):
            raise ValueError(f"layout must be 'interleaved' or 'half', got {layout!r}")
    if source == target:
        return rows

    def reorder(table: Tensor) -> Tensor:
        head_dim = table.shape[-2]
        require_multiple("head_dim", head_dim, block, "channels that turn together")
        order = torch.arange(head_dim, device=table.device).reshape(-1, block).T.flatten()  # (head_dim,)
        return table[..., order if target == "half" else order.argsort(), :]

    return map_qk_rows(rows, num_heads, reorder, fused)
