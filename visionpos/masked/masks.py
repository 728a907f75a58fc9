"""Masks of a masked autoencoder: every sample has its own, and all hide equally many patches."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

MAX_RECTANGLES = 24  # of a block mask; after that many the rest of a picture is taken at random


class Mask(NamedTuple):
    """The patches of a batch, split into visible and hidden ones.

    Attributes:
        keep: (B, K) int64, indices of the visible patches, in an order that tells no place.
        restore: (B, N) int64, where each patch of the grid is in [visible patches, hidden patches].
        hidden: (B, N) bool, True where a patch is hidden.
    """

    keep: Tensor
    restore: Tensor
    hidden: Tensor


def num_kept(num_patches: int, ratio: float) -> int:
    """Return how many patches stay visible: (1 - ratio) of them rounded down, as in MAE, and at least one."""
    return max(1, int(num_patches * (1 - ratio) + 1e-6))


def draw_mask(
    feat_shape: tuple[int, int],
    batch_size: int,
    ratio: float = 0.75,
    masking: str = "random",
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
) -> Mask:
    """Hide the same share of the patches of every picture.

    Args:
        feat_shape: (H, W), the grid of patches.
        batch_size: pictures, each with a draw of its own.
        ratio: share of the patches that are hidden, 0 to 0.95.
        masking: "random", every patch alike (MAE, He et al. 2021); "block", rectangles until the share is reached, as
            in BEiT (Bao et al. 2021), here each of 8 to 30 % of the picture with an aspect between 0.3 and 1 / 0.3;
            "grid", regular (of every 2 x 2 patches one stays at ratio 0.75, a diagonal at 0.5).
        generator: the source of randomness, on any device: the same seed gives the same masks everywhere. None takes
            torch's own of `device`.
        device: of the mask.

    Raises:
        ValueError: an empty grid, a ratio outside 0 to 0.95, or an unknown masking.

    Example:
        >>> mask = vp.draw_mask((4, 6), batch_size=2, ratio=0.75)
        >>> mask.keep.shape, mask.hidden.sum(dim=1).tolist()
        (torch.Size([2, 6]), [18, 18])
    """
    check_masking(ratio, masking)
    if len(feat_shape) != 2 or min(feat_shape) < 1:
        raise ValueError(f"feat_shape must be 2 positive integers, got {tuple(feat_shape)}")
    source = device if generator is None else generator.device
    scores = MASKINGS[masking](batch_size, tuple(feat_shape), generator, source)
    order = scores.argsort(dim=1).to(device)  # the lowest stay visible
    kept, restore = num_kept(order.shape[1], ratio), order.argsort(dim=1)
    return Mask(order[:, :kept], restore, restore >= kept)


def check_masking(ratio: float, masking: str = "random") -> None:
    """Raise ValueError for a ratio outside 0 to 0.95, or an unknown masking."""
    if not 0 <= ratio <= 0.95:
        raise ValueError(f"mask_ratio must lie between 0 and 0.95, got {ratio}")
    if masking not in MASKINGS:
        raise ValueError(f"masking must be one of {', '.join(MASKINGS)}, got {masking!r}")


def _random(batch_size: int, feat_shape: tuple[int, int], generator, device) -> Tensor:
    return torch.rand(batch_size, math.prod(feat_shape), generator=generator, device=device)


def _block(batch_size: int, feat_shape: tuple[int, int], generator, device) -> Tensor:
    def uniform(low: float, high: float) -> Tensor:
        draws = torch.rand(batch_size, MAX_RECTANGLES, 1, generator=generator, device=device)
        return low + (high - low) * draws

    area = uniform(0.08, 0.3) * math.prod(feat_shape)
    aspect = uniform(math.log(0.3), -math.log(0.3)).exp()
    covered = torch.ones(batch_size, MAX_RECTANGLES, 1, dtype=torch.bool, device=device)
    for size, side in zip(feat_shape, ((area * aspect).sqrt(), (area / aspect).sqrt()), strict=True):
        side = side.round().clamp(1, size)
        start = (uniform(0, 1) * (size - side + 1)).floor()
        cells = torch.arange(size, device=device)
        inside = (cells >= start) & (cells < start + side)  # (B, rectangles, size)
        covered = (covered.unsqueeze(-1) & inside.unsqueeze(-2)).flatten(2)
    first = torch.where(covered.any(1), covered.int().argmax(1), MAX_RECTANGLES)  # that covers a patch, (B, N)
    return MAX_RECTANGLES - first + _random(batch_size, feat_shape, generator, device)


def _grid(batch_size: int, feat_shape: tuple[int, int], generator, device) -> Tensor:
    phase = torch.randint(2, (2, batch_size, 1), generator=generator, device=device)
    y, x = ((torch.arange(size, device=device) + start) % 2 for size, start in zip(feat_shape, phase, strict=True))
    y, x = y[:, :, None], x[:, None, :]
    rank = 3 * y + 2 * x - 4 * y * x  # (B, H, W): 0, 2 in even rows, 3, 1 in odd ones
    return rank.flatten(1) + _random(batch_size, feat_shape, generator, device)


MASKINGS: dict[str, Callable[..., Tensor]] = {"random": _random, "block": _block, "grid": _grid}
