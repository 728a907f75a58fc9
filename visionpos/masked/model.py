"""Shared parts of masked image modelling: masks of whole patches, pixels to predict, images to look at."""

from __future__ import annotations

from abc import abstractmethod
from typing import NamedTuple

import torch
from einops import rearrange
from jaxtyping import Float
from timm.layers import PatchEmbed
from torch import Tensor, nn

from .masks import Mask, check_masking, draw_mask


class Reconstruction(NamedTuple):
    """The result of masked image modelling.

    Attributes:
        loss: the mean error of the hidden patches.
        prediction: (B, N, p * q * C), of every patch, in the order of the grid; of normalised pixels if the loss is.
        mask: which patches were hidden.
    """

    loss: Tensor
    prediction: Tensor
    mask: Mask


def patchify(images: Float[Tensor, "b c h w"], patch_size: tuple[int, int]) -> Float[Tensor, "b n d"]:
    """Return images (B, C, H, W) as patches (B, N, p * q * C), in row-major order, channels last within a patch."""
    p, q = patch_size
    return rearrange(images, "b c (h p) (w q) -> b (h w) (p q c)", p=p, q=q)


def unpatchify(
    patches: Float[Tensor, "b n d"], patch_size: tuple[int, int], feat_shape: tuple[int, int]
) -> Float[Tensor, "b c h w"]:
    """Return the images of patches on a grid of (H / p, W / q): the inverse of `patchify`."""
    (p, q), (h, w) = patch_size, feat_shape
    return rearrange(patches, "b (h w) (p q c) -> b c (h p) (w q)", p=p, q=q, h=h, w=w)


