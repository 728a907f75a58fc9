"""Rectangles with corners that were drawn: what random erasing and CutMix cut out."""

from typing import NamedTuple

import torch
from torch import Tensor


class Box(NamedTuple):
    """Hold rectangles: rows top .. bottom - 1 and columns left .. right - 1, each an int64 tensor of one shape."""

    top: Tensor
    bottom: Tensor
    left: Tensor
    right: Tensor

    @property
    def area(self) -> Tensor:
        """Return how many pixels are inside, in the shape of the corners."""
        return (self.bottom - self.top) * (self.right - self.left)

    def mask(self, height: int, width: int, device: torch.device) -> Tensor:
        """Return (*shape, H, W) bool, True inside."""
        top, bottom, left, right = (each.to(device, non_blocking=True)[..., None] for each in self)
        rows, columns = torch.arange(height, device=device), torch.arange(width, device=device)
        inside_rows, inside_columns = (rows >= top) & (rows < bottom), (columns >= left) & (columns < right)
        return inside_rows[..., :, None] & inside_columns[..., None, :]
