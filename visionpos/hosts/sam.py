"""timm's image encoder of SAM as host: attention in windows, in some blocks over the whole grid; no prefix tokens."""

from __future__ import annotations

from timm.layers import register_notrace_module
from timm.models.vision_transformer_sam import Attention as TimmAttention
from timm.models.vision_transformer_sam import Block, VisionTransformerSAM
from torch import Tensor, nn

from ..bias.decomposed import Decomposed
from ..encoding import LayerFacts, PositionEncoding
from ..input.learned2d import Learned2D
from ..positions import Positions
from .attention import AttentionContext, prepare_encodings, self_attention
from .grids import AddPositions
from .host import FixedCoordinates, Host, encoding_parameters, first, layer_lists, register_host
from .parameters import adopt_parameters, bind_parameters, replace_encodings
from .swin import EncodedGridBlock


@register_notrace_module
class EncodedSAMAttention(TimmAttention):
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


class EncodedSAM(FixedCoordinates, VisionTransformerSAM):
    """An image encoder of SAM whose positions are encodings of this package."""

    def no_weight_decay(self) -> set[str]:
        """Return timm's names and every parameter of an encoding: timm forgets `rel_pos_h` and `rel_pos_w`."""
        return super().no_weight_decay() | encoding_parameters(self)


def is_sams_table(encoding: PositionEncoding) -> bool:
    """Return whether the encoding is what timm itself does with the table `pos_embed` (1, H, W, C)."""
    if not isinstance(encoding, Learned2D) or encoding.keep_aspect:
        return False
    return encoding.interpolation == "bicubic" and encoding.antialias


class SAMHost(Host):
    """The family of SAM's image encoder (ViTDet). A table like its own is `pos_embed`, which timm adds by itself."""

    name = "VisionTransformerSAM"

    def accepts(self, model: nn.Module) -> bool:
        return type(model) is VisionTransformerSAM or isinstance(model, EncodedSAM)

    def convert(self, model: VisionTransformerSAM) -> None:
        if isinstance(model, EncodedSAM):
            return
        if model.rope_global is not None:
            raise ValueError("SAM with timm's own RoPE takes no encodings: build it with use_rope=False")
        model.__class__ = EncodedSAM
        model.pos_embed_own, model.pos_embed_input = nn.ModuleList(), nn.ModuleList()
        model.pos_drop.input_encodings = (model.pos_embed_input,)
        model.pos_drop.__class__ = EncodedPosDrop
        if model.pos_embed is not None:
            options = {"grid_size": tuple(model.pos_embed.shape[1:3]), "interpolation": "bicubic"}
            model.pos_embed_own.append(adopt_parameters(model, Learned2D, dim=model.embed_dim, **options))
        for block, facts in zip(model.blocks, self.layer_facts(model), strict=True):
            attn, options = block.attn, {"num_heads": facts.num_heads, "head_dim": facts.head_dim}
            block.__class__, block.mixers = EncodedSAMBlock, nn.ModuleList()
            attn.__class__, attn.encodings = EncodedSAMAttention, nn.ModuleList()
            if attn.use_rel_pos:
                attn.encodings.append(adopt_parameters(attn, Decomposed, feat_shape=facts.feat_shape, **options))
            attn.use_rel_pos = False

    def feat_shape(self, model: VisionTransformerSAM, block: Block) -> tuple[int, int]:
        """Return the grid that the block's attention sees: the window's, or the whole one."""
        return (block.window_size,) * 2 if block.window_size else tuple(model.patch_embed.grid_size)

    def input_facts(self, model: VisionTransformerSAM) -> LayerFacts:
        shape = tuple(model.patch_embed.grid_size)
        return LayerFacts(dim=model.embed_dim, feat_shape=shape, grid_size=shape)

    def layer_facts(self, model: VisionTransformerSAM) -> list[LayerFacts]:
        return [
            LayerFacts(
                dim=model.embed_dim,
                feat_shape=self.feat_shape(model, block),
                num_heads=block.attn.num_heads,
                head_dim=block.attn.head_dim,
                layer=index,
                depth=len(model.blocks),
            )
            for index, block in enumerate(model.blocks)
        ]

    def mixing_layers(self, model: VisionTransformerSAM) -> list[int]:
        return [0]

    def encodings(self, model: VisionTransformerSAM):
        layers = [[*block.attn.encodings, *block.mixers] for block in model.blocks]
        return [*model.pos_embed_own, *model.pos_embed_input], layers

    def install(self, model: VisionTransformerSAM, inputs, layers) -> None:
        own = [encoding for encoding in inputs if is_sams_table(encoding)][:1]
        others = [encoding for encoding in inputs if encoding not in own]
        lists = (place for block, new in zip(model.blocks, layers, strict=True) for place in layer_lists(block, new))
        replace_encodings((model.pos_embed_own, own), (model.pos_embed_input, others), *lists)
        for encoding in own:
            bind_parameters(encoding, model)
        for block in model.blocks:
            native = first(block.attn.encodings, Decomposed)
            if native is not None:
                bind_parameters(native, block.attn)


HOST = register_host(SAMHost())