def normalize_patches(patches: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return each patch minus its mean, over its deviation; then these means and deviations.

    The deviation is sqrt(variance + 1e-6), the variance unbiased.
    """
    mean, deviation = patches.mean(-1, keepdim=True), (patches.var(-1, keepdim=True) + 1e-6).sqrt()
    return (patches - mean) / deviation, mean, deviation


def _at_least_float32(images: Tensor) -> Tensor:
    """Return x in float32 or better."""
    return images.to(torch.promote_types(images.dtype, torch.float32))


class MaskedImageModel(nn.Module):
    """Base class of models that hide patches of images and predict their pixels from the rest.

    Args:
        encoder: the model to pretrain.
        patch_size: pixels (down, across) of what is hidden and predicted as one.
        mask_ratio: share of the patches that are hidden, 0 to 0.95.
        norm_pix_loss: predict pixels normalised patch by patch.
        masking: "random", "block" or "grid", see `draw_mask`.

    Raises:
        ValueError: a ratio or masking out of range, or a stem whose tokens see more than their own patch.
    """

    def __init__(
        self, encoder: nn.Module, patch_size: tuple[int, int], mask_ratio: float, norm_pix_loss: bool, masking: str
    ):
        super().__init__()
        check_masking(mask_ratio, masking)
        if not isinstance(encoder.patch_embed, PatchEmbed):
            raise ValueError(
                f"pixels can be hidden only from an encoder that cuts pictures into patches, as timm's PatchEmbed "
                f"does, not {type(encoder.patch_embed).__name__}"
            )
        self.encoder, self.patch_size = encoder, tuple(patch_size)
        self.in_chans = encoder.patch_embed.proj.in_channels
        self.mask_ratio, self.norm_pix_loss, self.masking = mask_ratio, norm_pix_loss, masking

    @property
    def patch_dim(self) -> int:
        """Return p * q * C, the numbers to predict for a patch."""
        return self.patch_size[0] * self.patch_size[1] * self.in_chans

    def feat_shape(self, images: Float[Tensor, "b c h w"]) -> tuple[int, int]:
        """Return the grid of patches of these images.

        Raises:
            ValueError: pictures of another number of channels, that are not whole patches, or of another size than
                the encoder takes.
        """
        if images.ndim != 4 or images.shape[1] != self.in_chans:
            raise ValueError(f"pictures (B, {self.in_chans}, H, W) are needed, got {tuple(images.shape)}")
        size, stem = tuple(images.shape[2:]), self.encoder.patch_embed
        if stem.strict_img_size and size != tuple(stem.img_size):
            raise ValueError(
                f"pictures of {size} pixels, but the encoder takes {tuple(stem.img_size)}: call set_input_size, or "
                "build an encoder for any size (dynamic_img_size=True, for Swin strict_img_size=False)"
            )
        if any(side % patch for side, patch in zip(size, self.patch_size, strict=True)):
            raise ValueError(f"pictures of {size} pixels are not whole patches of {self.patch_size} pixels")
        return tuple(side // patch for side, patch in zip(size, self.patch_size, strict=True))

    def draw_mask(self, images: Float[Tensor, "b c h w"], generator: torch.Generator | None = None) -> Mask:
        """Return a mask for these images, on their device."""
        shape = self.feat_shape(images)
        return draw_mask(shape, len(images), self.mask_ratio, self.masking, generator, images.device)

    def forward(
        self, images: Float[Tensor, "b c h w"], mask: Mask | None = None, generator: torch.Generator | None = None
    ) -> Reconstruction:
        """Return the loss, the predictions and the mask of images.

        Args:
            images: (B, C, H, W), normalised as for the encoder; H and W as it was built for, or any whole patches if
                it takes pictures of any size.
            mask: from `draw_mask`; None draws one.
            generator: for the draw.

        Raises:
            ValueError: pictures that the encoder does not take, or a mask of other pictures.
        """
        mask = self.draw_mask(images, generator) if mask is None else mask
        height, width = self.feat_shape(images)
        if mask.hidden.shape != (len(images), height * width):
            raise ValueError(
                f"a mask of {tuple(mask.hidden.shape)} patches for {len(images)} pictures of {height} x {width} patches"
            )
        prediction = self.predict(images, mask)
        return Reconstruction(self.loss(images, prediction, mask.hidden), prediction, mask)

    @abstractmethod
    def predict(self, images: Tensor, mask: Mask) -> Tensor:
        """Return the pixels of every patch, (B, N, p * q * C), predicted from the visible ones alone."""

    @abstractmethod
    def error(self, difference: Tensor) -> Tensor:
        """Return what the loss averages, elementwise."""

    def loss(self, images: Tensor, prediction: Tensor, hidden: Tensor) -> Tensor:
        """Return the mean error of the hidden patches, in float32 or better; 0 where nothing is hidden."""
        target = patchify(_at_least_float32(images), self.patch_size)
        target = normalize_patches(target)[0] if self.norm_pix_loss else target
        error = self.error(prediction.to(target.dtype) - target).mean(-1)  # (B, N)
        return (error * hidden).sum() / hidden.sum().clamp(min=1)

    def reconstruct(self, images: Float[Tensor, "b c h w"], result: Reconstruction) -> Float[Tensor, "b c h w"]:
        """Return the images with their hidden patches as predicted.

        A normalised prediction says nothing of a patch's own mean and deviation, which are taken from the picture.
        """
        patches = patchify(_at_least_float32(images), self.patch_size)
        prediction = result.prediction.to(patches.dtype)
        if self.norm_pix_loss:
            _, mean, deviation = normalize_patches(patches)
            prediction = prediction * deviation + mean
        patches = torch.where(result.mask.hidden.unsqueeze(-1), prediction, patches)
        return unpatchify(patches, self.patch_size, self.feat_shape(images)).to(images.dtype)

    def visible(self, images: Float[Tensor, "b c h w"], mask: Mask) -> Float[Tensor, "b c h w"]:
        """Return the images with their hidden patches zero, the mean of normalised images."""
        patches = patchify(images, self.patch_size).masked_fill(mask.hidden.unsqueeze(-1), 0)
        return unpatchify(patches, self.patch_size, self.feat_shape(images))

    def no_weight_decay(self) -> set[str]:
        """Return the names that the encoder names."""
        return {f"encoder.{name}" for name in self.encoder.no_weight_decay()}
