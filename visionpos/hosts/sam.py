"""timm's image encoder of SAM as host: attention in windows, in some blocks over the whole grid; no prefix tokens."""

from __future__ import annotations

import torch
from timm.layers import register_notrace_module
from timm.models.vision_transformer_sam import Attention as TimmAttention
from timm.models.vision_transformer_sam import Block, VisionTransformerSAM
from torch import Tensor, nn

from ..bias.decomposed import Decomposed
from ..encoding import PositionEncoding
from ..input.learned2d import Learned2D
from ..positions import Positions
from .attention import AttentionContext, prepare_encodings, self_attention
from .host import Facts, FixedCoordinates, Host, encoding_parameters, mixes_tokens, register_host
from .swin import AddPositions, EncodedGridBlock, house


@register_notrace_module
class EncodedSAMAttention(TimmAttention):
    """Self-attention of SAM with encodings; x (B, H, W, C) is the grid, or a window in coordinates of its own."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C), as timm's."""
        if not len(self.encodings):
            return super().forward(x)
        feat_shape, tokens = tuple(x.shape[1:3]), x.flatten(1, 2)
        prepared = prepare_encodings(self, AttentionContext(Positions.grid(feat_shape, device=x.device)))
        q, k, v = self.qkv(tokens).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        return self_attention(self, tokens, self.q_norm(q), self.k_norm(k), v, prepared).unflatten(1, feat_shape)


class EncodedSAMBlock(EncodedGridBlock, Block):
    """A block of a converted encoder."""


class EncodedPosDrop(AddPositions, nn.Dropout):
    """The dropout that follows timm's own table."""


class EncodedSAM(FixedCoordinates, VisionTransformerSAM):
    """A converted image encoder."""

    def no_weight_decay(self) -> set[str]:
        """timm's names, and every parameter of an encoding: timm forgets `rel_pos_h` and `rel_pos_w`."""
        return super().no_weight_decay() | encoding_parameters(self)


def is_sams_table(encoding: PositionEncoding) -> bool:
    """Whether the encoding is what timm itself does with the table `pos_embed` (1, H, W, C)."""
    return isinstance(encoding, Learned2D) and encoding.interpolation == "bicubic" and not encoding.keep_aspect


class SAMHost(Host):
    """SAM's image encoder (ViTDet). A table like its own lives in `pos_embed`, and timm adds it by itself."""

    name = "VisionTransformerSAM"

    def accepts(self, model: nn.Module) -> bool:
        return type(model) is VisionTransformerSAM or isinstance(model, EncodedSAM)

    def prepare(self, model: VisionTransformerSAM) -> None:
        if isinstance(model, EncodedSAM):
            return
        if model.rope_global is not None:
            raise ValueError("SAM with timm's own RoPE takes no encodings: build it with use_rope=False")
        model.__class__ = EncodedSAM
        model.pos_embed_own, model.pos_embed_input = nn.ModuleList(), nn.ModuleList()
        model.pos_drop.input_encodings = (model.pos_embed_input,)
        model.pos_drop.__class__ = EncodedPosDrop
        with torch.device("meta"):  # the encodings take timm's parameters over
            if model.pos_embed is not None:
                own = Learned2D(model.embed_dim, tuple(model.pos_embed.shape[1:3]), "bicubic")
                house(model.pos_embed_own, [own], model, Learned2D)
            for block in model.blocks:
                attn, shape = block.attn, self.feat_shape(model, block)
                bias = [Decomposed(attn.num_heads, attn.head_dim, shape)] if attn.use_rel_pos else []
                block.__class__, block.mixers = EncodedSAMBlock, nn.ModuleList()
                attn.__class__, attn.encodings, attn.use_rel_pos = EncodedSAMAttention, nn.ModuleList(), False
                house(attn.encodings, bias, attn, Decomposed)

    def feat_shape(self, model: VisionTransformerSAM, block: Block) -> tuple[int, int]:
        """The grid that the block's attention sees."""
        return (block.window_size,) * 2 if block.window_size else tuple(model.patch_embed.grid_size)

    def input_facts(self, model: VisionTransformerSAM) -> Facts:
        shape = tuple(model.patch_embed.grid_size)
        return {"dim": model.embed_dim, "feat_shape": shape, "grid_size": shape, "num_prefix_tokens": 0}

    def layer_facts(self, model: VisionTransformerSAM) -> list[Facts]:
        return [
            {
                "dim": model.embed_dim,
                "feat_shape": self.feat_shape(model, block),
                "num_prefix_tokens": 0,
                "num_heads": block.attn.num_heads,
                "head_dim": block.attn.head_dim,
                "layer": index,
                "depth": len(model.blocks),
            }
            for index, block in enumerate(model.blocks)
        ]

    def mixing_layers(self, model: VisionTransformerSAM) -> list[int]:
        return [0]

    def encodings(self, model: VisionTransformerSAM):
        layers = [[*block.attn.encodings, *block.mixers] for block in model.blocks]
        return [*model.pos_embed_own, *model.pos_embed_input], layers

    def install(self, model: VisionTransformerSAM, inputs, layers) -> None:
        own = [encoding for encoding in inputs if is_sams_table(encoding)][:1]
        house(model.pos_embed_own, own, model, Learned2D)
        house(model.pos_embed_input, [encoding for encoding in inputs if encoding not in own], model, ())
        for block, encodings in zip(model.blocks, layers, strict=True):
            block.mixers = nn.ModuleList(encoding for encoding in encodings if mixes_tokens(encoding))
            inside = [encoding for encoding in encodings if not mixes_tokens(encoding)]
            house(block.attn.encodings, inside, block.attn, Decomposed)


HOST = register_host(SAMHost())
