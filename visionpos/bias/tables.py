"""The dialects of the relative position bias table: which row a pair of tokens has, and tables of another window."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from ..resize import resize_relative_table
from ..windows import relative_position_index, same_grid

Preset = Literal["swin", "beit", "maxvit", "levit"]
Interpolation = Literal["bicubic", "geometric"]


def table_index(feat_shape: tuple[int, int], preset: Preset, device: torch.device | None = None) -> Tensor:
    """The table's row for each pair of patch tokens of a window, (N, N) int64."""
    index = relative_position_index(feat_shape, device=device)
    if preset == "maxvit":
        return index.t().contiguous()
    if preset == "levit":
        h, w = feat_shape
        dy, dx = index // (2 * w - 1) - (h - 1), index % (2 * w - 1) - (w - 1)
        return dy.abs() * w + dx.abs()
    return index


def table_place(delta: Tensor, feat_shape: tuple[int, int], preset: Preset) -> tuple[Tensor, tuple[int, int]]:
    """Where real offsets (..., 2), query minus key, lie in the table: (y, x) coordinates; and its (rows, columns).

    BEiT's three rows are not counted.
    """
    if preset == "levit":
        return delta.abs(), feat_shape
    delta = -delta if preset == "maxvit" else delta
    place = torch.stack([d + (size - 1) for d, size in zip(delta.unbind(-1), feat_shape, strict=True)], dim=-1)
    return place, tuple(2 * size - 1 for size in feat_shape)


def resize_table(
    table: Tensor, new_window: tuple[int, int], old_window: tuple[int, int], preset: Preset, mode: Interpolation
) -> Tensor:
    """The table of another window; the table itself where the windows are equal.

    BEiT's three rows are copied. LeViT's table without signs is mirrored to one with signs, which is resized: by itself
    it would be resampled as if nothing lay on the other side of 0.
    """
    if same_grid(new_window, old_window):
        return table
    if preset == "beit":
        return torch.cat([resize_relative_table(table[:-3], new_window, old_window, mode), table[-3:]])
    if preset == "levit":
        (height, width), (h, w) = new_window, old_window
        rows, columns = ((torch.arange(2 * size - 1, device=table.device) - (size - 1)).abs() for size in (h, w))
        mirrored = table.unflatten(0, (h, w)).index_select(0, rows).index_select(1, columns).flatten(0, 1)
        signed = resize_relative_table(mirrored, new_window, old_window, mode)
        return signed.unflatten(0, (2 * height - 1, 2 * width - 1))[height - 1 :, width - 1 :].flatten(0, 1)
    return resize_relative_table(table, new_window, old_window, mode)
