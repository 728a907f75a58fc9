"""timm's image encoder of SAM as host: attention in windows, in some blocks over the whole grid; no prefix tokens."""

from __future__ import annotations

from typing import ClassVar

from timm.models.vision_transformer_sam import Attention as TimmAttention
from timm.models.vision_transformer_sam import Block, VisionTransformerSAM
from torch import Tensor, nn

from ..bias.decomposed import Decomposed
from ..encoding import LayerFacts, OneNode, PositionEncoding
from ..input.learned2d import Learned2D
from ..positions import Positions
from .attention import AttentionContext, prepare_encodings, self_attention
from .grid_hosts import EncodedGridModel, Place, StagedHost, own_place_first
from .grids import AddPositions
from .host import register_host
from .parameters import adopt_parameters, bind_first
from .shifted_windows import EncodedGridBlock


class EncodedSAMAttention(OneNode, TimmAttention):
    """Self-attention of SAM with encodings, on x (B, H, W, C): the grid, or a window in coordinates of its own."""

    def forward(self, x: Tensor) -> Tensor:
        """Return tokens (B, H, W, C)."""
        if not len(self.encodings):
            return super().forward(x)
        feat_shape, tokens = tuple(x.shape[1:3]), x.flatten(1, 2)
        positions = Positions.grid(feat_shape, device=x.device).promote(x.dtype)
        prepared = prepare_encodings(self, AttentionContext(positions))
        q, k, v = self.qkv(tokens).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        return self_attention(self, tokens, self.q_norm(q), self.k_norm(k), v, prepared).unflatten(1, feat_shape)


class EncodedSAMBlock(EncodedGridBlock, Block):
    """A block of a converted encoder."""


class EncodedPosDrop(AddPositions, nn.Dropout):
    """The dropout that follows timm's own table."""


class EncodedSAM(EncodedGridModel, VisionTransformerSAM):
    """An image encoder of SAM whose positions are encodings of this package."""


def is_sams_table(encoding: PositionEncoding) -> bool:
    """Return whether the encoding is what timm itself does with the table `pos_embed` (1, H, W, C)."""
    if not isinstance(encoding, Learned2D) or encoding.keep_aspect:
        return False
    return encoding.interpolation == "bicubic" and encoding.antialias


class SAMHost(StagedHost):
    """The family of SAM's image encoder (ViTDet). A table like its own is `pos_embed`, which timm adds by itself."""

    name = "VisionTransformerSAM"
    models: ClassVar = {VisionTransformerSAM: EncodedSAM}
    parts: ClassVar = {Block: EncodedSAMBlock, TimmAttention: EncodedSAMAttention, nn.Dropout: EncodedPosDrop}
    input_part = "pos_drop"

    def stages(self, model: VisionTransformerSAM) -> list[list[nn.Module]]:
        return [list(model.blocks)]

    def grids(self, model: VisionTransformerSAM) -> list[tuple[int, int]]:
        return [tuple(model.patch_embed.grid_size)]

    def seen_shape(self, block: Block, grid: tuple[int, int]) -> tuple[int, int]:
        return (block.window_size,) * 2 if block.window_size else grid

    def convert(self, model: VisionTransformerSAM) -> None:
        if model.rope_global is not None:
            raise ValueError("SAM with timm's own RoPE takes no encodings: build it with use_rope=False")
        super().convert(model)

    def adopt_native_positions(self, model: VisionTransformerSAM) -> None:
        model.pos_embed_own = nn.ModuleList()
        if model.pos_embed is not None:
            options = {"grid_size": tuple(model.pos_embed.shape[1:3]), "interpolation": "bicubic"}
            model.pos_embed_own.append(adopt_parameters(model, Learned2D, dim=model.embed_dim, **options))
        for block, facts in zip(model.blocks, self.layer_facts(model), strict=True):
            if block.attn.use_rel_pos:
                options = {"num_heads": facts.num_heads, "head_dim": facts.head_dim, "feat_shape": facts.feat_shape}
                block.attn.encodings.append(adopt_parameters(block.attn, Decomposed, **options))
            block.attn.use_rel_pos = False

    def input_places(self, model: VisionTransformerSAM, inputs: list[PositionEncoding]) -> list[Place]:
        return own_place_first(model, inputs, is_sams_table)

    def bind_native(self, model: VisionTransformerSAM) -> None:
        bind_first(model.pos_embed_own, Learned2D, model)
        for block in model.blocks:
            bind_first(block.attn.encodings, Decomposed, block.attn)

    def input_facts(self, model: VisionTransformerSAM) -> LayerFacts:
        shape = tuple(model.patch_embed.grid_size)
        return LayerFacts(dim=model.embed_dim, feat_shape=shape, grid_size=shape)


HOST = register_host(SAMHost())
