"""timm's Swin Transformer (v1) as host: encodings act inside the windows, input encodings on the whole grid."""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from timm.models.swin_transformer import SwinTransformer, SwinTransformerBlock
from torch import Tensor, nn

from ..bias.relative_table import RelativeTable
from ..encoding import LayerFacts
from ..materialize import is_plain_eager
from ..windows import TakeTokens, shift_mask, window_order, window_partition, window_reverse
from .grids import AddPositions, EncodedGridModel, GridHost, add_positions
from .host import first, register_host
from .parameters import adopt_parameters, bind_parameters
from .window_attention import WindowAttention, fuse_windows


class EncodedIdentity(AddPositions, nn.Identity):
    """The place of patch merging in the first stage, which merges none: here input encodings are added."""


def hide_fully(mask: Tensor | None) -> Tensor | None:
    """Return timm's shift mask with -inf in place of -100.

    The probability of a hidden key, e^-100, is a denormal number, which a CPU computes with many times slower. It is
    lost in the sum over the keys: outputs have the same bits, unless a hidden logit is some 80 above all seen ones.
    """
    return None if mask is None else mask.masked_fill(mask != 0, float("-inf"))


class EncodedGridBlock:
    """Mixin for a block on (B, H, W, C) tokens, after which conditional encodings may mix those of the whole grid."""

    def has_its_own(self) -> bool:
        """Return whether attention has the encoding of timm's model, and no other: it then keeps timm's bits."""
        return [encoding.owner for encoding in self.attn.encodings] == [self.attn]

    def get_attn_mask(self, x: Tensor | None = None, device=None, dtype=None, feat_shape=None) -> Tensor | None:
        """Return the shift mask, (windows, N, N), of 0 and -inf: timm's, or that of any other encoding.

        They differ where the window does not divide the grid: timm's lets tokens of opposite borders see each other.

        Args:
            x: tokens of any picture, rolled and padded; by default the mask is for `input_resolution`.
            device: of the mask, without x.
            dtype: likewise.
            feat_shape: (H, W) of the grid that became x.
        """
        mask = super().get_attn_mask(x, device=device, dtype=dtype)
        if mask is None or self.has_its_own():
            return hide_fully(mask)
        feat_shape = self.input_resolution if feat_shape is None else feat_shape
        return shift_mask(feat_shape, self.window_size, self.shift_size, mask.device).to(mask.dtype)

    def sees_across_border(self) -> bool:
        """Return whether tokens of opposite borders of the picture see each other, as in timm's model."""
        mask = self.get_attn_mask(device=torch.device("cpu"))
        if mask is None:
            return False
        apart = shift_mask(self.input_resolution, self.window_size, self.shift_size, mask.device) != 0
        return bool((apart & (mask == 0)).any())

    def _attn(self, x: Tensor) -> Tensor:
        """Return the attention of x (B, H, W, C) as timm does; the ways into the windows and back are a gather each.

        timm's rolls, padding and copies stay where a graph is traced, and for pictures of any size.
        """
        if not isinstance(x, Tensor):  # symbolic tracing
            return super()._attn(x)
        shape, (wh, ww) = tuple(x.shape[1:3]), self.window_size
        if self.dynamic_mask or not is_plain_eager():
            padding = (0, 0, 0, -shape[1] % ww, 0, -shape[0] % wh)
            rolled = F.pad(x.roll([-s for s in self.shift_size], (1, 2)), padding)
            mask = self.get_attn_mask(rolled, feat_shape=shape) if self.dynamic_mask else self.attn_mask
            windows = self.attn(window_partition(rolled, self.window_size), mask=mask)
            rolled = window_reverse(windows, self.window_size, tuple(rolled.shape[1:3]))
            return rolled[:, : shape[0], : shape[1]].roll(self.shift_size, (1, 2))
        way = window_order(shape, self.window_size, self.shift_size, x.device)
        windows = TakeTokens.apply(x.flatten(1, 2), *way)
        windows = self.attn(windows.view(-1, self.window_area, x.shape[-1]), mask=self.attn_mask)
        return TakeTokens.apply(windows.view(x.shape[0], -1, x.shape[-1]), *reversed(way)).view(x.shape)

    def forward(self, x: Tensor) -> Tensor:
        """Return the tokens (B, H, W, C) after the block."""
        return add_positions(super().forward(x), self.mixers)


