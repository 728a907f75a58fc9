"""Absolute win: "Window Attention is Bugged" (Bolya et al. 2023, arXiv 2311.05613)."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from ..options import Count, Size, Spread
from ..places import InputEncoding
from ..positions import Positions
from ..registry import register_encoding
from ..resize import resize_position_table, sample_table


@register_encoding("abs_win")
class AbsWin(InputEncoding):
    """A global table that is resized plus one window that is tiled: x += resize(G)(y, x) + W[y mod wh, x mod ww].

    A table learned with window attention has the windows' period in it; resizing it would stretch that period. Here
    only the global part is resized, and the windows keep their size on every grid, also one that they do not divide.
    Between two cells both parts are read bilinearly, the window with its own repetition. Prefix tokens have no row.

    Args:
        dim: channels of a token.
        window_size: (wh, ww) of W; (8, 8) in Hiera and SAM 2.
        global_size: (Gh, Gw) of G; (14, 14) in Hiera.
        interpolation: "bicubic" or "bilinear", for G.
        antialias: as in timm's Hiera; False as in SAM 2.
        init_std: standard deviation of the normal initialisation; 0.02 as in timm.

    Attributes:
        pos_embed: Parameter (1, dim, Gh, Gw), as in timm's Hiera.
        pos_embed_win: Parameter (1, dim, wh, ww).
    """

    paper = "Bolya et al. 2023, arXiv 2311.05613"
    learnable = True
    from_model = ("window_size",)
    extrapolation = "resize"

    def __init__(
        self,
        dim: Count,
        window_size: Size = (8, 8),
        global_size: Size = (14, 14),
        interpolation: Literal["bicubic", "bilinear"] = "bicubic",
        antialias: bool = True,
        init_std: Spread = 0.02,
    ):
        super().__init__(dim)
        self.window_size, self.global_size = tuple(window_size), tuple(global_size)
        self.interpolation, self.antialias, self.init_std = interpolation, antialias, init_std
        self.pos_embed = nn.Parameter(torch.empty(1, dim, *self.global_size))
        self.pos_embed_win = nn.Parameter(torch.empty(1, dim, *self.window_size))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw both tables from a normal distribution of standard deviation `init_std`, cut at +-2 as in timm."""
        for table in (self.pos_embed, self.pos_embed_win):
            nn.init.zeros_(table)
            if self.init_std:
                nn.init.trunc_normal_(table, std=self.init_std)

    def encode(self, positions: Positions) -> Tensor:
        rows = self.pos_embed[0].flatten(1).t()  # (Gh Gw, dim)
        rows = resize_position_table(
            rows, positions.feat_shape, self.global_size, mode=self.interpolation, antialias=self.antialias
        )
        window = self.pos_embed_win[0].permute(1, 2, 0)  # (wh, ww, dim)
        window = torch.cat([window, window[:1]], dim=0)  # the first row and column again, after the last ones
        window = torch.cat([window, window[:, :1]], dim=1)
        axes = zip(positions.coords.unbind(-1), self.window_size, strict=True)
        inside = torch.stack([torch.remainder(p, size) for p, size in axes], dim=-1)
        return sample_table(rows.unflatten(0, positions.feat_shape), positions.coords) + sample_table(window, inside)
