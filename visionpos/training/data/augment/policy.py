"""TrivialAugment (Müller and Hutter 2021, arXiv 2103.10158) and RandAugment (Cubuk et al. 2020, arXiv 1909.13719).

The operations and their strengths are those of torchvision's `TrivialAugmentWide` and `RandAugment` with their
defaults, on uint8 tensors: 31 magnitudes, nearest neighbour, black where a picture has moved away.

Each picture has an operation, a magnitude and a sign of its own, and yet every operation runs once, on a chunk of fixed
size: the pictures of a batch are dealt at random to slots, as many for each operation, a few of which stay empty if the
batch cannot be divided. So the operation of a picture is exactly uniform, and no shape depends on what was drawn.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
import torchvision.transforms.v2.functional as TF
from torch import Tensor

from visionpos.training.data.augmentation import NUM_MAGNITUDES, parse_policy

MOVES = ("ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate")
BLENDS = ("Brightness", "Color", "Contrast", "Sharpness")
OPERATIONS = (*MOVES, *BLENDS, "Posterize", "Solarize", "AutoContrast", "Equalize", "Identity")


class Operations(NamedTuple):
    """Hold what was drawn for each picture of a batch, for each of the n operations that it goes through.

    Attributes:
        slot: (n, B) int64, where the picture is dealt to; `slot // ceil(B / 14)` is its index in `OPERATIONS`.
        level: (n, B) int64, the magnitude 0 .. 30, plus 31 for the negative sign. Operations without a sign ignore it,
            and those without a magnitude ignore both.
    """

    slot: Tensor
    level: Tensor


@dataclass(frozen=True)
class Strength:
    """Say what the largest magnitude does.

    Attributes:
        shear: slope.
        shift: pixels down and across.
        rotate: degrees.
        blend: how far brightness, colour, contrast and sharpness go from 1.
        bits: how many of the 8 bits posterize takes away.
    """

    shear: float
    shift: tuple[float, float]
    rotate: float
    blend: float
    bits: int


class Policy:
    """Augment pictures of one size by TrivialAugment or RandAugment.

    Args:
        name: 'trivial' for TrivialAugment (wide), or 'rand(n, m)' for RandAugment: n operations, each at magnitude m of
            0 .. 30, as torchvision counts them (timm's m is three times as strong).
        shape: (C, H, W), C 1 or 3.
        device: of the pictures.

    Raises:
        ValueError: Another name or number of channels.
    """

    def __init__(self, name: str, shape: tuple[int, int, int], device: torch.device | str = "cpu"):
        self.num_ops, self.magnitude = parse_policy(name)
        channels, height, width = shape
        if channels not in (1, 3):
            raise ValueError(f"auto_augment: {name!r} takes pictures of 1 or 3 channels, got {channels}")
        strength = Strength(0.99, (32.0, 32.0), 135.0, 0.99, 6)
        if self.magnitude is not None:
            strength = Strength(0.3, (150 / 331 * height, 150 / 331 * width), 30.0, 0.9, 4)
        self.moves = _moves(strength, height, width).to(device, torch.float32)
        self.x, self.y = ((2 * torch.arange(size, device=device) + 1) / size - 1 for size in (width, height))
        self.each_move = torch.arange(len(MOVES), device=device)[:, None]
        factor = (1 + _signed(strength.blend)).repeat(len(BLENDS), 1)
        if channels == 1:
            factor[BLENDS.index("Color")] = 1
        factor = factor[..., None, None, None]
        self.keep, self.rest = (each.to(device, torch.float32) for each in (factor, 1 - factor))  # (4, 62, 1, 1, 1)
        self.each_blend = torch.arange(len(BLENDS), device=device)[:, None]
        lost_bits = (torch.arange(NUM_MAGNITUDES) / ((NUM_MAGNITUDES - 1) / strength.bits)).round().int()
        kept_bits, threshold = 256 - 2**lost_bits, torch.linspace(255, 0, NUM_MAGNITUDES)
        self.kept_bits = kept_bits.repeat(2).view(-1, 1, 1, 1).to(device, torch.uint8)  # (62, 1, 1, 1), masks
        self.threshold = threshold.repeat(2).view(-1, 1, 1, 1).to(device)  # (62, 1, 1, 1)

    def draw(self, batch_size: int, generator: torch.Generator) -> Operations:
        """Draw operations, magnitudes and signs on the generator's device."""
        shape, device = (self.num_ops, batch_size), generator.device
        slots = len(OPERATIONS) * math.ceil(batch_size / len(OPERATIONS))
        slot = torch.rand(self.num_ops, slots, generator=generator, device=device).argsort()[:, :batch_size]
        if self.magnitude is None:
            magnitude = torch.randint(NUM_MAGNITUDES, shape, generator=generator, device=device)
        else:
            magnitude = torch.full(shape, self.magnitude, device=device)
        return Operations(
            slot, magnitude + NUM_MAGNITUDES * torch.randint(2, shape, generator=generator, device=device)
        )

    def __call__(self, images: Tensor, drawn: Operations) -> Tensor:
        """Do to each picture what was drawn for it.

        Args:
            images: (B, C, H, W) uint8, C 1 or 3, of the size the policy was built for.
            drawn: for these B pictures.

        Returns:
            (B, C, H, W) uint8.
        """
        slots, levels = (each.to(images.device, non_blocking=True) for each in drawn)
        for slot, level in zip(slots, levels, strict=True):
            chunk = math.ceil(len(images) / len(OPERATIONS))
            dealt = torch.arange(len(images), device=images.device)
            picture = dealt.new_zeros(len(OPERATIONS) * chunk).scatter(0, slot, dealt)  # an empty slot takes the first
            pictures = images.index_select(0, picture).unflatten(0, (len(OPERATIONS), chunk))  # (14, chunk, C, H, W)
            images = self._operate(pictures, level[picture].view(-1, chunk)).index_select(0, slot)
        return images

    def _operate(self, pictures: Tensor, level: Tensor) -> Tensor:
        """Put chunk k of (14, chunk, C, H, W) through operation k at level[k], (chunk,); give (14 * chunk, C, H, W)."""
        posterize, solarize, autocontrast, equalize, same = pictures[9:]
        posterized = posterize & self.kept_bits[level[9]]
        solarized = torch.where(solarize >= self.threshold[level[10]], 255 - solarize, solarize)
        moved, blended = self._move(pictures[:5], level[:5]), self._blend(pictures[5:9], level[5:9])
        return torch.cat(
            [moved, blended, posterized, solarized, TF.autocontrast(autocontrast), TF.equalize(equalize), same]
        )

    def _move(self, pictures: Tensor, level: Tensor) -> Tensor:
        """Shear, shift and rotate (5, chunk, C, H, W) uint8 at levels (5, chunk); returns (5 * chunk, C, H, W)."""
        pictures, move = pictures.flatten(0, 1).float(), self.moves[self.each_move, level].flatten(0, 1)
        along_x = move[..., 0, None] * self.x + move[..., 2, None]  # (5 * chunk, 2, W)
        along_y = move[..., 1, None] * self.y  # (5 * chunk, 2, H)
        source = (along_x[..., None, :] + along_y[..., None]).permute(0, 2, 3, 1)  # no matmul: it might be in bf16
        return F.grid_sample(pictures, source, mode="nearest", align_corners=False).to(torch.uint8)

    def _blend(self, pictures: Tensor, level: Tensor) -> Tensor:
        """Blend with black, with itself in grey, with its mean grey, and with itself blurred."""
        gray = TF.rgb_to_grayscale(pictures[1:3]).float()  # (2, chunk, 1, H, W)
        mean_gray = gray[1].mean((1, 2, 3), keepdim=True).expand_as(gray[1])
        other = torch.stack([torch.zeros_like(mean_gray), gray[0], mean_gray])
        keep, rest = self.keep[self.each_blend, level], self.rest[self.each_blend, level]  # (4, chunk, 1, 1, 1)
        blended = pictures.float()
        blended[:3].mul_(keep[:3]).addcmul_(other, rest[:3])
        blended[3].addcmul_(_blur(pictures[3]) - pictures[3], rest[3])
        return blended.clamp_(0, 255).to(torch.uint8).flatten(0, 1)


def _signed(largest: float) -> Tensor:
    """Return (62,) float64: the magnitudes 0 .. largest, then the same with a minus, rounded as torchvision's."""
    steps = torch.linspace(0, largest, NUM_MAGNITUDES).double()
    return torch.cat([steps, -steps])


def _moves(strength: Strength, height: int, width: int) -> Tensor:
    """Return (5, 62, 2, 3) float64: from (x, y, 1) of an output pixel to (x, y) where its colour comes from.

    In pixels from the centre, then in `grid_sample`'s units, in which the picture is [-1, 1] in both directions. Shears
    keep the top left corner where it is.
    """
    shear, angle = _signed(strength.shear), _signed(strength.rotate).deg2rad()
    down, across = (_signed(largest).trunc() for largest in strength.shift)
    moves = torch.eye(2, 3, dtype=torch.float64).repeat(len(MOVES), len(shear), 1, 1)
    moves[0, :, 0, 1], moves[0, :, 0, 2] = shear, shear * height / 2
    moves[1, :, 1, 0], moves[1, :, 1, 2] = shear, shear * width / 2
    moves[2, :, 0, 2] = -across
    moves[3, :, 1, 2] = -down
    moves[4, :, 0, 0] = moves[4, :, 1, 1] = angle.cos()
    moves[4, :, 1, 0], moves[4, :, 0, 1] = angle.sin(), -angle.sin()
    return moves * torch.tensor([[1, height / width, 2 / width], [width / height, 1, 2 / height]], dtype=torch.float64)


def _blur(images: Tensor) -> Tensor:
    """Return the mean of a pixel, counted five times, and its eight neighbours, in whole numbers; the border stays."""
    images = images.float()
    if min(images.shape[-2:]) > 2:
        three = images[..., :-2, :] + images[..., 1:-1, :] + images[..., 2:, :]
        nine = three[..., :-2] + three[..., 1:-1] + three[..., 2:]
        inner = images[..., 1:-1, 1:-1]
        inner.copy_(nine.add_(inner, alpha=4).div_(13).round_())
    return images
