"""Fixed two-dimensional sinusoid: MAE (He et al. 2021, arXiv 2111.06377) and its dialects."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from ..frequencies import flat_index, geometric_frequencies, require_multiple, to_float64
from ..options import Count, Positive
from ..places import InputEncoding
from ..positions import Positions
from ..registry import register_encoding

Preset = Literal["mae", "mocov3", "big_vision", "timm"]
PRESETS = ("mae", "mocov3", "big_vision", "timm")


def _encode(coords: Tensor, feat_shape: tuple[int, ...], dim: int, temperature: float, preset: str) -> Tensor:
    """Return the formula's value at coordinates (..., A), (y, x) for A = 2, in float64."""
    if preset not in PRESETS:
        raise ValueError(f"preset must be one of {', '.join(PRESETS)}, got {preset!r}")
    count = 2 * len(feat_shape)
    require_multiple("dim", dim, count, "a sine and a cosine for each frequency of each axis")
    axes = to_float64(coords).unbind(-1)
    if preset == "mocov3":
        if len(axes) != 2:
            raise ValueError(f"preset 'mocov3' of sincos2d needs 2 coordinates of a token, got {len(axes)}")
        axes, height = axes[::-1], feat_shape[0]
        if height != feat_shape[1]:  # column by column; see the class
            index = flat_index(coords, feat_shape)
            column = torch.div(index, height, rounding_mode="floor")
            axes = index - column * height, column
    omega = geometric_frequencies(dim // count, temperature, inclusive=preset == "big_vision", device=coords.device)
    angles = torch.stack(axes, dim=-1)[..., None] * omega  # (..., A, dim / 2A)
    if preset == "timm":
        return torch.cat([angles.sin(), angles.cos()], dim=-2).flatten(-2)
    return torch.cat([angles.sin(), angles.cos()], dim=-1).flip(-2).flatten(-2)


def sincos_2d(
    feat_shape: tuple[int, int],
    dim: int,
    temperature: float = 10000.0,
    preset: Preset = "mae",
    *,
    device=None,
    dtype: torch.dtype | None = None,
) -> Float[Tensor, "n dim"]:
    """Return the table of a whole grid, (H * W, dim), without a row for a class token; the formula is `SinCos2D`'s.

    Computed in float64 and rounded once, to `dtype` (by default torch's default dtype).

    Raises:
        ValueError: `dim` is not a multiple of 4, an unknown preset, or a temperature that is not positive.

    Example:
        >>> table = vp.sincos_2d((2, 3), dim=8)
        >>> table.shape, table[0].tolist()
        (torch.Size([6, 8]), [0.0, 0.0, 1.0, 1.0, 0.0, 0.0, 1.0, 1.0])
    """
    grid = Positions.grid(feat_shape, device=device)
    return _encode(grid.coords, grid.feat_shape, dim, temperature, preset).to(dtype or torch.get_default_dtype())


@register_encoding("sincos2d")
class SinCos2D(InputEncoding):
    """Half of the channels are a sinusoid of the column, half of the row; fixed, with zeros for prefix tokens.

    x += [sin(x w) | cos(x w) | sin(y w) | cos(y w)], w_i = temperature ** (-i / (dim / 4)), i < dim / 4.

    Presets, each as its reference code computes it:
        mae: as above; x (the column) fills the first half.
        mocov3: equal to mae with the halves swapped on square grids. On others its code lists the table column by
            column while the tokens come row by row; this is reproduced, since weights were trained with it.
        big_vision: exponent i / (dim / 4 - 1), so that the slowest frequency is exactly 1 / temperature.
        timm: channel blocks sin y, sin x, cos y, cos x (`build_sincos2d_pos_embed`).

    On A axes each has dim / A channels, in the same order, the last axis first; mocov3 is for two.

    Args:
        dim: channels of a token, a multiple of 4, and of 2A.
        temperature: 10000 in all four.
        preset: "mae", "mocov3", "big_vision" or "timm".
    """

    paper = "He et al. 2021, arXiv 2111.06377"
    axes = None
    extrapolation = "interpolate"  # the authors fine-tune on larger pictures with a table that is resized

    def __init__(self, dim: Count, temperature: Positive = 10000.0, preset: Preset = "mae", **grid_options):
        super().__init__(dim, **grid_options)
        require_multiple("dim", dim, 4, "a sine and a cosine for each frequency of each axis")
        self.temperature, self.preset = temperature, preset

    def encode(self, positions: Positions) -> Tensor:
        return _encode(positions.coords, positions.feat_shape, self.dim, self.temperature, self.preset)
