"""timm's MaxxVit as host: MaxViT and CoAtNet, whose attention sees windows, grids that are dilated, or whole maps.

In a dilated grid, neighbours are neighbours of the same group, so one step is the distance between these.
"""

from __future__ import annotations

from typing import ClassVar

from timm.layers import register_notrace_module, to_2tuple
from timm.models.maxxvit import (
    Attention2d,
    AttentionCl,
    MaxxVit,
    ParallelPartitionAttention,
    PartitionAttention2d,
    PartitionAttentionCl,
    Stem,
    TransformerBlock2d,
)
from torch import Tensor, nn

from ..encoding import LayerFacts
from .attention import attend
from .grids import AddPositionsToMap, EncodedGridModel, GridHost, add_positions, add_to_map, encode_grid
from .host import register_host
from .rel_pos import adopt_rel_pos, bind_rel_pos


@register_notrace_module
class EncodedAttentionCl(AttentionCl):
    """Self-attention of MaxViT with encodings, on windows x (B * windows, h, w, C)."""

    def forward(self, x: Tensor, shared_rel_pos: Tensor | None = None) -> Tensor:
        """Return tokens (B * windows, h, w, C)."""
        if not len(self.encodings):
            return super().forward(x, shared_rel_pos)
        qkv = self.qkv(x).flatten(1, 2)  # (B * windows, h w, heads * 3 * head_dim)
        if self.head_first:
            q, k, v = qkv.unflatten(-1, (self.num_heads, -1)).transpose(1, 2).chunk(3, dim=3)
        else:
            q, k, v = qkv.unflatten(-1, (3, self.num_heads, -1)).transpose(1, 3).unbind(2)
        tensors = encode_grid(self, x.flatten(1, 2), tuple(x.shape[1:3]), q, k, v)
        out = attend(tensors, self.scale, self.attn_drop, self.fused_attn)  # (B * windows, heads, h w, head_dim)
        out = out.transpose(1, 2).reshape(*x.shape[:-1], -1)
        return self.proj_drop(self.proj(out))


@register_notrace_module
class EncodedAttention2d(Attention2d):
    """Self-attention of CoAtNet with encodings, on maps x (B, C, H, W)."""

    def forward(self, x: Tensor, shared_rel_pos: Tensor | None = None) -> Tensor:
        """Return maps (B, C, H, W)."""
        if not len(self.encodings):
            return super().forward(x, shared_rel_pos)
        qkv = self.qkv(x).flatten(2)  # (B, heads * 3 * head_dim, H W)
        if self.head_first:
            parts = qkv.unflatten(1, (self.num_heads, -1)).chunk(3, dim=2)
        else:
            parts = qkv.unflatten(1, (3, self.num_heads, -1)).unbind(1)
        q, k, v = (part.transpose(-1, -2).contiguous() for part in parts)
        tensors = encode_grid(self, x.flatten(2).mT, tuple(x.shape[2:]), q, k, v)
        out = attend(tensors, self.scale, self.attn_drop, self.fused_attn)  # (B, heads, H W, head_dim)
        out = out.transpose(-1, -2).reshape(x.shape[0], -1, *x.shape[2:])
        return self.proj_drop(self.proj(out))


class EncodedPartitionCl(PartitionAttentionCl):
    """Attention in the windows or the dilated grids of x (B, H, W, C), after which encodings may mix the whole map."""

    def forward(self, x: Tensor) -> Tensor:
        """Return the tokens (B, H, W, C)."""
        return add_positions(super().forward(x), self.mixers)


class EncodedPartition2d(PartitionAttention2d):
    """Attention in windows or dilated grids of maps x (B, C, H, W), after which encodings may mix the whole map."""

    def forward(self, x: Tensor) -> Tensor:
        """Return the tokens (B, C, H, W)."""
        return add_to_map(super().forward(x), self.mixers)


