"""timm's BEiT as host: a relative table in every layer, or one for all of them, under timm's names."""

from __future__ import annotations

from typing import ClassVar

from timm.models.beit import Attention as TimmAttention
from timm.models.beit import Beit, Block
from torch import Tensor

from ..bias.relative_table import RelativeTable
from ..encoding import OneNode
from .attention import AttentionContext, math_is_faster, prepare_encodings, self_attention, split_heads
from .host import first, register_host
from .isotropic import IsotropicForward, IsotropicHost, mix
from .parameters import ParameterHolder, adopt_parameters, bind_first, bind_parameters
from .projections import project


class EncodedBeitAttention(OneNode, TimmAttention):
    """Self-attention of BEiT with encodings, on tokens x (B, 1 + N, C)."""

    def forward(self, x: Tensor, shared_rel_pos_bias: AttentionContext | None = None) -> Tensor:
        """Return tokens (B, 1 + N, C).

        `shared_rel_pos_bias`, timm's way from the model to its attention layers, carries the context here.
        """
        prepared = prepare_encodings(self, shared_rel_pos_bias)
        if not prepared and not math_is_faster(x):
            return super().forward(x)
        return self_attention(self, x, *split_heads(self, project(self, x), prepared))

    def set_window_size(self, window_size: tuple[int, int]) -> None:
        """Note the new grid; the encodings resize their own tables."""
        self.window_size = tuple(window_size)


class EncodedBeitBlock(Block):
    """A block after which conditional encodings may mix the tokens."""

    def forward(self, x: Tensor, shared_rel_pos_bias: AttentionContext | None = None) -> Tensor:
        """Return the tokens (B, 1 + N, C) after the block."""
        return mix(super().forward(x, shared_rel_pos_bias), self.mixers, shared_rel_pos_bias)


class EncodedBeit(IsotropicForward, Beit):
    """A BEiT whose positions are encodings of this package."""

    holders = ("rel_pos_bias",)


class BeitHost(IsotropicHost):
    """The family of BEiT, whose tables keep their names.

    They are `blocks.0.attn.relative_position_bias_table` and so on, or that of `rel_pos_bias`.
    """

    name = "Beit (BEiT, BEiT v2)"
    models: ClassVar = {Beit: EncodedBeit}
    blocks: ClassVar = {Block: EncodedBeitBlock}
    attentions: ClassVar = {TimmAttention: EncodedBeitAttention}

    def convert(self, model: Beit) -> None:
        own = model.blocks[0].attn.relative_position_bias_table
        if type(model) is Beit and own is not None and model.rel_pos_bias is not None:
            raise ValueError(
                "a Beit with use_rel_pos_bias and use_shared_rel_pos_bias has two tables in every layer, which one "
                "name cannot tell apart: build it with one of them"
            )
        super().convert(model)

    def adopt_native_positions(self, model: Beit) -> None:
        options = {"feat_shape": tuple(model.patch_embed.grid_size), "preset": "beit"}
        if model.rel_pos_bias is not None:
            table = model.rel_pos_bias.relative_position_bias_table
            model.rel_pos_bias = ParameterHolder(options["feat_shape"], relative_position_bias_table=table)
            own = adopt_parameters(model.rel_pos_bias, RelativeTable, num_heads=table.shape[1], **options)
            model.pos_embed_shared.append(own)
        for block in model.blocks:
            attn = block.attn
            if attn.relative_position_bias_table is not None:
                attn.encodings.append(adopt_parameters(attn, RelativeTable, num_heads=attn.num_heads, **options))
            attn.relative_position_index = None

    def bind_native(self, model: Beit) -> None:
        super().bind_native(model)
        grid, shared = tuple(model.patch_embed.grid_size), first(model.pos_embed_shared, RelativeTable)
        model.rel_pos_bias = None if shared is None else ParameterHolder(grid)
        if shared is not None:
            bind_parameters(shared, model.rel_pos_bias)
        for block in model.blocks:
            block.attn.window_size = grid
            bind_first(block.attn.encodings, RelativeTable, block.attn)


HOST = register_host(BeitHost())
