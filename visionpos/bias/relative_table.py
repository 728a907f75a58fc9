"""Swin's relative position bias table (Liu et al. 2021, arXiv 2103.14030); its dialects in BEiT, MaxViT and LeViT."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ..options import Count, GridSize, Spread
from ..places import BiasEncoding
from ..positions import Positions
from ..registry import register_encoding
from ..resize import sample_table
from ..windows import same_grid
from .tables import PRESETS, Dialect, Interpolation, Preset


@register_encoding("relative_table")
class RelativeTable(BiasEncoding):
    """One learned number per head and offset: b = table[(dy + h - 1)(2w - 1) + (dx + w - 1)], query minus key.

    On another window the table is resized; between two offsets it is read bilinearly, and beyond the window's (only
    foreign coordinates, or pairs that a shift mask hides, have any) at its border. Prefix tokens have no bias, but in
    "beit".

    Presets:
        swin: as above.
        beit: three more rows, for a class token that looks at a patch, a patch that looks at a class token, and a
            class token that looks at a class token (Bao et al. 2021, arXiv 2106.08254). Every prefix token is treated
            as a class token. Initially zeros; resized geometrically, the three rows copied.
        maxvit: key minus query: the index is Swin's transposed (Tu et al. 2022, arXiv 2204.01697). Its TensorFlow
            table (heads, 2h - 1, 2w - 1) is `table.flatten(1).t()` here.
        levit: without sign, table[|dy| w + |dx|], so left and right are one (Graham et al. 2021, arXiv 2104.01136).
            Initially zeros; resized with its mirror images. LeViT's `attention_biases` (heads, h w) is `table.t()`
            here.

    Args:
        num_heads: attention heads.
        feat_shape: (h, w) of the window, or of the grid for global attention. One or three sizes make a table of as
            many axes, whose rows are in row-major order as well.
        preset: "swin", "beit", "maxvit" or "levit".
        init_std: standard deviation of the normal initialisation, 0 for zeros. None: the preset's, 0.02 in swin (which
            learns slowly) and maxvit, 0 in beit and levit.
        interpolation: "bicubic" (Swin) or "geometric" (BEiT), for another window. None: the preset's.

    Attributes:
        relative_position_bias_table: Parameter ((2h - 1)(2w - 1), heads); three rows more in beit; (h w, heads) in
            levit.
        relative_position_index: buffer (N, N) int64, N = h w, its row for each pair; not in the state dict.

    Raises:
        ValueError: an unknown preset, or queries and keys on different grids.
    """

    paper = "Liu et al. 2021, arXiv 2103.14030"
    learnable = True
    translation_invariant = True
    extrapolation = "resize"

    def __init__(
        self,
        num_heads: Count,
        feat_shape: GridSize,
        preset: Preset = "swin",
        init_std: Spread | None = None,
        interpolation: Interpolation | None = None,
    ):
        super().__init__(num_heads)
        self.feat_shape, self.preset = tuple(feat_shape), preset
        self.init_std = self.dialect.init_std if init_std is None else init_std
        self.interpolation = interpolation or self.dialect.interpolation
        self.register_buffer("relative_position_index", self.dialect.index(self.feat_shape), persistent=False)
        num_rows = math.prod(self.dialect.shape(self.feat_shape)) + self.dialect.class_rows
        self.relative_position_bias_table = nn.Parameter(torch.empty(num_rows, num_heads))
        self._draw_table()

    @property
    def axes(self) -> int:
        """Return the number of axes of the table."""
        return len(self.feat_shape)

    @property
    def dialect(self) -> Dialect:
        """The preset's layout of the table."""
        return PRESETS[self.preset]

    def reset_parameters(self) -> None:
        """Draw the table from a normal distribution of standard deviation `init_std`, cut at +-2 as in Swin's code."""
        super().reset_parameters()
        self._draw_table()

    def _draw_table(self) -> None:
        if self.init_std:
            nn.init.trunc_normal_(self.relative_position_bias_table, std=self.init_std)
        else:
            nn.init.zeros_(self.relative_position_bias_table)

    def reinit_buffers(self) -> None:
        """Compute the index again."""
        device = self.relative_position_index.device
        self.relative_position_index = self.dialect.index(self.feat_shape, device)

    def set_feat_shape(self, feat_shape: tuple[int, ...]) -> None:
        """Resize the table to another window for good."""
        if tuple(feat_shape) != self.feat_shape:
            table = self._resized(feat_shape).detach()
            self.feat_shape = tuple(feat_shape)
            self.set_parameter("relative_position_bias_table", table)
            self.reinit_buffers()

    def _resized(self, feat_shape: tuple[int, ...]) -> Tensor:
        sizes = tuple(feat_shape), self.feat_shape
        return self.dialect.resize(self.relative_position_bias_table, *sizes, self.interpolation)

    def encode(self, queries: Positions, keys: Positions) -> Tensor:
        feat_shape = queries.feat_shape
        if feat_shape != keys.feat_shape:
            raise ValueError(f"queries and keys must live on one grid, got {feat_shape} and {keys.feat_shape}")
        table = self._resized(feat_shape)
        if queries.is_grid and keys.is_grid:
            index = self.relative_position_index
            if not same_grid(feat_shape, self.feat_shape):
                index = self.dialect.index(feat_shape, table.device)
            return table.t().index_select(1, index.flatten()).unflatten(1, index.shape)  # (heads, N, N)
        delta = queries.coords[..., :, None, :] - keys.coords[..., None, :, :]
        size = self.dialect.shape(feat_shape)
        rows = table[: math.prod(size)].unflatten(0, size)  # (rows, columns, heads)
        return sample_table(rows, self.dialect.place(delta, feat_shape)).movedim(-1, -3)  # ([B,] heads, Nq, Nk)

    def with_prefix(self, bias: Tensor, queries: int, keys: int) -> Tensor:
        """Return (..., Nq, Nk) with prefix tokens, (..., queries + Nq, keys + Nk): by beit's three rows, else zeros."""
        if not self.dialect.class_rows:
            return super().with_prefix(bias, queries, keys)
        *lead, num_queries, num_keys = bias.shape
        to_patch, to_class, between = self.relative_position_bias_table[-3:, :, None, None].to(bias.dtype)
        patches = torch.cat([to_class.expand(*lead, num_queries, keys), bias], dim=-1)
        classes = [between.expand(*lead, queries, keys), to_patch.expand(*lead, queries, num_keys)]
        return torch.cat([torch.cat(classes, dim=-1), patches], dim=-2)
