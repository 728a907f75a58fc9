"""timm's Swin Transformer (v1) as host: encodings act inside the windows, input encodings on the whole grid."""

from __future__ import annotations

import torch
from timm.models.swin_transformer import SwinTransformer
from timm.models.swin_transformer import WindowAttention as TimmWindowAttention
from torch import Tensor, nn

from ..attention import WindowAttention
from ..bias.relative_table import RelativeTable
from ..positions import Positions
from .host import Facts, Host, register_host
from .vit import encoding_parameters


class AddPositions:
    """Forward hook of patch_embed: adds the input encodings to its (B, H, W, C) output. An object, so it is copied."""

    def __init__(self, encodings: nn.ModuleList):
        self.encodings = encodings

    def __call__(self, patch_embed: nn.Module, args: tuple, x: Tensor) -> Tensor:
        positions = Positions.grid(tuple(x.shape[1:3]), device=x.device)
        for encoding in self.encodings:
            x = encoding(x.flatten(1, 2), positions).view(x.shape)
        return x


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


def attention_layers(model: SwinTransformer) -> list[TimmWindowAttention]:
    """All window attentions in order."""
    return [block.attn for stage in model.layers for block in stage.blocks]


class SwinHost(Host):
    """Swin v1."""

    name = "SwinTransformer (Swin v1)"

    def accepts(self, model: nn.Module) -> bool:
        return type(model) in (SwinTransformer, EncodedSwinTransformer)

    def prepare(self, model: SwinTransformer) -> None:
        if isinstance(model, EncodedSwinTransformer):
            return
        for attn in attention_layers(model):
            with torch.device("meta"):
                table = RelativeTable(attn.num_heads, tuple(attn.window_size))
            table.live_in(attn)
            index = attn._buffers.pop("relative_position_index")
            table.relative_position_index = index
            attn.__class__ = WindowAttention
            attn.encodings = nn.ModuleList([table])
        model.__class__ = EncodedSwinTransformer
        model.pos_embed_input = nn.ModuleList()
        model.patch_embed.register_forward_hook(AddPositions(model.pos_embed_input))

    def input_facts(self, model: SwinTransformer) -> Facts:
        dim = model.patch_embed.proj.out_channels
        return {"dim": dim, "feat_shape": tuple(model.patch_embed.grid_size), "num_prefix_tokens": 0}

    def layer_facts(self, model: SwinTransformer) -> list[Facts]:
        layers = attention_layers(model)
        return [
            {
                "feat_shape": tuple(attn.window_size),
                "num_prefix_tokens": 0,
                "num_heads": attn.num_heads,
                "head_dim": attn.qkv.out_features // (3 * attn.num_heads),
                "layer": i,
                "depth": len(layers),
            }
            for i, attn in enumerate(layers)
        ]

    def encodings(self, model: SwinTransformer):
        return list(model.pos_embed_input), [list(attn.encodings) for attn in attention_layers(model)]

    def install(self, model: SwinTransformer, inputs, layers) -> None:
        del model.pos_embed_input[:]
        model.pos_embed_input.extend(inputs)  # the hook holds this list
        for attn, encodings in zip(attention_layers(model), layers, strict=True):
            for encoding in attn.encodings:
                encoding.move_out()
            attn.relative_position_bias_table = None
            for encoding in encodings:
                if isinstance(encoding, RelativeTable) and attn.relative_position_bias_table is None:
                    encoding.live_in(attn)  # where timm and its checkpoints have the table
            attn.encodings = nn.ModuleList(encodings)


HOST = register_host(SwinHost())
