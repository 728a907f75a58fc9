"""Blocks on a grid whose attention sees windows, shifted or not: those of the Swin Transformers, and SAM's."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..materialize import is_plain_eager
from ..windows import TakeTokens, shift_mask, window_order, window_partition, window_reverse
from .grids import MixPositions


def hide_fully(mask: Tensor | None) -> Tensor | None:
    """Return timm's shift mask with -inf in place of -100.

    The probability of a hidden key, e^-100, is a denormal number, which a CPU computes with many times slower. It is
    lost in the sum over the keys: outputs have the same bits, unless a hidden logit is some 80 above all seen ones.
    """
    return None if mask is None else mask.masked_fill(mask != 0, float("-inf"))


class EncodedGridBlock(MixPositions):
    """Mixin for a block on (B, H, W, C) tokens, after which conditional encodings may mix those of the whole grid."""

    def has_its_own(self) -> bool:
        """Return whether attention has the encoding of timm's model, and no other: it then keeps timm's bits."""
        return [encoding.owner for encoding in self.attn.encodings] == [self.attn]

    def get_attn_mask(self, x: Tensor | None = None, device=None, dtype=None, feat_shape=None) -> Tensor | None:
        """Return the shift mask, (windows, N, N), of 0 and -inf: timm's, or that of any other encoding.

        They differ where the window does not divide the grid: timm's lets tokens of opposite borders see each other.

        Args:
            x: tokens of any picture, rolled and padded; by default the mask is for `input_resolution`.
            device: of the mask, without x.
            dtype: likewise.
            feat_shape: (H, W) of the grid that became x.
        """
        mask = super().get_attn_mask(x, device=device, dtype=dtype)
        if mask is None or self.has_its_own():
            return hide_fully(mask)
        feat_shape = self.input_resolution if feat_shape is None else feat_shape
        return shift_mask(feat_shape, self.window_size, self.shift_size, mask.device).to(mask.dtype)

    def renew_mask(self) -> None:
        """Compute the shift mask for `input_resolution` again: it depends on the encodings."""
        weight = self.attn.qkv.weight
        self.attn_mask = None if self.dynamic_mask else self.get_attn_mask(device=weight.device, dtype=weight.dtype)

    def sees_across_border(self) -> bool:
        """Return whether tokens of opposite borders of the picture see each other, as in timm's model."""
        mask = self.get_attn_mask(device=torch.device("cpu"))
        if mask is None:
            return False
        apart = shift_mask(self.input_resolution, self.window_size, self.shift_size, mask.device) != 0
        return bool((apart & (mask == 0)).any())

    def _attn(self, x: Tensor) -> Tensor:
        """Return the attention of x (B, H, W, C) as timm does; the ways into the windows and back are a gather each.

        timm's rolls, padding and copies stay where a graph is traced, and for pictures of any size.
        """
        if not isinstance(x, Tensor):  # symbolic tracing
            return super()._attn(x)
        shape, (wh, ww) = tuple(x.shape[1:3]), self.window_size
        if self.dynamic_mask or not is_plain_eager():
            padding = (0, 0, 0, -shape[1] % ww, 0, -shape[0] % wh)
            rolled = F.pad(x.roll([-s for s in self.shift_size], (1, 2)), padding)
            mask = self.get_attn_mask(rolled, feat_shape=shape) if self.dynamic_mask else self.attn_mask
            windows = self.attn(window_partition(rolled, self.window_size), mask=mask)
            rolled = window_reverse(windows, self.window_size, tuple(rolled.shape[1:3]))
            return rolled[:, : shape[0], : shape[1]].roll(self.shift_size, (1, 2))
        way = window_order(shape, self.window_size, self.shift_size, x.device)
        windows = TakeTokens.apply(x.flatten(1, 2), *way)
        windows = self.attn(windows.view(-1, self.window_area, x.shape[-1]), mask=self.attn_mask)
        return TakeTokens.apply(windows.view(x.shape[0], -1, x.shape[-1]), *reversed(way)).view(x.shape)
