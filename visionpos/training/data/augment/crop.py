"""Random crops out of a reflected border, mirror images, and normalisation.

Drawing and applying are separate: `draw_crop_flip` is the only place with randomness. `Crops` pads and mirrors a data
set once; after that a batch of crops is one gather of rows.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class CropFlip(NamedTuple):
    """Hold what was drawn for each picture of a batch.

    Attributes:
        top: (B,) int64, first row of the crop in the padded picture, 0 .. 2 * padding.
        left: (B,) int64, first column of the crop in the padded picture, 0 .. 2 * padding.
        flipped: (B,) bool, whether the crop is mirrored left to right.
    """

    top: Tensor
    left: Tensor
    flipped: Tensor


def draw_crop_flip(batch_size: int, generator: torch.Generator, padding: int = 4, flip: bool = True) -> CropFlip:
    """Draw uniform crop offsets and fair coin flips on the generator's device.

    The offsets of a batch do not depend on `flip`: the coins are drawn in any case.
    """
    device = generator.device
    top, left = torch.randint(2 * padding + 1, (2, batch_size), generator=generator, device=device)
    heads = torch.randint(2, (batch_size,), generator=generator, device=device) == 1
    return CropFlip(top, left, heads & flip)


class Crops:
    """Hold every crop of every picture and of its mirror image, ready to be gathered.

    The padded pictures lie in memory once, channels last, the mirrored ones behind the others. Any stretch of W * C
    numbers is then a row of some crop, and a crop is H of them, each a padded row further: one gather for a batch.

    Args:
        images: (N, C, H, W), any dtype.
        padding: pixels of reflected border on each side, less than H and W; the border pixel is not repeated.
        flip: whether mirror images can be asked for; they double the memory.

    Raises:
        ValueError: If the padding does not fit the pictures.
    """

    def __init__(self, images: Tensor, padding: int = 4, flip: bool = True):
        self.count, self.channels, self.height, self.width = images.shape
        if not 0 <= padding < min(self.height, self.width):
            size = f"{self.height}x{self.width}"
            raise ValueError(f"padding {padding} must be at least 0 and less than both sides of a {size} picture")
        self.padding = padding
        rows, columns = (_reflected(size, padding, images.device) for size in (self.height, self.width))
        plain = images.permute(0, 2, 3, 1)[:, rows[:, None], columns]  # (N, H + 2p, W + 2p, C)
        padded = torch.cat([plain, plain.flip(2)]) if flip else plain.contiguous()
        stretch = self.width * self.channels
        self.stretches = padded.as_strided((padded.numel() - stretch + 1, stretch), (1, 1))

    def __call__(self, rows: Tensor, drawn: CropFlip) -> Tensor:
        """Crop each picture at its own offset and mirror the crop where drawn.

        Args:
            rows: (B,) int64, which pictures.
            drawn: what to do with each of them; `flipped` only if the crops were built with `flip`.

        Returns:
            (B, C, H, W) in the dtype of the pictures, in channels-last memory.
        """
        top, left, flipped = (each.to(self.stretches.device, non_blocking=True) for each in drawn)
        row_step = (self.width + 2 * self.padding) * self.channels
        picture_step = (self.height + 2 * self.padding) * row_step
        left = torch.where(flipped, 2 * self.padding - left, left)  # the same crop, seen in the mirror
        first = (rows + flipped * self.count) * picture_step + top * row_step + left * self.channels
        each_row = first[:, None] + row_step * torch.arange(self.height, device=first.device)  # (B, H)
        crops = self.stretches.index_select(0, each_row.flatten())  # (B * H, W * C)
        return crops.view(-1, self.height, self.width, self.channels).permute(0, 3, 1, 2)


def normalize(
    images: Tensor, mean: Sequence[float] | Tensor, std: Sequence[float] | Tensor, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Return (pixel / 255 - mean) / std per channel, computed in float32 or better, rounded once to `dtype`.

    Args:
        images: (B, C, H, W) uint8.
        mean: C numbers in [0, 1], as from `Pictures.mean_std`; as a tensor on the pictures' device nothing is copied.
        std: C numbers in (0, 1], likewise.
        dtype: the result's.

    Returns:
        (B, C, H, W) of `dtype`, contiguous.

    Raises:
        ValueError: If the pictures are not uint8, or mean or std does not have one number per channel.
    """
    if images.dtype != torch.uint8:
        raise ValueError(f"normalize takes uint8 pictures, got {images.dtype}")
    if not len(mean) == len(std) == images.shape[1]:
        raise ValueError(f"{images.shape[1]} channels, but {len(mean)} means and {len(std)} standard deviations")
    exact = torch.promote_types(dtype, torch.float32)
    mean, std = (
        torch.as_tensor(values, dtype=exact).mul(255).view(-1, 1, 1).to(images.device, non_blocking=True)
        for values in (mean, std)
    )
    return images.to(exact, memory_format=torch.contiguous_format).sub_(mean).div_(std).to(dtype)


def _reflected(size: int, padding: int, device: torch.device) -> Tensor:
    """Return where each pixel of a padded line comes from: indices from -padding on, folded into the picture."""
    index = torch.arange(-padding, size + padding, device=device)
    return size - 1 - (size - 1 - index.abs()).abs()
