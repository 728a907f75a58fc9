"""The dialects of the relative position bias table: which row a pair of tokens has, and tables of another window."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..frequencies import flat_index
from ..positions import Positions
from ..resize import resize_relative_table
from ..windows import same_grid

Preset = Literal["swin", "beit", "maxvit", "levit"]
Interpolation = Literal["bicubic", "geometric"]


@dataclass(frozen=True)
class Dialect:
    """How one family of models lays its table out. By default as Swin: rows by query minus key, (2h - 1)(2w - 1).

    Args:
        init_std: standard deviation of the initial table.
        interpolation: how the table is carried to another window.
        sign: of the offset, 1 for query minus key, -1 for key minus query, 0 for its size alone: h w rows.
        class_rows: rows after those of the offsets, for pairs with a class token.
    """

    init_std: float = 0.02
    interpolation: Interpolation = "bicubic"
    sign: int = 1
    class_rows: int = 0

    def shape(self, window: tuple[int, ...]) -> tuple[int, ...]:
        """Return the (rows, columns) of offsets that the table has for a window (h, w)."""
        return tuple(2 * size - 1 for size in window) if self.sign else tuple(window)

    def place(self, delta: Tensor, window: tuple[int, ...]) -> Tensor:
        """Return where offsets (..., A), query minus key, whole or real, lie in that shape: (row, column) for A = 2."""
        if not self.sign:
            return delta.abs()
        axes = zip(delta.unbind(-1), window, strict=True)
        return torch.stack([self.sign * offset + (size - 1) for offset, size in axes], dim=-1)

    def index(self, window: tuple[int, ...], device: torch.device | None = None) -> Tensor:
        """Return the table's row for each pair of patch tokens of a window: (N, N) int64, N = h w."""
        coords = Positions.grid(window, device=device).coords  # (N, A)
        return flat_index(self.place(coords[:, None] - coords, window), self.shape(window)).long()

    def resize(self, table: Tensor, new: tuple[int, ...], old: tuple[int, ...], mode: Interpolation) -> Tensor:
        """Return the table of another window, (rows, heads); the table itself where the windows are equal.

        Rows of class tokens are copied. A table without signs is mirrored to one with signs, which is resized: by
        itself it would be resampled as if nothing lay on the other side of 0.
        """
        if same_grid(new, old):
            return table
        offsets, classes = table.split([len(table) - self.class_rows, self.class_rows])
        if self.sign:
            return torch.cat([resize_relative_table(offsets, new, old, mode), classes])
        mirrored = offsets.unflatten(0, old)
        for axis, size in enumerate(old):
            mirrored = mirrored.index_select(axis, (torch.arange(2 * size - 1, device=table.device) - (size - 1)).abs())
        signed = resize_relative_table(mirrored.flatten(0, -2), new, old, mode).unflatten(0, [2 * n - 1 for n in new])
        quarter = signed[tuple(slice(size - 1, None) for size in new)].flatten(0, -2)
        return torch.cat([quarter, classes])


PRESETS: dict[Preset, Dialect] = {
    "swin": Dialect(),
    "beit": Dialect(init_std=0.0, interpolation="geometric", class_rows=3),
    "maxvit": Dialect(sign=-1),
    "levit": Dialect(init_std=0.0, sign=0),
}
