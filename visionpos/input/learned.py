"""ViT's learned table: "An Image is Worth 16x16 Words" (Dosovitskiy et al. 2021, arXiv 2010.11929)."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from ..options import Count, Natural, Size, Spread
from ..places import InputEncoding
from ..positions import Positions
from ..registry import register_encoding
from ..resize import resize_position_table, sample_table


@register_encoding("learned")
class Learned(InputEncoding):
    """One learned vector per patch of a grid, and one per prefix token: x += pos_embed.

    Patch (y, x) has the row P + y W + x. On another grid the patch rows are resized, prefix rows copied;
    between the cells of a grid the table is read bilinearly.

    Args:
        dim: channels of a token.
        feat_shape: (H, W) of the grid.
        num_prefix_tokens: P, prefix tokens that have a row of their own.
        init_std: standard deviation of the normal initialisation; 0.02 in the paper. It decides what can be learned:
            at 0.02 small position tasks stay at chance where 0.2 to 0.5 solves them.
        interpolation: "bicubic" or "bilinear", for another grid.
        antialias: as in timm; False as in the code of DeiT, MAE and Swin.

    Attributes:
        pos_embed: Parameter (1, P + H W, dim).
    """

    paper = "Dosovitskiy et al. 2021, arXiv 2010.11929"
    learnable = True
    from_model = ("num_prefix_tokens",)
    extrapolation = "resize"

    def __init__(
        self,
        dim: Count,
        feat_shape: Size,
        num_prefix_tokens: Natural = 0,
        init_std: Spread = 0.02,
        interpolation: Literal["bicubic", "bilinear"] = "bicubic",
        antialias: bool = True,
    ):
        super().__init__(dim)
        self.feat_shape, self.num_prefix_tokens = tuple(feat_shape), num_prefix_tokens
        self.init_std, self.interpolation, self.antialias = init_std, interpolation, antialias
        num_rows = num_prefix_tokens + self.feat_shape[0] * self.feat_shape[1]
        self.pos_embed = nn.Parameter(torch.empty(1, num_rows, dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the table from a normal distribution of standard deviation `init_std`."""
        nn.init.normal_(self.pos_embed, std=self.init_std)

    def _resized(self, feat_shape: tuple[int, int]) -> Tensor:
        sizes = feat_shape, self.feat_shape
        return resize_position_table(self.pos_embed, *sizes, self.num_prefix_tokens, self.interpolation, self.antialias)

    def set_feat_shape(self, feat_shape: tuple[int, int]) -> None:
        """Resize the table to another grid for good."""
        if tuple(feat_shape) != self.feat_shape:
            self.set_parameter("pos_embed", self._resized(feat_shape).detach())
            self.feat_shape = tuple(feat_shape)

    def encode(self, positions: Positions) -> Tensor:
        rows = self._resized(positions.feat_shape)[0, self.num_prefix_tokens :]
        if positions.is_grid:
            return rows
        return sample_table(rows.unflatten(0, positions.feat_shape), positions.coords)

    def embed_prefix(self, num_prefix_tokens: int) -> Tensor | None:
        """Return the rows of the prefix tokens, (P, dim); zeros where the table was built without any."""
        if self.num_prefix_tokens not in (0, num_prefix_tokens):
            raise ValueError(f"learned has num_prefix_tokens={self.num_prefix_tokens}, got {num_prefix_tokens}")
        return self.pos_embed[0, : self.num_prefix_tokens] if self.num_prefix_tokens else None
