"""What PVT v2 and Twins share: all tokens of a grid look at those of a smaller map, each in the middle of its cells."""

from __future__ import annotations

from dataclasses import replace

import torch.nn.functional as F
from torch import Tensor

from ..positions import Positions
from .attention import attend, encoded, encoded_pairs
from .grids import add_to_tokens


class PooledKeys:
    """Mixin for attention of all tokens x (B, H W, C) to a map that a convolution with stride, `sr`, made of them.

    Positions are pooled as tokens are: a key stands in the middle of the cells that it was made of.
    """

    def pool_tokens(self, x: Tensor) -> Tensor:
        """Return the tokens (B, M, C) that keys and values are made of, from a map x (B, C, H, W)."""
        return self.norm(self.sr(x).flatten(2).mT)

    def pool_coords(self, coords: Tensor) -> Tensor:
        """Return the coordinates (2, h, w) of these tokens, from those of the map, (2, H, W)."""
        return F.avg_pool2d(coords, self.sr.kernel_size)

    def forward(self, x: Tensor, feat_size: tuple[int, int]) -> Tensor:
        """Return tokens (B, H W, C)."""
        if not len(self.encodings):
            return super().forward(x, feat_size)
        positions = Positions.grid(tuple(feat_size), device=x.device).promote(x.dtype)
        y = x if self.sr is None else self.pool_tokens(x.mT.unflatten(2, tuple(feat_size)))  # (B, M, C)
        q = self.q(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # (B, heads, H W, head_dim)
        k, v = self.kv(y).unflatten(-1, (2, self.num_heads, -1)).permute(2, 0, 3, 1, 4)  # (B, heads, M, head_dim)
        if self.sr is None:
            tensors = encoded(x, q, k, v, [(encoding, encoding.prepare(positions)) for encoding in self.encodings])
        else:
            coords = self.pool_coords(positions.coords.mT.unflatten(1, tuple(feat_size))).flatten(1).mT  # (M, 2)
            keys = replace(positions, coords=coords, is_grid=False)
            tensors = encoded_pairs(x, q, k, v, self.encodings, positions, keys)
        out = attend(tensors, self.scale, self.attn_drop, self.fused_attn)  # (B, heads, H W, head_dim)
        return self.proj_drop(self.proj(out.transpose(1, 2).flatten(2)))


class MixGrid:
    """Mixin for a block on x (B, H W, C) on a grid (H, W), after which conditional encodings may mix the tokens."""

    def forward(self, x: Tensor, feat_size: tuple[int, int]) -> Tensor:
        """Return the tokens (B, H W, C)."""
        return add_to_tokens(super().forward(x, feat_size), self.mixers, tuple(feat_size))
