"""ComRoPE: rotation by trainable commuting angle matrices (Yu et al. 2025, arXiv 2506.03737)."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn

from ..frequencies import require_multiple, to_float64
from ..options import Count, Spread
from ..positions import Positions
from ..registry import register_encoding
from ..rotation import Layout, mixed_angles
from .blocks import BlockRotary


@register_encoding("comrope")
class ComRoPE(BlockRotary):
    """Blocks of b channels turn by R(p) = exp(x' A_x + y' A_y), with learned generators that commute.

    Preset "ld", linearly dependent: A_x = theta_x S and A_y = theta_y S in each block, S = P - P^T. Preset "ap", axial
    partition: S alone, even blocks turn with y, odd ones with x. Since the generators of a block commute, q . k
    depends on the offset (dy, dx) alone. Coordinates are (i + 1/2) / n on an axis of n cells, measured from (1/2, 1/2):
    there the paper has its class token, so that prefix tokens, which do not turn, are where the paper puts them.
    The authors' code has the rows of theta in the order y, x. Its perturbation of coordinates in training belongs to
    the positions.

    Args:
        num_heads: attention heads.
        head_dim: channels of a head, a multiple of `block`, and of 2 * `block` with "ap".
        preset: "ld" or "ap".
        block: b; 2 in the authors' configuration, which with "ld" is RoPE-Mixed.
        init_std: standard deviation of the entries of P before training; 1 in the paper's code.
        layout: "interleaved" (the paper) makes blocks of neighbours, "half" of every (head_dim / b)-th channel.

    Attributes:
        generators: Parameter (heads, head_dim / b, b (b - 1) / 2), the upper triangles of S, row by row.
        theta: Parameter (2, head_dim / b) of "ld", for all heads; row 0 multiplies x, row 1 y.

    Raises:
        ValueError: an unknown preset, or blocks that do not divide the channels.
    """

    paper = "Yu et al. 2025, arXiv 2506.03737"
    learnable = True
    translation_invariant = True
    extrapolation = "formula"  # cells count in shares of the picture

    def __init__(
        self,
        num_heads: Count,
        head_dim: Count,
        preset: Literal["ld", "ap"] = "ld",
        block: Count = 2,
        init_std: Spread = 1.0,
        layout: Layout = "interleaved",
    ):
        super().__init__(num_heads, head_dim, block, layout)
        if preset == "ap":
            require_multiple("head_dim", head_dim, 2 * block, "blocks for each of two axes")
        self.preset, self.init_std = preset, init_std
        self.generators = nn.Parameter(torch.empty(num_heads, self.num_blocks, self.block_angles))
        self.theta = nn.Parameter(torch.empty(2, self.num_blocks)) if preset == "ld" else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw P and theta from normal distributions, theta from the standard one."""
        nn.init.normal_(self.generators, std=math.sqrt(2) * self.init_std)  # an entry of P minus another
        if self.theta is not None:
            nn.init.normal_(self.theta)

    def encode(self, positions: Positions) -> Tensor:
        axes = zip(to_float64(positions.coords).unbind(-1), positions.feat_shape, strict=True)
        coords = torch.stack([(i + 0.5) / n - 0.5 for i, n in axes], dim=-1)
        theta = self.theta
        if theta is None:
            odd = to_float64(torch.arange(self.num_blocks, device=coords.device) % 2)
            theta = torch.stack([odd, 1 - odd])
        phases = mixed_angles(coords, theta.unsqueeze(1)).unsqueeze(-1)  # (..., 1, N, blocks, 1)
        return (phases * to_float64(self.generators).unsqueeze(1)).flatten(-2)
