"""timm's ViT with relative position biases as host: tables, or small networks, in every layer or one for all."""

from __future__ import annotations

from typing import ClassVar

from timm.models.vision_transformer_relpos import (
    RelPosAttention,
    RelPosBlock,
    ResPostRelPosBlock,
    VisionTransformerRelPos,
)
from torch import Tensor, nn

from ..encoding import OneNode
from .attention import AttentionContext, math_is_faster, prepare_encodings, self_attention, split_heads
from .host import register_host
from .isotropic import IsotropicForward, IsotropicHost, mix
from .rel_pos import adopt_rel_pos, bind_rel_pos


class EncodedRelPosAttention(OneNode, RelPosAttention):
    """Self-attention with encodings, on tokens x (B, prefix + N, C)."""

    def forward(self, x: Tensor, shared_rel_pos: AttentionContext | None = None) -> Tensor:
        """Return tokens (B, prefix + N, C).

        `shared_rel_pos`, timm's way from the model to its attention layers, carries the context here.
        """
        prepared = prepare_encodings(self, shared_rel_pos)
        if not prepared and not math_is_faster(x):
            return super().forward(x)
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, -1))
        return self_attention(self, x, *split_heads(self, qkv, prepared))


class EncodedRelPosMixin:
    """A block after which conditional encodings may mix the tokens."""

    def forward(self, x: Tensor, shared_rel_pos: AttentionContext | None = None) -> Tensor:
        """Return the tokens (B, prefix + N, C) after the block."""
        return mix(super().forward(x, shared_rel_pos), self.mixers, shared_rel_pos)


class EncodedRelPosBlock(EncodedRelPosMixin, RelPosBlock):
    """A block of a converted model."""


class EncodedResPostRelPosBlock(EncodedRelPosMixin, ResPostRelPosBlock):
    """A block of a converted model that normalises after its branches."""


class EncodedVisionTransformerRelPos(IsotropicForward, VisionTransformerRelPos):
    """A VisionTransformerRelPos whose positions are encodings of this package."""

    holders = ("shared_rel_pos",)


class RelPosHost(IsotropicHost):
    """The family of VisionTransformerRelPos: `blocks.0.attn.rel_pos` or `shared_rel_pos` keep the names in them."""

    name = "VisionTransformerRelPos"
    models: ClassVar = {VisionTransformerRelPos: EncodedVisionTransformerRelPos}
    blocks: ClassVar = {RelPosBlock: EncodedRelPosBlock, ResPostRelPosBlock: EncodedResPostRelPosBlock}
    attentions: ClassVar = {RelPosAttention: EncodedRelPosAttention}

    def slots(self, model: VisionTransformerRelPos) -> list[tuple[nn.ModuleList, nn.Module, str]]:
        """Return each list of encodings inside attention, and the owner and the name of timm's module for it."""
        layers = [(block.attn.encodings, block.attn, "rel_pos") for block in model.blocks]
        return [(model.pos_embed_shared, model, "shared_rel_pos"), *layers]

    def adopt_native_positions(self, model: VisionTransformerRelPos) -> None:
        for encodings, owner, name in self.slots(model):
            adopt_rel_pos(owner, name, encodings)

    def bind_native(self, model: VisionTransformerRelPos) -> None:
        super().bind_native(model)
        for encodings, owner, name in self.slots(model):
            bind_rel_pos(owner, name, encodings, tuple(model.patch_embed.grid_size))


HOST = register_host(RelPosHost())
