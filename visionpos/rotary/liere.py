"""LieRE: "LieRE: Lie Rotational Positional Encodings" (Ostmeier et al. 2024, arXiv 2406.10322)."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor, nn

from ..frequencies import to_float64
from ..options import Count, Size
from ..positions import Positions
from ..registry import register_encoding
from ..rotation import Layout, mixed_angles
from .blocks import BlockRotary


@register_encoding("liere")
class LieRE(BlockRotary):
    """Blocks of b channels turn by R(p) = exp(x' A_x + y' A_y), A learned and skew-symmetric.

    A = U - U^T, U the upper triangle that is learned: for b = 2 rotation by minus the angle, against the sense of
    RoPE. Coordinates run from 0 at the first token of an axis of n cells to n / n_ref at the last; an axis of one
    cell is 0. For b > 2 the generators do not commute, so q . k depends on where both tokens are, not on their offset
    alone.

    The authors' code has one generator for all heads and layers, with y first; here every head of every layer has its
    own, with x first. A pair of theirs, in the other order and repeated for each head, gives their rotations.

    Args:
        num_heads: attention heads.
        head_dim: channels of a head, a multiple of `block`.
        block: b; 8 or 64 in the paper.
        layout: "interleaved" (the paper) makes blocks of neighbours, "half" of every (head_dim / b)-th channel.
        reference_shape: (H, W) of the grid that was trained on, n_ref; None: every grid has the coordinates [0, 1].

    Attributes:
        generators: Parameter (2, heads, head_dim / b, b (b - 1) / 2), the upper triangles, row by row; the first
            multiplies x, the second y.
    """

    paper = "Ostmeier et al. 2024, arXiv 2406.10322"
    learnable = True
    extrapolation = "formula"  # the frame of the docstring

    def __init__(
        self,
        num_heads: Count,
        head_dim: Count,
        block: Count = 8,
        layout: Layout = "interleaved",
        reference_shape: Size | None = None,
    ):
        super().__init__(num_heads, head_dim, block, layout)
        self.reference_shape = None if reference_shape is None else tuple(reference_shape)
        self.generators = nn.Parameter(torch.empty(2, num_heads, self.num_blocks, self.block_angles))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the upper triangles, uniform in [0, 2 pi)."""
        nn.init.uniform_(self.generators, 0, 2 * math.pi)

    def locate(self, positions: Positions) -> Positions:
        sizes = positions.feat_shape
        axes = zip(to_float64(positions.coords).unbind(-1), sizes, self.reference_shape or sizes, strict=True)
        coords = torch.stack([i * (n / n_ref / max(n - 1, 1)) for i, n, n_ref in axes], dim=-1)
        return replace(positions, coords=coords, is_grid=False)

    def encode(self, positions: Positions) -> Tensor:
        return mixed_angles(positions.coords, self.generators.flatten(2))
