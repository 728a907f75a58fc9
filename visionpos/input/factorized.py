"""Factorised tables: "Patch n' Pack: NaViT" (Dehghani et al. 2023, arXiv 2307.06304)."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from ..options import Count, Scale, Size
from ..places import InputEncoding
from ..positions import Positions
from ..registry import register_encoding
from ..resize import sample_table


@register_encoding("factorized")
class Factorized(InputEncoding):
    """A learned vector per row and one per column: x += Ey[y] + Ex[x], or their product.

    With `coordinates` "fraction" token (y, x) of an H x W grid reads the tables at the same relative place,
    (y + 0.5) / H Gh - 0.5 and (x + 0.5) / W Gw - 0.5, so any grid uses all rows; with "index" at y and x themselves.
    Between two rows a table is read linearly. Prefix tokens have no row. The paper describes both coordinates.

    Args:
        dim: channels of a token.
        feat_shape: (Gh, Gw), rows of the two tables; for "index" the largest grid.
        combine: "sum" (what the paper found best) or "product".
        coordinates: "fraction" (timm's `factorized`) or "index".
        keep_aspect: of fractions: H and W are both the longer side, as in timm's `pos_embed_ar_preserving`.
        init_std: standard deviation of the normal initialisation; 0.02 as in timm.

    Attributes:
        pos_embed_y: Parameter (1, Gh, dim), as in timm's NaFlexVit.
        pos_embed_x: Parameter (1, Gw, dim).

    Raises:
        ValueError: with "index", a grid larger than the tables.
    """

    paper = "Dehghani et al. 2023, arXiv 2307.06304"
    learnable = True
    extrapolation = "resize"

    def __init__(
        self,
        dim: Count,
        feat_shape: Size,
        combine: Literal["sum", "product"] = "sum",
        coordinates: Literal["fraction", "index"] = "fraction",
        keep_aspect: bool = False,
        init_std: Scale = 0.02,
    ):
        super().__init__(dim)
        self.feat_shape, self.combine, self.coordinates = tuple(feat_shape), combine, coordinates
        self.keep_aspect, self.init_std = keep_aspect, init_std
        self.pos_embed_y = nn.Parameter(torch.empty(1, self.feat_shape[0], dim))
        self.pos_embed_x = nn.Parameter(torch.empty(1, self.feat_shape[1], dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw both tables from a normal distribution of standard deviation `init_std`."""
        nn.init.normal_(self.pos_embed_y, std=self.init_std)
        nn.init.normal_(self.pos_embed_x, std=self.init_std)

    def encode(self, positions: Positions) -> Tensor:
        size = positions.feat_shape
        if self.coordinates == "index" and any(n > g for n, g in zip(size, self.feat_shape, strict=True)):
            raise ValueError(f"factorized with coordinates='index' has tables for {self.feat_shape}, got a grid {size}")
        size = (max(size),) * 2 if self.keep_aspect else size  # the grid that the tables are stretched over
        read, tables = [], (self.pos_embed_y[0], self.pos_embed_x[0])
        for table, place, n in zip(tables, positions.coords.unbind(-1), size, strict=True):
            if self.coordinates == "fraction":
                place = (place + 0.5) * (len(table) / n) - 0.5
            read.append(sample_table(table, place.unsqueeze(-1)))
        return read[0] + read[1] if self.combine == "sum" else read[0] * read[1]