class EncodedTransformerBlock2d(TransformerBlock2d):
    """A block of CoAtNet, after which conditional encodings may mix the tokens of the map."""

    def forward(self, x: Tensor, shared_rel_pos: Tensor | None = None) -> Tensor:
        """Return the tokens (B, C, H, W)."""
        return add_to_map(super().forward(x, shared_rel_pos), self.mixers)


class EncodedStem(AddPositionsToMap, Stem):
    """The convolutions before the first stage, to whose map input encodings are added."""


class EncodedMaxxVit(EncodedGridModel, MaxxVit):
    """A MaxxVit whose positions are encodings of this package."""

    def set_input_size(self, *args, **kwargs) -> None:
        """Change the input size as timm does; learned tables are resized, formulas interpolate their coordinates."""
        super().set_input_size(*args, **kwargs)
        for encoding in self.pos_embed_input:
            encoding.set_feat_shape(HOST.input_facts(self).feat_shape)
        for block, facts in zip(HOST.blocks(self), HOST.layer_facts(self), strict=True):
            for encoding in block.attn.encodings:
                encoding.set_feat_shape(facts.feat_shape)


class MaxxVitHost(GridHost):
    """The family of MaxxVit; a block with two ways of attention has two layers, the windows' and the grids'."""

    name = "MaxxVit (MaxViT, CoAtNet)"
    models: ClassVar = {MaxxVit: EncodedMaxxVit}
    parts: ClassVar = {
        PartitionAttentionCl: EncodedPartitionCl,
        PartitionAttention2d: EncodedPartition2d,
        TransformerBlock2d: EncodedTransformerBlock2d,
        AttentionCl: EncodedAttentionCl,
        Attention2d: EncodedAttention2d,
    }

    def stages(self, model: MaxxVit) -> list[list[nn.Module]]:
        """Return the blocks with attention of each stage, in order."""
        kinds = (PartitionAttentionCl, PartitionAttention2d, TransformerBlock2d)
        return [[module for module in stage.modules() if isinstance(module, kinds)] for stage in model.stages]

    def convert_parts(self, model: MaxxVit) -> None:
        if any(isinstance(module, ParallelPartitionAttention) for module in model.modules()):
            raise ValueError("a MaxxVit with blocks that attend to windows and grids in parallel takes no encodings")
        for block in self.blocks(model):
            block.mixers, block.attn.encodings = nn.ModuleList(), nn.ModuleList()
            adopt_rel_pos(block.attn, "rel_pos", block.attn.encodings)
            block.__class__, block.attn.__class__ = self.parts[type(block)], self.parts[type(block.attn)]
        model.stem.input_encodings = (model.pos_embed_input,)
        model.stem.__class__ = EncodedStem

    def bind_native(self, model: MaxxVit) -> None:
        for block, facts in zip(self.blocks(model), self.layer_facts(model), strict=True):
            bind_rel_pos(block.attn, "rel_pos", block.attn.encodings, facts.feat_shape)

    def input_facts(self, model: MaxxVit) -> LayerFacts:
        shape = tuple(n // s for n, s in zip(model.img_size, to_2tuple(model.stem.stride), strict=True))
        return LayerFacts(dim=model.stem.out_chs, feat_shape=shape)

    def layer_facts(self, model: MaxxVit) -> list[LayerFacts]:
        shape, facts, depth = self.input_facts(model).feat_shape, [], len(self.blocks(model))
        for stage in self.stages(model):
            shape = tuple((n - 1) // 2 + 1 for n in shape)  # of the stage's maps
            for block in stage:
                inner, outer = block.attn.qkv.weight.shape[1], block.attn.proj.weight.shape[0]
                facts.append(
                    LayerFacts(
                        dim=outer,
                        dim_in=inner,
                        feat_shape=tuple(getattr(block, "partition_size", shape)),
                        num_heads=block.attn.num_heads,
                        head_dim=block.attn.dim_head,
                        layer=len(facts),
                        depth=depth,
                    )
                )
        return facts


HOST = register_host(MaxxVitHost())
