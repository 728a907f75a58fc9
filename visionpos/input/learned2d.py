"""A learned grid that any resolution samples: NaFlex (SigLIP 2, Tschannen et al. 2025, arXiv 2502.14786)."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from ..options import Count, Size, Spread
from ..places import InputEncoding
from ..positions import Positions
from ..registry import register_encoding
from ..resize import resize_position_table, sample_table


@register_encoding("learned2d")
class Learned2D(InputEncoding):
    """One learned grid of vectors, stretched over the image and read at each token's place.

    Token (y, x) of an H x W grid reads the table (Gh, Gw) at ((y + 0.5) Gh / H - 0.5, (x + 0.5) Gw / W - 0.5),
    bilinearly: cell centres on cell centres, exact where the grids are equal. The table keeps its size whatever the
    image. Prefix tokens have no row.

    Args:
        dim: channels of a token.
        grid_size: (Gh, Gw) of the table; (16, 16) in SigLIP 2.
        interpolation: "sample" reads the table at each token, any real coordinates included, and so does "corners",
            at (y (Gh - 1) / (H - 1), x (Gw - 1) / (W - 1)): corners on corners (Qwen3-VL). "bilinear" (big_vision)
            and "bicubic" (timm's NaFlexVit) resize the whole table to the grid with antialias, then read between
            its cells. They differ where the table is larger than the grid, and for "bicubic" everywhere else.
        keep_aspect: stretch the table over the square of the longer side and read its upper left part, as timm's
            `pos_embed_ar_preserving`, instead of over the image.
        init_std: standard deviation of the normal initialisation; 0.02 as in timm.

    Attributes:
        pos_embed: Parameter (1, Gh, Gw, dim), as in timm's NaFlexVit.
    """

    paper = "Tschannen et al. 2025, arXiv 2502.14786"
    learnable = True
    from_model = ("grid_size",)
    extrapolation = "resize"

    def __init__(
        self,
        dim: Count,
        grid_size: Size = (16, 16),
        interpolation: Literal["sample", "corners", "bilinear", "bicubic"] = "sample",
        keep_aspect: bool = False,
        init_std: Spread = 0.02,
    ):
        super().__init__(dim)
        if interpolation not in ("sample", "corners", "bilinear", "bicubic"):
            raise ValueError(
                f"interpolation must be 'sample', 'corners', 'bilinear' or 'bicubic', got {interpolation!r}"
            )
        self.grid_size, self.interpolation, self.keep_aspect = tuple(grid_size), interpolation, keep_aspect
        self.init_std = init_std
        self.pos_embed = nn.Parameter(torch.empty(1, *self.grid_size, dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the table from a normal distribution of standard deviation `init_std`."""
        nn.init.normal_(self.pos_embed, std=self.init_std)

    def encode(self, positions: Positions) -> Tensor:
        table, coords, size = self.pos_embed[0], positions.coords, positions.feat_shape
        size = (max(size),) * 2 if self.keep_aspect else size  # the grid that the table is stretched over
        axes = zip(coords.unbind(-1), self.grid_size, size, strict=True)
        if self.interpolation == "sample":
            return sample_table(table, torch.stack([(p + 0.5) * (g / n) - 0.5 for p, g, n in axes], dim=-1))
        if self.interpolation == "corners":
            return sample_table(table, torch.stack([p * ((g - 1) / max(n - 1, 1)) for p, g, n in axes], dim=-1))
        rows = resize_position_table(table.flatten(0, 1), size, self.grid_size, mode=self.interpolation)
        return sample_table(rows.unflatten(0, size), coords)
