"""Augmentations of a whole batch of uint8 pictures, with a draw of its own for each picture.

Drawing and applying are separate: `draw_crop_flip` is the only place with randomness, `crop_flip` is a plain function
of what was drawn. Nothing here waits for the device, so the same lines serve the CPU and CUDA.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch


class CropFlip(NamedTuple):
    """What was drawn for each picture of a batch.

    Attributes:
        top: (B,) int64, first row of the crop in the padded picture, 0 .. 2 * padding.
        left: (B,) int64, first column of the crop in the padded picture, 0 .. 2 * padding.
        flipped: (B,) bool, whether the crop is mirrored left to right.
    """

    top: torch.Tensor
    left: torch.Tensor
    flipped: torch.Tensor


def draw_crop_flip(batch_size: int, generator: torch.Generator, padding: int = 4, flip: bool = True) -> CropFlip:
    """Draws uniform crop offsets and fair coin flips on the generator's device.

    The offsets of a batch do not depend on `flip`: the coins are drawn in any case.
    """
    device = generator.device
    top, left = torch.randint(2 * padding + 1, (2, batch_size), generator=generator, device=device)
    heads = torch.randint(2, (batch_size,), generator=generator, device=device) == 1
    return CropFlip(top, left, heads & flip)


def crop_flip(images: torch.Tensor, drawn: CropFlip, padding: int = 4) -> torch.Tensor:
    """Pads each picture by reflection, crops it at its own offset to its old size and mirrors it where drawn.

    The padded picture is never built: each output pixel looks up where it comes from, in one gather.

    Args:
        images: (B, C, H, W), any dtype.
        drawn: what to do with each of the B pictures.
        padding: pixels of reflected border on each side, less than H and W.

    Returns:
        (B, C, H, W), same dtype and device.

    Raises:
        ValueError: If the padding does not fit the pictures.
    """
    batch_size, channels, height, width = images.shape
    if not 0 <= padding < min(height, width):
        raise ValueError(f"padding {padding} must be at least 0 and less than both sides of a {height}x{width} picture")
    top, left, flipped = (each.to(images.device, non_blocking=True)[:, None] for each in drawn)
    across = torch.arange(width, device=images.device)
    rows = torch.arange(height, device=images.device) + top - padding  # (B, H)
    columns = torch.where(flipped, width - 1 - across, across) + left - padding  # (B, W)
    source = _reflect(rows, height)[:, :, None] * width + _reflect(columns, width)[:, None, :]
    source = source.view(batch_size, 1, height * width).expand(-1, channels, -1)  # (B, C, H * W)
    return images.reshape(batch_size, channels, height * width).gather(2, source).view_as(images)


def pad_crop_flip(
    images: torch.Tensor, generator: torch.Generator, padding: int = 4, flip: bool = True
) -> torch.Tensor:
    """Random crop out of a reflected border, and a random mirror image, drawn per picture.

    Args:
        images: (B, C, H, W) uint8.
        generator: the only source of randomness. On another device than the pictures it works too, at the price of a
            small copy.
        padding: pixels of reflected border on each side, less than H and W.
        flip: whether half of the pictures are mirrored.

    Returns:
        (B, C, H, W) uint8.

    Raises:
        ValueError: If the padding does not fit the pictures.
    """
    return crop_flip(images, draw_crop_flip(len(images), generator, padding, flip), padding)


def normalize(
    images: torch.Tensor, mean: Sequence[float], std: Sequence[float], dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """(pixel / 255 - mean) / std per channel, in float32 or better, rounded once to `dtype`.

    Args:
        images: (B, C, H, W) uint8.
        mean: C numbers in [0, 1], as from `Pictures.mean_std`.
        std: C numbers in (0, 1].
        dtype: the result's.

    Returns:
        (B, C, H, W) of `dtype`.

    Raises:
        ValueError: If the pictures are not uint8, or mean or std does not have one number per channel.
    """
    if images.dtype != torch.uint8:
        raise ValueError(f"normalize takes uint8 pictures, got {images.dtype}")
    if not len(mean) == len(std) == images.shape[1]:
        raise ValueError(f"{images.shape[1]} channels, but {len(mean)} means and {len(std)} standard deviations")
    exact = torch.promote_types(dtype, torch.float32)
    mean, std = (
        torch.tensor(values, dtype=exact).mul_(255).view(-1, 1, 1).to(images.device, non_blocking=True)
        for values in (mean, std)
    )
    return images.to(exact).sub_(mean).div_(std).to(dtype)


def _reflect(index: torch.Tensor, size: int) -> torch.Tensor:
    """Folds indices in -size < index < 2 * size - 1 back into the picture, the border pixel not repeated."""
    return size - 1 - (size - 1 - index.abs()).abs()
