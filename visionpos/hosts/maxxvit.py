"""timm's MaxxVit as host: MaxViT and CoAtNet, whose attention sees windows, grids that are dilated, or whole maps.

In a dilated grid, neighbours are neighbours of the same group, so one step is the distance between these.
"""

from __future__ import annotations

from typing import ClassVar

from timm.layers import to_2tuple
from timm.models import maxxvit as timms
from torch import Tensor, nn

from ..encoding import LayerFacts, OneNode
from .attention import attend
from .grid_hosts import ResizedGridModel, StagedHost, blocks_in
from .grids import AddPositionsToMap, MixMap, MixPositions, add_to_map, encode_grid
from .host import register_host
from .rel_pos import RelPosInBlocks


class EncodedAttention:
    """Self-attention with encodings, of the tokens of windows or maps that have their channels in axis `channels`."""

    channels = -1

    def forward(self, x: Tensor, shared_rel_pos: Tensor | None = None) -> Tensor:
        """Return what x is, (B * windows, h, w, C) or (B, C, H, W)."""
        if not len(self.encodings):
            return super().forward(x, shared_rel_pos)
        qkv, tokens = (each.movedim(self.channels, -1) for each in (self.qkv(x), x))
        grid, qkv = tuple(tokens.shape[1:3]), qkv.flatten(1, 2)  # (B, N, heads * 3 * head_dim)
        if self.head_first:
            parts = qkv.unflatten(-1, (self.num_heads, -1)).transpose(1, 2).chunk(3, dim=3)
        else:
            parts = qkv.unflatten(-1, (3, self.num_heads, -1)).transpose(1, 3).unbind(2)
        if self.channels == 1:
            parts = [part.contiguous() for part in parts]  # (B, heads, N, head_dim) each
        tensors = encode_grid(self, tokens.flatten(1, 2), grid, *parts)
        out = attend(tensors, self.scale, self.attn_drop, self.fused_attn).transpose(1, 2).flatten(2)  # (B, N, C)
        return self.proj_drop(self.proj(out.unflatten(1, grid).movedim(-1, self.channels).contiguous()))


class EncodedAttentionCl(OneNode, EncodedAttention, timms.AttentionCl):
    """Self-attention of MaxViT with encodings, on windows x (B * windows, h, w, C)."""


class EncodedAttention2d(OneNode, EncodedAttention, timms.Attention2d):
    """Self-attention of CoAtNet with encodings, on maps x (B, C, H, W)."""

    channels = 1


class EncodedPartitionCl(MixPositions, timms.PartitionAttentionCl):
    """Attention in the windows or the dilated grids of x (B, H, W, C), after which encodings may mix the whole map."""


class EncodedPartition2d(MixMap, timms.PartitionAttention2d):
    """Attention in windows or dilated grids of maps x (B, C, H, W), after which encodings may mix the whole map."""


class EncodedTransformerBlock2d(timms.TransformerBlock2d):
    """A block of CoAtNet, after which conditional encodings may mix the tokens of the map."""

    def forward(self, x: Tensor, shared_rel_pos: Tensor | None = None) -> Tensor:
        """Return the tokens (B, C, H, W)."""
        return add_to_map(super().forward(x, shared_rel_pos), self.mixers)


class EncodedStem(AddPositionsToMap, timms.Stem):
    """The convolutions before the first stage, to whose map input encodings are added."""


class EncodedMaxxVit(ResizedGridModel, timms.MaxxVit):
    """A MaxxVit whose positions are encodings of this package."""


class MaxxVitHost(RelPosInBlocks, StagedHost):
    """The family of MaxxVit; a block with two ways of attention has two layers, the windows' and the grids'."""

    name = "MaxxVit (MaxViT, CoAtNet)"
    since = "1.0.31"  # records the size of its pictures
    models: ClassVar = {timms.MaxxVit: EncodedMaxxVit}
    parts: ClassVar = {
        timms.PartitionAttentionCl: EncodedPartitionCl,
        timms.PartitionAttention2d: EncodedPartition2d,
        timms.TransformerBlock2d: EncodedTransformerBlock2d,
        timms.AttentionCl: EncodedAttentionCl,
        timms.Attention2d: EncodedAttention2d,
        timms.Stem: EncodedStem,
    }
    input_part = "stem"

    def stages(self, model: timms.MaxxVit) -> list[list[nn.Module]]:
        kinds = (timms.PartitionAttentionCl, timms.PartitionAttention2d, timms.TransformerBlock2d)
        return blocks_in(model.stages, *kinds)

    def convert(self, model: timms.MaxxVit) -> None:
        if any(isinstance(module, timms.ParallelPartitionAttention) for module in model.modules()):
            raise ValueError("a MaxxVit with blocks that attend to windows and grids in parallel takes no encodings")
        super().convert(model)

    def input_facts(self, model: timms.MaxxVit) -> LayerFacts:
        shape = tuple(n // s for n, s in zip(model.img_size, to_2tuple(model.stem.stride), strict=True))
        return LayerFacts(dim=model.stem.out_chs, feat_shape=shape)

    def grids(self, model: timms.MaxxVit) -> list[tuple[int, int]]:
        height, width = self.input_facts(model).feat_shape  # a stage halves it
        return [(-(-height // 2**stage), -(-width // 2**stage)) for stage, _ in enumerate(model.stages, start=1)]

    def seen_shape(self, block: nn.Module, grid: tuple[int, int]) -> tuple[int, int]:
        return tuple(getattr(block, "partition_size", grid))

    def facts_of(self, block: nn.Module) -> dict[str, int]:
        return {**super().facts_of(block), "dim_in": block.attn.qkv.weight.shape[1]}


HOST = register_host(MaxxVitHost())
