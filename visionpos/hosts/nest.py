"""timm's NesT as host: attention in the blocks of a picture, which are merged from level to level.

Every level has a learned table. In a block, encodings see its own coordinates, as in Swin's windows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from timm.models._manipulate import checkpoint_seq
from timm.models.nest import Attention, Nest, NestLevel, TransformerLayer, blockify, deblockify
from torch import Tensor, nn

from ..encoding import LayerFacts, OneNode, PositionEncoding
from .attention import attend
from .grid_hosts import EncodedGridModel
from .grids import add_positions, encode_grid
from .host import register_host
from .stems import StemsHost


@dataclass(frozen=True)
class BlockLayout:
    """A view of a table (1, H W, C) that its owner has as blocks, (1, blocks, N, C)."""

    size: int  # of a block, N = size * size

    def read(self, parameter: Tensor) -> Tensor:
        """Return the table, one row for each patch of the level."""
        return deblockify(parameter, self.size).flatten(1, 2)

    def write(self, value: Tensor, encoding: PositionEncoding) -> Tensor:
        """Return the blocks."""
        return blockify(value.unflatten(1, encoding.feat_shape), self.size).contiguous()


class EncodedAttention(OneNode, Attention):
    """Self-attention in blocks with encodings, on tokens x (B, blocks, N, C)."""

    def forward(self, x: Tensor) -> Tensor:
        """Return tokens (B, blocks, N, C)."""
        if not len(self.encodings):
            return super().forward(x)
        tokens, size = x.flatten(0, 1), math.isqrt(x.shape[2])
        q, k, v = self.qkv(tokens).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        out = attend(encode_grid(self, tokens, (size, size), q, k, v), self.scale, self.attn_drop, self.fused_attn)
        out = out.permute(0, 2, 3, 1).flatten(2)  # (B * blocks, N, head_dim * heads), heads last
        return self.proj_drop(self.proj(out)).view(x.shape)


class EncodedLayer(TransformerLayer):
    """A layer on blocks x (B, blocks, N, C), after which conditional encodings may mix the whole level."""

    def forward(self, x: Tensor) -> Tensor:
        """Return the tokens (B, blocks, N, C)."""
        x = super().forward(x)
        if not len(self.mixers):
            return x
        size = math.isqrt(int(x.shape[2]))
        return blockify(add_positions(deblockify(x, size), self.mixers), size)


class EncodedLevel(NestLevel):
    """A level, to whose tokens input encodings are added."""

    def forward(self, x: Tensor) -> Tensor:
        """Return the map (B, C', H', W') of a map (B, C, H, W)."""
        x = add_positions(self.pool(x).permute(0, 2, 3, 1), self.input_encodings[0])  # (B, H', W', C')
        x = blockify(x, self.block_size)  # (B, blocks, N, C')
        x = checkpoint_seq(self.transformer_encoder, x) if self.grad_checkpointing else self.transformer_encoder(x)
        return deblockify(x, self.block_size).permute(0, 3, 1, 2)


class EncodedNest(EncodedGridModel, Nest):
    """A NesT whose positions are encodings of this package."""


class NestHost(StemsHost):
    """The family of NesT, of square pictures."""

    name = "Nest (NesT)"
    models: ClassVar = {Nest: EncodedNest}
    parts: ClassVar = {TransformerLayer: EncodedLayer, Attention: EncodedAttention}

    def stages(self, model: Nest) -> list[list[nn.Module]]:
        return [list(level.transformer_encoder) for level in model.levels]

    def grids(self, model: Nest) -> list[tuple[int, int]]:
        height, width = model.patch_embed.grid_size
        return [(height // 2**level, width // 2**level) for level in range(len(model.levels))]

    def seen_shape(self, block: nn.Module, grid: tuple[int, int]) -> tuple[int, int]:
        return block.block_shape

    def stems(self, model: Nest) -> list[LayerFacts]:
        levels = zip(self.stages(model), self.grids(model), strict=True)
        return [LayerFacts(dim=layers[0].attn.proj.out_features, feat_shape=grid) for layers, grid in levels]

    def tables(self, model: Nest) -> list[tuple[nn.Module, str, BlockLayout]]:
        return [(level, "pos_embed", BlockLayout(level.block_size)) for level in model.levels]

    def adopt_native_positions(self, model: Nest) -> None:
        super().adopt_native_positions(model)
        for level, encodings in zip(model.levels, self.input_lists(model), strict=True):
            level.__class__, level.input_encodings = EncodedLevel, (encodings,)
            for layer in level.transformer_encoder:
                layer.block_shape = (level.block_size, level.block_size)


HOST = register_host(NestHost())
