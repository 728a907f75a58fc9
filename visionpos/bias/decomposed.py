"""Decomposed relative positions: MViTv2 (Li et al. 2022, arXiv 2112.01526), as in ViTDet and SAM."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from ..frequencies import to_float64
from ..options import Count, Size, Spread
from ..places import ContextualBias
from ..positions import Positions
from ..registry import register_encoding
from ..resize import resize_matrix


@register_encoding("decomposed")
class Decomposed(ContextualBias):
    """A vector per row offset and one per column offset, which the query meets: b = q . Rh[dy] + q . Rw[dx].

    Offsets are query minus key; Rh[dy] is row dy + H - 1 of its table. q is NOT scaled by 1 / sqrt(head_dim), in SAM as
    in MViT, while the logits that b is added to are. All heads share the vectors. On another grid the tables are
    resized linearly; between two offsets scores are read linearly, beyond the last at the last. Prefix tokens have
    no bias.

    Args:
        num_heads: attention heads.
        head_dim: channels of a head.
        feat_shape: (H, W) of the grid or window.
        preset: initialisation: "sam" (zeros) or "mvit" (truncated normal of standard deviation 0.02).
        init_std: another standard deviation than the preset's.

    Attributes:
        rel_pos_h: Parameter (2H - 1, head_dim), as in timm's SAM.
        rel_pos_w: Parameter (2W - 1, head_dim).

    Raises:
        ValueError: queries and keys on two grids.
    """

    paper = "Li et al. 2022, arXiv 2112.01526"
    learnable = True
    translation_invariant = True
    extrapolation = "resize"

    def __init__(
        self,
        num_heads: Count,
        head_dim: Count,
        feat_shape: Size,
        preset: Literal["sam", "mvit"] = "sam",
        init_std: Spread | None = None,
    ):
        super().__init__(num_heads)
        self.head_dim, self.feat_shape = head_dim, tuple(feat_shape)
        self.init_std = init_std if init_std is not None else 0.02 if preset == "mvit" else 0.0
        self.rel_pos_h = nn.Parameter(torch.empty(2 * self.feat_shape[0] - 1, head_dim))
        self.rel_pos_w = nn.Parameter(torch.empty(2 * self.feat_shape[1] - 1, head_dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw both tables from a normal distribution of standard deviation `init_std`, cut at +-2; zeros at 0."""
        for table in (self.rel_pos_h, self.rel_pos_w):
            nn.init.zeros_(table)
            if self.init_std:
                nn.init.trunc_normal_(table, std=self.init_std)

    def _resized(self, table: Tensor, size: int) -> Tensor:
        """Return a table (2 old - 1, head_dim) at (2 size - 1, head_dim), as torch's interpolate in mode "linear"."""
        if len(table) == 2 * size - 1:
            return table
        rows = to_float64(table)
        matrix = resize_matrix(2 * size - 1, len(table), "bilinear", antialias=False, device=table.device)
        return (matrix.to(rows) @ rows).to(table.dtype)

    def set_feat_shape(self, feat_shape: tuple[int, int]) -> None:
        """Resize the tables to another grid for good."""
        for name, size in zip(("rel_pos_h", "rel_pos_w"), feat_shape, strict=True):
            table = getattr(self, name)
            if len(table) != 2 * size - 1:
                self.set_parameter(name, self._resized(table, size).detach())
        self.feat_shape = tuple(feat_shape)

    def encode(self, queries: Positions, keys: Positions, content: Tensor) -> Tensor:
        size = queries.feat_shape
        if size != keys.feat_shape:
            raise ValueError(f"queries and keys must live on one grid, got {size} and {keys.feat_shape}")
        tables = [
            self._resized(table, n).to(content.dtype)
            for table, n in zip((self.rel_pos_h, self.rel_pos_w), size, strict=True)
        ]
        if queries.is_grid and keys.is_grid:
            return self._on_grid(content.unflatten(2, size), *tables)
        bias = 0.0
        for axis, table in enumerate(tables):
            place = queries.coords[..., :, None, axis] - keys.coords[..., None, :, axis] + (size[axis] - 1)
            place = place.clamp(0, len(table) - 1)
            place = place if place.ndim == 3 else place.unsqueeze(0)
            low = place.floor()
            share = (place - low).unsqueeze(1)
            scores = content @ table.t()  # (B, heads, Nq, 2 size - 1)
            for row, weight in ((low, 1 - share), ((low + 1).clamp(max=len(table) - 1), share)):
                index = row.long().unsqueeze(1).expand(*scores.shape[:-1], -1)
                bias = bias + weight * scores.gather(-1, index)
        return bias

    def _on_grid(self, q: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        """Return the same on a whole grid, where each row of queries needs one look-up: q (B, heads, H, W, D)."""
        y, x = (torch.arange(n, device=q.device) for n in q.shape[2:4])
        up = rows[y[:, None] - y + (len(y) - 1)]  # (H, H, D): query row, key row
        across = columns[x[:, None] - x + (len(x) - 1)]
        by_row = torch.einsum("bhyxd,ykd->bhyxk", q, up)
        by_column = torch.einsum("bhyxd,xld->bhyxl", q, across)
        return (by_row.unsqueeze(-1) + by_column.unsqueeze(-2)).flatten(4).flatten(2, 3)
