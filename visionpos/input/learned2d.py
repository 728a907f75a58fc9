"""A learned grid that any resolution samples: NaFlex (SigLIP 2, Tschannen et al. 2025, arXiv 2502.14786)."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from ..options import Count, Size, Spread
from ..places import InputEncoding
from ..positions import Positions
from ..registry import register_encoding
from ..resize import resize_position_table, sample_table
from ..windows import same_grid


class Table(NamedTuple):
    """Hold how a model of a paper has its table."""

    grid_size: tuple[int, int]
    interpolation: str
    antialias: bool
    init_std: float


PRESETS = {
    "siglip2": Table((16, 16), "sample", True, 0.02),
    "moonvit": Table((64, 64), "bicubic", False, 1.0),
    "qwen3_vl": Table((48, 48), "ends", True, 0.02),
}


@register_encoding("learned2d")
class Learned2D(InputEncoding):
    """One learned grid of vectors, stretched over the image and read at each token's place.

    Token (y, x) of an H x W grid reads the table (Gh, Gw) at ((y + 0.5) Gh / H - 0.5, (x + 0.5) Gw / W - 0.5),
    bilinearly: cell centres on cell centres, exact where the grids are equal. The table keeps its size whatever the
    image. Prefix tokens have no row.

    Presets, the tables of released models; whatever else is given goes before them:
        siglip2: 16 x 16 cells, "sample", drawn with 0.02.
        moonvit: 64 x 64, "bicubic" without antialias, drawn with 1 (Kimi-VL, Kimi Team 2025, arXiv 2504.07491).
        qwen3_vl: 48 x 48, "ends" (Qwen Team 2025); equals timm's `qwen3_vit`, whose 0.02 it is drawn with.

    Args:
        dim: channels of a token.
        grid_size: (Gh, Gw) of the table. None: that of the preset.
        interpolation: "sample" reads the table at each token, any real coordinates included, and so does "ends", at
            (y (Gh - 1) / (H - 1), x (Gw - 1) / (W - 1)): corner cells on corner tokens. "bilinear" (big_vision) and
            "bicubic" (timm's NaFlexVit) resize the whole table to the grid, then read between its cells; with antialias
            they differ from "sample" where the table is larger than the grid, and "bicubic" does everywhere. None: that
            of the preset.
        keep_aspect: stretch the table over the square of the longer side and read its upper left part, as timm's
            `pos_embed_ar_preserving`, instead of over the image; on its own grid it is read as it is.
        init_std: standard deviation of the normal initialisation. None: that of the preset.
        preset: "siglip2", "moonvit" or "qwen3_vl".
        antialias: of resized tables, as in `learned`. None: that of the preset.

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
        grid_size: Size | None = None,
        interpolation: Literal["sample", "ends", "bilinear", "bicubic"] | None = None,
        keep_aspect: bool = False,
        init_std: Spread | None = None,
        preset: Literal["siglip2", "moonvit", "qwen3_vl"] = "siglip2",
        antialias: bool | None = None,
    ):
        super().__init__(dim)
        given = grid_size, interpolation, antialias, init_std
        values = [own if value is None else value for value, own in zip(given, PRESETS[preset], strict=True)]
        self.grid_size, self.interpolation, self.antialias, self.init_std = tuple(values[0]), *values[1:]
        self.preset, self.keep_aspect = preset, keep_aspect
        self.pos_embed = nn.Parameter(torch.empty(1, *self.grid_size, dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the table from a normal distribution of standard deviation `init_std`."""
        nn.init.normal_(self.pos_embed, std=self.init_std)

    def encode(self, positions: Positions) -> Tensor:
        table, coords, size = self.pos_embed[0], positions.coords, positions.feat_shape
        if self.keep_aspect and not same_grid(size, self.grid_size):
            size = (max(size),) * 2  # the grid that the table is stretched over
        axes = list(zip(coords.unbind(-1), self.grid_size, size, strict=True))
        if self.interpolation == "sample":
            return sample_table(table, torch.stack([(p + 0.5) * (g / n) - 0.5 for p, g, n in axes], dim=-1))
        if self.interpolation == "ends":
            return sample_table(table, torch.stack([p * ((g - 1) / max(n - 1, 1)) for p, g, n in axes], dim=-1))
        rows = resize_position_table(
            table.flatten(0, 1), size, self.grid_size, mode=self.interpolation, antialias=self.antialias
        )
        return sample_table(rows.unflatten(0, size), coords)
