"""timm's Swin Transformer (v1) as host: encodings act inside the windows, input encodings on the whole grid."""

from __future__ import annotations

import torch
from timm.models.swin_transformer import SwinTransformer, SwinTransformerBlock
from torch import Tensor, nn

from ..attention import WindowAttention
from ..bias.relative_table import RelativeTable
from ..positions import Positions
from .host import Facts, Host, mixes_tokens, register_host
from .vit import encoding_parameters


def add_positions(x: Tensor, encodings: nn.ModuleList) -> Tensor:
    """x (B, H, W, C) after input or conditional encodings."""
    for encoding in encodings:
        positions = Positions.grid(tuple(x.shape[1:3]), device=x.device)
        x = encoding(x.flatten(1, 2), positions).view(x.shape)
    return x


class AddPositions:
    """Forward hook of patch_embed: adds the input encodings to its output. An object, so that copies have their own."""

    def __init__(self, encodings: nn.ModuleList):
        self.encodings = encodings

    def __call__(self, patch_embed: nn.Module, args: tuple, x: Tensor) -> Tensor:
        return add_positions(x, self.encodings)


class EncodedSwinBlock(SwinTransformerBlock):
    """A block after which conditional encodings may mix the tokens of the whole grid."""

    def forward(self, x: Tensor) -> Tensor:
        """x (B, H, W, C), as timm's."""
        return add_positions(super().forward(x), self.mixers)


class EncodedSwinTransformer(SwinTransformer):
    """A converted Swin Transformer."""

    def set_input_size(self, img_size=None, patch_size=None, window_size=None, **kwargs) -> None:
        """As timm's; learned tables are resized, formulas interpolate their coordinates."""
        super().set_input_size(img_size=img_size, patch_size=patch_size, window_size=window_size, **kwargs)
        for encoding in self.pos_embed_input:
            encoding.set_feat_shape(tuple(self.patch_embed.grid_size))

    def no_weight_decay(self) -> set[str]:
        """timm's names and every parameter of an encoding."""
        return super().no_weight_decay() | encoding_parameters(self)

    def group_matcher(self, coarse: bool = False) -> dict:
        """timm's, with input encodings in the stem."""
        return {**super().group_matcher(coarse), "stem": r"^patch_embed|^pos_embed"}


def swin_blocks(model: SwinTransformer) -> list[SwinTransformerBlock]:
    """All blocks in order."""
    return [block for stage in model.layers for block in stage.blocks]


class SwinHost(Host):
    """Swin v1."""

    name = "SwinTransformer (Swin v1)"

    def accepts(self, model: nn.Module) -> bool:
        return type(model) in (SwinTransformer, EncodedSwinTransformer)

    def prepare(self, model: SwinTransformer) -> None:
        if isinstance(model, EncodedSwinTransformer):
            return
        for block in swin_blocks(model):
            attn = block.attn
            with torch.device("meta"):
                table = RelativeTable(attn.num_heads, tuple(attn.window_size))
            table.live_in(attn)
            index = attn._buffers.pop("relative_position_index")
            table.relative_position_index = index
            attn.__class__ = WindowAttention
            attn.encodings = nn.ModuleList([table])
            block.__class__, block.mixers = EncodedSwinBlock, nn.ModuleList()
        model.__class__ = EncodedSwinTransformer
        model.pos_embed_input = nn.ModuleList()
        model.patch_embed.register_forward_hook(AddPositions(model.pos_embed_input))

    def input_facts(self, model: SwinTransformer) -> Facts:
        dim = model.patch_embed.proj.out_channels
        return {"dim": dim, "feat_shape": tuple(model.patch_embed.grid_size), "num_prefix_tokens": 0}

    def layer_facts(self, model: SwinTransformer) -> list[Facts]:
        blocks = swin_blocks(model)
        return [
            {
                "dim": block.dim,
                "feat_shape": tuple(block.attn.window_size),
                "num_prefix_tokens": 0,
                "num_heads": block.attn.num_heads,
                "head_dim": block.attn.qkv.out_features // (3 * block.attn.num_heads),
                "layer": index,
                "depth": len(blocks),
            }
            for index, block in enumerate(blocks)
        ]

    def mixing_layers(self, model: SwinTransformer) -> list[int]:
        depths = [len(stage.blocks) for stage in model.layers]
        return [sum(depths[:stage]) for stage in range(len(depths))]

    def encodings(self, model: SwinTransformer):
        layers = [[*block.attn.encodings, *block.mixers] for block in swin_blocks(model)]
        return list(model.pos_embed_input), layers

    def install(self, model: SwinTransformer, inputs, layers) -> None:
        del model.pos_embed_input[:]
        model.pos_embed_input.extend(inputs)  # the hook holds this list
        for block, encodings in zip(swin_blocks(model), layers, strict=True):
            attn = block.attn
            for encoding in attn.encodings:
                encoding.move_out()
            attn.relative_position_bias_table = None
            block.mixers = nn.ModuleList(encoding for encoding in encodings if mixes_tokens(encoding))
            attn.encodings = nn.ModuleList(encoding for encoding in encodings if not mixes_tokens(encoding))
            for encoding in attn.encodings:
                if isinstance(encoding, RelativeTable) and attn.relative_position_bias_table is None:
                    encoding.live_in(attn)  # where timm and its checkpoints have the table


HOST = register_host(SwinHost())