class EncodedSwinBlock(EncodedGridBlock, SwinTransformerBlock):
    """A block of a converted Swin Transformer."""

    def _attn(self, x: Tensor) -> Tensor:
        """Return the attention of x (B, H, W, C) as timm does, by a kernel where one runs."""
        out = fuse_windows(self, x) if isinstance(x, Tensor) else None
        return super()._attn(x) if out is None else out


class EncodedSwinMixin(EncodedGridModel):
    """The methods in which converted Swin Transformers of both versions differ from timm's."""

    def set_input_size(self, *args, **kwargs) -> None:
        """Change the input size as timm does; learned tables are resized, formulas interpolate their coordinates."""
        super().set_input_size(*args, **kwargs)
        for encoding in self.pos_embed_input:
            encoding.set_feat_shape(tuple(self.patch_embed.grid_size))

    def sees_across_border(self) -> bool:
        """Return whether a shifted window joins opposite borders of the picture, at the size the model is set to."""
        return any(block.sees_across_border() for block in self.modules() if isinstance(block, EncodedGridBlock))


class EncodedSwinTransformer(EncodedSwinMixin, SwinTransformer):
    """A Swin Transformer whose positions are encodings of this package."""


class SwinHost(GridHost):
    """The family of Swin v1; another version has its own class attributes and `wrap_attention`."""

    name = "SwinTransformer (Swin v1)"
    channels_last_features = True
    models: ClassVar = {SwinTransformer: EncodedSwinTransformer}
    block_class: ClassVar[type] = EncodedSwinBlock
    native: ClassVar[type] = RelativeTable  # the encoding that timm's model has, under names of its own

    def stages(self, model: nn.Module) -> list[list[nn.Module]]:
        return [list(stage.blocks) for stage in model.layers]

    def wrap_attention(self, attn: nn.Module) -> None:
        """Swap the class of timm's window attention, and give it its own bias as an encoding."""
        options = {"num_heads": attn.num_heads, "feat_shape": tuple(attn.window_size)}
        table, index = adopt_parameters(attn, RelativeTable, **options), attn._buffers.pop("relative_position_index")
        table.relative_position_index = index  # computed already
        attn.encodings = nn.ModuleList([table])
        attn.__class__ = WindowAttention

    def wrap_block(self, block: nn.Module) -> None:
        """Swap the class of timm's block and of its attention."""
        self.wrap_attention(block.attn)
        block.__class__, block.mixers = self.block_class, nn.ModuleList()
        block._init_buffers()

    def convert_parts(self, model: nn.Module) -> None:
        for block in self.blocks(model):
            self.wrap_block(block)
        stem = model.layers[0].downsample
        stem.input_encodings = (model.pos_embed_input,)
        stem.__class__ = EncodedIdentity

    def input_facts(self, model: nn.Module) -> LayerFacts:
        return LayerFacts(dim=model.patch_embed.proj.out_channels, feat_shape=tuple(model.patch_embed.grid_size))

    def layer_facts(self, model: nn.Module) -> list[LayerFacts]:
        blocks = self.blocks(model)
        return [
            LayerFacts(
                dim=block.dim,
                feat_shape=tuple(block.attn.window_size),
                num_heads=block.attn.num_heads,
                head_dim=block.attn.qkv.out_features // (3 * block.attn.num_heads),
                layer=index,
                depth=len(blocks),
            )
            for index, block in enumerate(blocks)
        ]

    def bind_native(self, model: nn.Module) -> None:
        for block in self.blocks(model):
            native = first(block.attn.encodings, self.native)
            if native is not None:
                bind_parameters(native, block.attn)
            block._init_buffers()  # whose shift mask depends on the encodings


HOST = register_host(SwinHost())
