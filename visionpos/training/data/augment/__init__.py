"""Augmentation of batches of uint8 pictures that live on the device, with a draw of its own for each picture.

Crop and mirror image, TrivialAugment or RandAugment, normalisation, random erasing, then mixup or CutMix: in the order
of timm's loader. All randomness comes from the generator that is given, in `draw`; `apply` is a plain function of what
was drawn. Nothing here waits for the device or depends in its shapes on what was drawn, so the same lines serve the CPU
and CUDA, and can be compiled or captured.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from timm.data.mixup import mixup_target
from torch import Tensor

from visionpos.training.data.augment.crop import CropFlip, Crops, draw_crop_flip, normalize
from visionpos.training.data.augment.erase import Erasing, draw_erasing, erase
from visionpos.training.data.augment.mix import Mixing, draw_mixing, mix
from visionpos.training.data.augment.policy import Operations, Policy
from visionpos.training.data.augmentation import Augmentation

__all__ = [
    "Augment",
    "Augmentation",
    "CropFlip",
    "Crops",
    "Drawn",
    "Policy",
    "draw_crop_flip",
    "normalize",
]


class Drawn(NamedTuple):
    """Hold all that was drawn for a batch; None stands for what is not in use."""

    crop: CropFlip
    operations: Operations | None
    erasing: Erasing | None
    mixing: Mixing | None


class Augment:
    """Make training batches out of resident pictures.

    A batch is a whole: its pictures share out the operations and are mixed with each other. Several processes that are
    to see what one would see make all of it, each with the same generator, and then take their rows.

    Args:
        images: (N, C, H, W) uint8; they are copied, padded and mirrored, where they live.
        labels: (N,) int64, on the same device.
        num_classes: K.
        mean: C numbers in [0, 1], subtracted.
        std: C numbers in (0, 1], divided by.
        options: what to do.

    Raises:
        ValueError: Padding that does not fit the pictures, or a policy for pictures of neither 1 nor 3 channels.
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        num_classes: int,
        mean: Sequence[float],
        std: Sequence[float],
        options: Augmentation,
    ):
        self.shape, device = tuple(images.shape[1:]), images.device
        self.labels, self.num_classes, self.options = labels, num_classes, options
        self.mean, self.std = (torch.tensor(values, device=device) for values in (mean, std))
        self.crops = Crops(images, options.crop_padding, options.flip)
        self.policy = None
        if options.auto_augment is not None:
            self.policy = Policy(options.auto_augment, self.shape, device)

    def __call__(self, rows: Tensor, generator: torch.Generator, mixing: bool = True) -> tuple[Tensor, Tensor]:
        """Return pictures (B, C, H, W) float32, normalised, and targets (B, K) float32 whose rows sum to 1.

        Args:
            rows: (B,) int64, which pictures.
            generator: the only source of randomness, best on the pictures' device.
            mixing: False leaves mixup and CutMix away, as some recipes do in the last epochs.
        """
        return self.apply(rows, self.draw(len(rows), generator, mixing))

    def draw(self, batch_size: int, generator: torch.Generator, mixing: bool = True) -> Drawn:
        """Draw all that is random in a batch, in a fixed order, on the generator's device."""
        options, shape = self.options, (batch_size, *self.shape)
        crop = draw_crop_flip(batch_size, generator, options.crop_padding, options.flip)
        operations = erasing = mixed = None
        if self.policy is not None:
            operations = self.policy.draw(batch_size, generator)
        if options.re_prob:
            erasing = draw_erasing(shape, generator, options.re_prob)
        if mixing and (options.mixup_alpha or options.cutmix_alpha):
            alphas = options.mixup_alpha, options.cutmix_alpha
            mixed = draw_mixing(shape[2:], generator, *alphas, options.mix_prob, options.switch_prob)
        return Drawn(crop, operations, erasing, mixed)

    def apply(self, rows: Tensor, drawn: Drawn) -> tuple[Tensor, Tensor]:
        """Return what `__call__` returns, for what was drawn for these rows."""
        pictures = self.crops(rows, drawn.crop)
        if drawn.operations is not None:
            pictures = self.policy(pictures, drawn.operations)
        images, lam = normalize(pictures, self.mean, self.std), 1.0
        if drawn.erasing is not None:
            images = erase(images, drawn.erasing)
        if drawn.mixing is not None:
            images, lam = mix(images, drawn.mixing), drawn.mixing.lam.to(images.device, non_blocking=True)
        return images, mixup_target(self.labels[rows], self.num_classes, lam, self.options.label_smoothing)
