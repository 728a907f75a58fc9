"""Mixup (Zhang et al. 2018, arXiv 1710.09412) and CutMix (Yun et al. 2019, arXiv 1905.04899), one draw for a batch.

As `timm.data.Mixup` with mode 'batch', whose draws come from numpy's global generator; here they come from the one that
is given, and stay on its device.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from visionpos.training.data.augment.box import Box


class Mixing(NamedTuple):
    """Hold what was drawn for a batch.

    Attributes:
        lam: () float32, the share of a picture's own label.
        cutmix: () bool, whether a box is exchanged rather than all pixels blended.
        box: of (), empty for mixup.
    """

    lam: Tensor
    cutmix: Tensor
    box: Box


def draw_mixing(
    image_size: tuple[int, int],
    generator: torch.Generator,
    mixup_alpha: float = 0.0,
    cutmix_alpha: float = 0.0,
    mix_prob: float = 1.0,
    switch_prob: float = 0.5,
) -> Mixing:
    """Draw lam ~ Beta(alpha, alpha) and, for CutMix, a box of a share 1 - lam, clipped by the border.

    Args:
        image_size: (H, W).
        generator: the only source of randomness.
        mixup_alpha: of mixup; 0 for CutMix alone.
        cutmix_alpha: of CutMix; 0 for mixup alone.
        mix_prob: share of the batches that are mixed at all.
        switch_prob: share of CutMix if both are possible.
    """
    height, width = image_size
    happens, switch, down, across = torch.rand(4, generator=generator, device=generator.device)
    cutmix = switch < (switch_prob if mixup_alpha and cutmix_alpha else float(cutmix_alpha > 0))
    lam = torch.where(cutmix, _beta(cutmix_alpha or 1.0, generator), _beta(mixup_alpha or 1.0, generator))
    lam = torch.where(happens < mix_prob, lam, 1.0)
    side = torch.where(cutmix, (1 - lam).sqrt(), 0.0)
    box = Box(*_span(side, down, height), *_span(side, across, width))
    return Mixing(torch.where(cutmix, 1 - box.area / (height * width), lam), cutmix, box)


def mix(images: Tensor, drawn: Mixing) -> Tensor:
    """Mix picture i of (B, C, H, W) with picture B - 1 - i; its labels mix by `lam`."""
    own = torch.where(
        drawn.cutmix.to(images.device, non_blocking=True),
        ~drawn.box.mask(*images.shape[2:], images.device),
        drawn.lam.to(images.device, images.dtype, non_blocking=True),
    )
    return images.flip(0).lerp_(images, own)


def _beta(alpha: float, generator: torch.Generator) -> Tensor:
    """Return a draw from Beta(alpha, alpha); torch.distributions takes no generator, the kernel below it does."""
    return torch._sample_dirichlet(torch.full((2,), alpha, device=generator.device), generator=generator)[0]


def _span(side: Tensor, centre: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Return where a share of a side begins and ends, about a uniform pixel, clipped by the border."""
    length, centre = (side * size).long(), (centre * size).long()
    return (centre - length // 2).clamp(0, size), (centre + (length + 1) // 2).clamp(0, size)
