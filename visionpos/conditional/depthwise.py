"""Depthwise convolution of tokens on their grid, whatever tokens there are: what PEG and LePE share."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from ..encoding import full_precision
from ..options import Count
from ..places import ConditionalEncoding
from ..positions import Positions

Padding = Literal["zeros", "circular"]


def cell_index(positions: Positions, batch: int) -> Tensor:
    """Return the row-major cell of every token, (B, N, 1) int64: real coordinates go to the nearest cell."""
    index = torch.zeros((), dtype=torch.long, device=positions.coords.device)
    for axis, size in enumerate(positions.feat_shape):
        index = index * size + positions.coords[..., axis].round().long().clamp(0, size - 1)
    return index.expand(batch, -1).unsqueeze(-1)


class DepthwiseMixing(ConditionalEncoding):
    """Base class of mixings that add to token (y, x) the convolution of its neighbourhood, channel by channel.

    Tokens that are not there, because they were masked or dropped, count as zeros; tokens that share a cell are
    summed. Real coordinates are rounded to their cells.

    Args:
        dim: channels of a token.
        kernel_size: odd.
        padding: "zeros", which tells where the border is, or "circular", which knows no absolute place.

    Attributes:
        proj: depthwise Conv2d, weight (dim, 1, kernel_size, kernel_size) and bias (dim,).

    Raises:
        ValueError: an even kernel, or an unknown padding.
    """

    def __init__(self, dim: Count, kernel_size: Count = 3, padding: Padding = "zeros"):
        super().__init__(dim)
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be a positive odd number, got {kernel_size}")
        self.kernel_size, self.padding = kernel_size, padding
        self.proj = nn.Conv2d(dim, dim, kernel_size, groups=dim)

    def reset_parameters(self) -> None:
        """Draw weights and biases as torch does for a convolution."""
        self.proj.reset_parameters()

    def no_weight_decay(self) -> set[str]:
        """Return the name of the bias; the kernel is a convolution's like any other."""
        return {name for name in super().no_weight_decay() if name.endswith("bias")}

    def encode(self, x: Float[Tensor, "b n dim"], positions: Positions) -> Float[Tensor, "b n dim"]:
        height, width = positions.feat_shape
        with full_precision(positions):
            x = x.to(torch.promote_types(x.dtype, self.proj.weight.dtype))
            index = None if positions.is_grid else cell_index(positions, len(x)).expand_as(x)
            if index is not None:
                x = x.new_zeros(len(x), height * width, x.shape[2]).scatter_add(1, index, x)
            grid = self._convolve(x.transpose(1, 2).unflatten(2, (height, width))).flatten(2).transpose(1, 2)
            return grid if index is None else grid.gather(1, index)

    def _convolve(self, grid: Tensor) -> Tensor:
        """Return the convolution of a grid (B, C, H, W), of the same shape."""
        margin = self.kernel_size // 2
        if self.padding == "circular":  # by indices: F.pad wraps no more than once, which a grid of one row needs
            for axis in (2, 3):
                place = torch.arange(-margin, grid.shape[axis] + margin, device=grid.device) % grid.shape[axis]
                grid = grid.index_select(axis, place)
            margin = 0
        weight, bias = self.proj.weight.to(grid.dtype), self.proj.bias.to(grid.dtype)
        return F.conv2d(grid, weight, bias, padding=margin, groups=self.dim)
