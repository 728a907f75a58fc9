"""Random erasing (Zhong et al. 2020, arXiv 1708.04896), as timm's `RandomErasing` in its mode 'pixel', with one box."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from visionpos.training.data.augment.box import Box

AREA_RANGE = (0.02, 1 / 3)  # share of the picture, uniform
ASPECT_RANGE = (0.3, 1 / 0.3)  # height over width, log-uniform
MAX_ATTEMPTS = 10  # until a box is smaller than the picture in both directions; after that it stays whole


class Erasing(NamedTuple):
    """Hold what was drawn for a batch: which k of its pictures lose a box, and what is put there.

    Attributes:
        picture: (k,) int64, indices into the batch, each at most once.
        box: of (k,), what to erase; empty for nothing.
        noise: (k, C, H, W) float32, standard normal: what to put there.
    """

    picture: Tensor
    box: Box
    noise: Tensor


def draw_erasing(shape: tuple[int, int, int, int], generator: torch.Generator, re_prob: float) -> Erasing:
    """Draw, with probability re_prob, a box of 2 to 33 % of a picture, anywhere in it.

    So that noise is made for few pictures and yet no shape depends on what is drawn, their number is re_prob * B in
    every batch; if that is not whole, the last of them keeps its picture with the probability that is left over.

    Args:
        shape: (B, C, H, W) of the pictures.
        generator: the only source of randomness.
        re_prob: share of the pictures with a box.
    """
    batch_size, *picture_shape = shape
    height, width = picture_shape[-2:]
    device, count = generator.device, math.ceil(re_prob * batch_size)
    picture = torch.rand(batch_size, generator=generator, device=device).argsort()[:count]
    down, across, coin = torch.rand(3, count, generator=generator, device=device)
    size = torch.rand(2, count, MAX_ATTEMPTS, generator=generator, device=device)
    area = (AREA_RANGE[0] + (AREA_RANGE[1] - AREA_RANGE[0]) * size[0]) * (height * width)
    aspect = torch.exp(math.log(ASPECT_RANGE[0]) + math.log(ASPECT_RANGE[1] / ASPECT_RANGE[0]) * size[1])
    tall, wide = (area * aspect).sqrt().round().long(), (area / aspect).sqrt().round().long()  # (k, attempts)
    fits = (tall < height) & (wide < width)
    first = fits.byte().argmax(1, keepdim=True)
    happens = torch.arange(count, device=device) + coin < re_prob * batch_size
    tall, wide = (each.gather(1, first).squeeze(1) * (fits.any(1) & happens) for each in (tall, wide))
    top, left = (down * (height - tall + 1)).long(), (across * (width - wide + 1)).long()
    noise = torch.randn(count, *picture_shape, generator=generator, device=device)
    return Erasing(picture, Box(top, top + tall, left, left + wide), noise)


def erase(images: Tensor, drawn: Erasing) -> Tensor:
    """Replace what lies in the boxes of normalised pictures (B, C, H, W) by noise."""
    picture = drawn.picture.to(images.device, non_blocking=True)
    inside = drawn.box.mask(*images.shape[2:], images.device)[:, None]
    noise = drawn.noise.to(images.device, images.dtype, non_blocking=True)
    return images.index_copy(0, picture, torch.where(inside, noise, images.index_select(0, picture)))
