"""The dialects of the relative position bias table: which row a pair of tokens has, and tables of another window."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..resize import resize_relative_table
from ..windows import relative_offsets, same_grid

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

    def shape(self, window: tuple[int, int]) -> tuple[int, int]:
        """Return the (rows, columns) of offsets that the table has for a window (h, w)."""
        h, w = window
        return (2 * h - 1, 2 * w - 1) if self.sign else (h, w)

    def place(self, delta: Tensor, window: tuple[int, int]) -> Tensor:
        """Return where offsets (..., 2), query minus key, whole or real, lie in that shape: (row, column), (..., 2)."""
        if not self.sign:
            return delta.abs()
        axes = zip(delta.unbind(-1), window, strict=True)
        return torch.stack([self.sign * offset + (size - 1) for offset, size in axes], dim=-1)

    def index(self, window: tuple[int, int], device: torch.device | None = None) -> Tensor:
        """Return the table's row for each pair of patch tokens of a window: (N, N) int64, N = h w."""
        offsets = torch.stack(relative_offsets(window, device), dim=-1)  # (N, N, 2)
        row, column = self.place(offsets, window).unbind(-1)
        return row * self.shape(window)[1] + column

    def resize(self, table: Tensor, new: tuple[int, int], old: tuple[int, int], mode: Interpolation) -> Tensor:
        """Return the table of another window, (rows, heads); the table itself where the windows are equal.

        Rows of class tokens are copied. A table without signs is mirrored to one with signs, which is resized: by
        itself it would be resampled as if nothing lay on the other side of 0.
        """
        if same_grid(new, old):
            return table
        offsets, classes = table.split([len(table) - self.class_rows, self.class_rows])
        if self.sign:
            return torch.cat([resize_relative_table(offsets, new, old, mode), classes])
        (height, width), (h, w) = new, old
        rows, columns = ((torch.arange(2 * size - 1, device=table.device) - (size - 1)).abs() for size in (h, w))
        mirrored = offsets.unflatten(0, (h, w)).index_select(0, rows).index_select(1, columns).flatten(0, 1)
        signed = resize_relative_table(mirrored, new, old, mode)
        quarter = signed.unflatten(0, (2 * height - 1, 2 * width - 1))[height - 1 :, width - 1 :].flatten(0, 1)
        return torch.cat([quarter, classes])


PRESETS: dict[Preset, Dialect] = {
    "swin": Dialect(),
    "beit": Dialect(init_std=0.0, interpolation="geometric", class_rows=3),
    "maxvit": Dialect(sign=-1),
    "levit": Dialect(init_std=0.0, sign=0),
}
