"""timm's Swin Transformer (v1) as host: encodings act inside the windows, input encodings on the whole grid."""

from __future__ import annotations

from typing import ClassVar

from timm.models.swin_transformer import SwinTransformer, SwinTransformerBlock
from timm.models.swin_transformer import WindowAttention as TimmWindowAttention
from torch import Tensor, nn

from ..bias.relative_table import RelativeTable
from ..encoding import LayerFacts, PositionEncoding
from .grid_hosts import EncodedGridModel, GridHost
from .grids import AddPositions
from .host import register_host
from .parameters import adopt_parameters, bind_first
from .shifted_windows import EncodedGridBlock
from .window_attention import WindowAttention, fuse_windows


class EncodedIdentity(AddPositions, nn.Identity):
    """The place of patch merging in the first stage, which merges none: here input encodings are added."""


class EncodedSwinBlock(EncodedGridBlock, SwinTransformerBlock):
    """A block of a converted Swin Transformer."""

    def _attn(self, x: Tensor) -> Tensor:
        """Return the attention of x (B, H, W, C) as timm does, by a kernel where one runs."""
        out = fuse_windows(self, x) if isinstance(x, Tensor) else None
        return super()._attn(x) if out is None else out


class EncodedSwinMixin(EncodedGridModel):
    """The methods in which converted Swin Transformers of all versions differ from timm's."""

    def set_input_size(self, *args, **kwargs) -> None:
        """Change the input size as timm does; learned tables are resized, formulas interpolate their coordinates."""
        super().set_input_size(*args, **kwargs)  # down to the attention layers, which resize their own
        for encoding in self.pos_embed_input:
            encoding.set_feat_shape(tuple(self.patch_embed.grid_size))

    def sees_across_border(self) -> bool:
        """Return whether a shifted window joins opposite borders of the picture, at the size the model is set to."""
        return any(block.sees_across_border() for block in self.modules() if isinstance(block, EncodedGridBlock))


class EncodedSwinTransformer(EncodedSwinMixin, SwinTransformer):
    """A Swin Transformer whose positions are encodings of this package."""


class SwinHost(GridHost):
    """The family of Swin v1; another version has its own class attributes and `adopt_table`."""

    name = "SwinTransformer (Swin v1)"
    channels_last_features = True
    models: ClassVar = {SwinTransformer: EncodedSwinTransformer}
    parts: ClassVar = {
        SwinTransformerBlock: EncodedSwinBlock,
        TimmWindowAttention: WindowAttention,
        nn.Identity: EncodedIdentity,
    }
    input_part = "layers.0.downsample"
    native: ClassVar[type] = RelativeTable  # the encoding that timm's model has, under names of its own

    def stages(self, model: nn.Module) -> list[list[nn.Module]]:
        return [list(stage.blocks) for stage in model.layers]

    def adopt_table(self, attn: nn.Module) -> PositionEncoding:
        """Return the encoding that timm's own bias of an attention layer is."""
        table = adopt_parameters(attn, RelativeTable, num_heads=attn.num_heads, feat_shape=tuple(attn.window_size))
        table.relative_position_index = attn._buffers.pop("relative_position_index")  # computed already
        return table

    def wrap_block(self, block: nn.Module) -> None:
        super().wrap_block(block)
        block.attn.encodings.append(self.adopt_table(block.attn))
        block.renew_mask()

    def input_facts(self, model: nn.Module) -> LayerFacts:
        return LayerFacts(dim=model.patch_embed.proj.out_channels, feat_shape=tuple(model.patch_embed.grid_size))

    def seen_shapes(self, model: nn.Module) -> list[tuple[int, int]]:
        return [tuple(block.attn.window_size) for block in self.blocks(model)]

    def bind_native(self, model: nn.Module) -> None:
        for block in self.blocks(model):
            bind_first(block.attn.encodings, self.native, block.attn)
            block.renew_mask()


HOST = register_host(SwinHost())
