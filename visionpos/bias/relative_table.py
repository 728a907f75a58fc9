"""Swin's relative position bias table (Liu et al. 2021, arXiv 2103.14030)."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from ..places import BiasEncoding
from ..positions import Positions
from ..registry import register_encoding
from ..resize import resize_relative_table, sample_table
from ..windows import relative_position_index


@register_encoding("relative_table")
class RelativeTable(BiasEncoding):
    """One learned number per head and offset: b = table[(dy + h - 1)(2w - 1) + (dx + w - 1)], query minus key.

    On another window the table is resized; between two offsets it is read bilinearly, and beyond the window's (only
    foreign coordinates, or pairs that a shift mask hides, have any) at its border. Prefix tokens have no bias.

    Args:
        num_heads: attention heads.
        feat_shape: (h, w) of the window, or of the grid for global attention.
        init_std: standard deviation of the normal initialisation; 0.02 in the paper, which learns slowly.
        interpolation: "bicubic" (Swin) or "geometric" (BEiT), for another window.

    Attributes:
        relative_position_bias_table: Parameter ((2h - 1)(2w - 1), heads).
        relative_position_index: buffer (N, N) int64, N = h w; not in the state dict.
    """

    paper = "Liu et al. 2021, arXiv 2103.14030"
    learnable = True
    shared = False
    translation_invariant = True
    extrapolation = "resize"

    def __init__(
        self,
        num_heads: int,
        feat_shape: tuple[int, int],
        init_std: float = 0.02,
        interpolation: Literal["bicubic", "geometric"] = "bicubic",
    ):
        super().__init__(num_heads)
        self.feat_shape = h, w = tuple(feat_shape)
        self.init_std, self.interpolation = init_std, interpolation
        self.relative_position_bias_table = nn.Parameter(torch.empty((2 * h - 1) * (2 * w - 1), num_heads))
        self.register_buffer("relative_position_index", relative_position_index(self.feat_shape), persistent=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the table from a normal distribution of standard deviation `init_std`, cut at +-2 as in Swin's code."""
        nn.init.trunc_normal_(self.relative_position_bias_table, std=self.init_std)

    def reinit_buffers(self) -> None:
        """Compute the index again."""
        device = self.relative_position_index.device
        self.relative_position_index = relative_position_index(self.feat_shape, device=device)

    def set_feat_shape(self, feat_shape: tuple[int, int]) -> None:
        """Resize the table to another window for good."""
        if tuple(feat_shape) != self.feat_shape:
            table = self._resized(feat_shape).detach()
            self.set_parameter("relative_position_bias_table", table)
            self.feat_shape = tuple(feat_shape)
            self.reinit_buffers()

    def _resized(self, feat_shape: tuple[int, int]) -> Tensor:
        return resize_relative_table(self.relative_position_bias_table, feat_shape, self.feat_shape, self.interpolation)

    def encode(self, queries: Positions, keys: Positions) -> Tensor:
        feat_shape = queries.feat_shape
        if feat_shape != keys.feat_shape:
            raise ValueError(f"queries and keys must live on one grid, got {feat_shape} and {keys.feat_shape}")
        table = self._resized(feat_shape)
        if queries.is_grid and keys.is_grid:
            index = self.relative_position_index
            if feat_shape != self.feat_shape:
                index = relative_position_index(feat_shape, device=queries.coords.device)
            return table.t().index_select(1, index.flatten()).unflatten(1, index.shape)  # (heads, N, N)
        delta = queries.coords[..., :, None, :] - keys.coords[..., None, :, :]
        offsets = [2 * size - 1 for size in feat_shape]
        place = delta + torch.tensor([size - 1.0 for size in feat_shape], device=delta.device)
        return sample_table(table.unflatten(0, offsets), place).movedim(-1, -3)  # ([B,] heads, Nq, Nk)
