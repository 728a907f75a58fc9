"""Rotation of channel pairs by angles: RoFormer (Su et al. 2021, arXiv 2104.09864)."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

Layout = Literal["interleaved", "half"]


def rotate(x: Tensor, cos: Tensor, sin: Tensor, layout: Layout) -> Tensor:
    """x (..., N, D) with its channel pairs rotated; cos and sin (..., N, D / 2). In x's dtype, computed in cos's."""
    wide = x.to(torch.promote_types(x.dtype, cos.dtype))
    if layout == "interleaved":
        a, b = wide.unflatten(-1, (-1, 2)).unbind(-1)
        rotated = torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1).flatten(-2)
    else:
        a, b = wide.chunk(2, dim=-1)
        rotated = torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)
    return rotated.to(x.dtype)


def apply_rotary(
    x: Float[Tensor, "*batch n d"], angles: Float[Tensor, "*heads n pairs"], layout: Layout = "interleaved"
) -> Float[Tensor, "*batch n d"]:
    """Rotate each channel pair (a, b) of x to (a cos t - b sin t, a sin t + b cos t).

    Args:
        x: (..., N, D) queries or keys, D even.
        angles: (..., N, D / 2) in radians, broadcast over leading axes such as batch and heads.
        layout: "interleaved" pairs channels (2i, 2i + 1), as LLaMA and RoPE-ViT; "half" pairs (i, i + D / 2), as
            DINOv3 and Qwen-VL.

    Returns:
        (..., N, D) in x's dtype; angles, cosines and products are not computed in less than float32.

    Raises:
        ValueError: another number of tokens or pairs, or an unknown layout.
    """
    if layout not in ("interleaved", "half"):
        raise ValueError(f"layout must be 'interleaved' or 'half', got {layout!r}")
    if x.shape[-1] != 2 * angles.shape[-1] or x.shape[-2] != angles.shape[-2]:
        raise ValueError(
            f"angles of shape (..., N, D / 2) are needed for x {tuple(x.shape)}, got {tuple(angles.shape)}"
        )
    angles = angles if angles.dtype == torch.float64 else angles.float()
    return rotate(x, angles.cos(), angles.sin(), layout)
