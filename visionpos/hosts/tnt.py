"""timm's TNT as host: encodings act on patches; the pixels of a patch, alike in all, have a stem of their own.

The transformer of pixels stays timm's otherwise: where a pixel is, the projection that joins them to a patch knows.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

import torch
from timm.models._manipulate import checkpoint
from timm.models.tnt import TNT, Attention, Block, PixelEmbed
from torch import Tensor, nn

from ..encoding import LayerFacts, OneNode
from .attention import AttentionContext, attend
from .grid_hosts import EncodedGridModel
from .grids import add_to_tokens, encode_grid
from .host import register_host
from .isotropic import IsotropicForward, mix
from .stems import MapLayout, StemsHost, add_to_grid, context_of_grid


class EncodedAttention(OneNode, Attention):
    """Self-attention of patches with encodings, on tokens x (B, 1 + N, C)."""

    def forward(self, x: Tensor) -> Tensor:
        """Return tokens (B, 1 + N, C)."""
        if not len(self.encodings):
            return super().forward(x)
        q, k = self.qk(x).unflatten(-1, (2, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        v = self.v(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # (B, heads, 1 + N, head_dim)
        tensors = encode_grid(self, x, self.grid_size, q, k, v, num_prefix_tokens=1)
        out = attend(tensors, self.scale, self.attn_drop, fused=False)  # as in timm's
        return self.proj_drop(self.proj(out.transpose(1, 2).flatten(2)))


class EncodedBlock(Block):
    """A block after which conditional encodings may mix the patches."""

    @property
    def attn(self) -> nn.Module:
        """Return the attention of patches, under the name that it has in other blocks."""
        return self.attn_out

    def forward(self, pixel_embed: Tensor, patch_embed: Tensor) -> tuple[Tensor, Tensor]:
        """Return the pixels (B * N, n, C) and the patches (B, 1 + N, C)."""
        pixels, patches = super().forward(pixel_embed, patch_embed)
        if len(self.mixers):
            patches = mix(patches, self.mixers, context_of_grid(patches, self.attn.grid_size))
        return pixels, patches


class EncodedPixelEmbed(PixelEmbed):
    """The pixels of each patch, to which input encodings are added."""

    def forward(self, x: Tensor, pixel_pos: Tensor | None = None) -> Tensor:
        """Return the pixels (B * N, n, C) of pictures; timm's table is among the encodings."""
        return add_to_tokens(super().forward(x, 0.0), self.input_encodings[0], tuple(self.new_patch_size))


class EncodedTNT(EncodedGridModel, TNT):
    """A TNT whose positions are encodings of this package."""

    forward_norm, forward_blocks = IsotropicForward.forward_norm, IsotropicForward.forward_blocks  # on pairs of tokens
    forward_features, forward_intermediates = IsotropicForward.forward_features, IsotropicForward.forward_intermediates

    def forward_stem(self, x: Tensor) -> tuple[tuple[Tensor, Tensor], AttentionContext]:
        """Return the pixels (B * N, n, C) and the tokens (B, 1 + N, C) of pictures, and where the latter are."""
        pixels, grid = self.pixel_embed(x), self.pixel_embed.grid_size
        patches = self.norm2_proj(self.proj(self.norm1_proj(pixels.reshape(x.shape[0], self.num_patches, -1))))
        patches = torch.cat((self.cls_token.expand(x.shape[0], -1, -1), patches), dim=1)
        patches = self.pos_drop(add_to_grid(patches, self.pos_embed_input, grid, self.patch_pos))
        return (pixels, patches), context_of_grid(patches, grid)

    def through_blocks(
        self, x: tuple[Tensor, Tensor], context: AttentionContext, blocks: nn.ModuleList
    ) -> Iterator[tuple[Tensor, AttentionContext]]:
        """Yield the tokens (B, 1 + N, C) after each of the first blocks, and where they are."""
        for block in blocks:
            x = checkpoint(block, *x) if self.grad_checkpointing else block(*x)
            yield x[1], context


class TNTHost(StemsHost):
    """The family of TNT; its layers are the attention of patches in each block."""

    name = "TNT"
    models: ClassVar = {TNT: EncodedTNT}
    parts: ClassVar = {Block: EncodedBlock, Attention: EncodedAttention}

    def stages(self, model: TNT) -> list[list[nn.Module]]:
        return [list(model.blocks)]

    def grids(self, model: TNT) -> list[tuple[int, int]]:
        return [tuple(model.pixel_embed.grid_size)]

    def stems(self, model: TNT) -> list[LayerFacts]:
        pixels = LayerFacts(dim=model.pixel_embed.in_dim, feat_shape=tuple(model.pixel_embed.new_patch_size))
        return [LayerFacts(dim=model.embed_dim, feat_shape=self.grids(model)[0], num_prefix_tokens=1), pixels]

    def tables(self, model: TNT) -> list[tuple[nn.Module, str, MapLayout | None]]:
        return [(model, "patch_pos", None), (model, "pixel_pos", MapLayout())]

    def adopt_native_positions(self, model: TNT) -> None:
        super().adopt_native_positions(model)
        model.pixel_embed.__class__ = EncodedPixelEmbed
        model.pixel_embed.input_encodings = (model.pos_embed_input_1,)
        for block in model.blocks:
            block.attn_out.grid_size = self.grids(model)[0]

    def facts_of(self, block: nn.Module) -> dict[str, int]:
        return {**super().facts_of(block), "num_prefix_tokens": 1}


HOST = register_host(TNTHost())
