"""timm's ConViT as host: blocks whose attention has positions blended in, then, behind a class token, plain ones.

timm's own positions are those of square grids, and are kept in a buffer; here they are a formula of any coordinates.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import ClassVar

import torch.fx
from timm.layers import use_fused_attn
from timm.models.convit import GPSA, MHSA, Block, ConVit
from torch import Tensor, nn

from ..encoding import LayerFacts, OneNode
from ..positions import Positions
from .attention import AttentionContext, attend_logits, encoded, prepare_encodings, self_attention, split_heads
from .host import first, register_host
from .isotropic import IsotropicHost, mix
from .native_encodings import GatedPositions
from .parameters import bind_first
from .without_prefix import WithoutPrefixTokens


class EncodedGPSA(OneNode, GPSA):
    """Attention of patches x (B, N, C) with encodings, and with timm's own unless it was taken away."""

    def forward(self, x: Tensor, context: AttentionContext | None = None) -> Tensor:
        """Return tokens (B, N, C)."""
        prepared = prepare_encodings(self, context)
        q, k = self.qk(x).unflatten(-1, (2, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        v = self.v(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # (B, heads, N, head_dim)
        tensors = encoded(x, q, k, v, prepared)
        own = first(self.encodings, GatedPositions)
        blend = nn.Identity() if own is None else partial(own.blend, logits=dict(prepared)[own])
        out = attend_logits(tensors, (tensors.q @ tensors.k.mT) * self.scale, lambda p: self.attn_drop(blend(p)))
        return self.proj_drop(self.proj(out.transpose(1, 2).flatten(2)))

    def init_non_persistent_buffers(self) -> None:
        """Do nothing: there is no buffer of timm's left."""


class EncodedMHSA(OneNode, MHSA):
    """Self-attention with encodings, on tokens x (B, 1 + N, C)."""

    fused_attn = use_fused_attn()

    def forward(self, x: Tensor, context: AttentionContext | None = None) -> Tensor:
        """Return tokens (B, 1 + N, C)."""
        prepared = prepare_encodings(self, context)
        if not prepared:
            return super().forward(x)
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, -1))  # (B, 1 + N, 3, heads, head_dim)
        return self_attention(self, x, *split_heads(self, qkv, prepared))


class EncodedBlock(Block):
    """A block that hands positions on to its attention, and after which conditional encodings may mix the tokens."""

    def forward(self, x: Tensor, context: AttentionContext | None = None) -> Tensor:
        """Return the tokens after the block."""
        x = x + self.drop_path(self.attn(self.norm1(x), context))
        x = x + self.drop_path(self.mlp(self.norm2(x)))
        return mix(x, self.mixers, context)


@torch.fx.wrap  # one call in its graphs
def put_behind_class_token(positions: Positions) -> Positions:
    """Return the positions of patches that have a class token in front of them."""
    return replace(positions, num_prefix_tokens=1)


class EncodedConVit(WithoutPrefixTokens, ConVit):
    """A ConViT whose positions are encodings of this package."""

    def through_blocks(self, x: Tensor, context: AttentionContext, blocks) -> Iterator[tuple[Tensor, AttentionContext]]:
        for index, block in enumerate(blocks):
            if index == self.local_up_to_layer and self.cls_token is not None:  # else pruned
                x = torch.cat((self.cls_token.expand(x.shape[0], -1, -1), x), dim=1)
                positions, keep = (context.positions, None) if context.kept is None else context.kept
                context = self.context(put_behind_class_token(positions), keep)
            x = self.forward_block(block, x, context)
            yield x, context


class ConVitHost(IsotropicHost):
    """The family of ConViT; its first layers have no class token."""

    name = "ConVit (ConViT)"
    models: ClassVar = {ConVit: EncodedConVit}
    blocks: ClassVar = {Block: EncodedBlock}
    attentions: ClassVar = {GPSA: EncodedGPSA, MHSA: EncodedMHSA}

    def adopt_native_positions(self, model: ConVit) -> None:
        for block in model.blocks:
            if isinstance(block.attn, GPSA):
                block.attn._buffers.pop("rel_indices", None)  # timm 1.0.26 computes it when it is needed
                block.attn.encodings.append(GatedPositions(block.attn))
        self.bind_native(model)

    def bind_native(self, model: ConVit) -> None:
        super().bind_native(model)
        for block in model.blocks:
            bind_first(block.attn.encodings, GatedPositions, block.attn)

    def num_prefix_tokens(self, model: ConVit) -> int:
        return 0  # at the stem, see below

    def layer_facts(self, model: ConVit) -> list[LayerFacts]:
        behind = range(model.local_up_to_layer, len(model.blocks)) if model.cls_token is not None else ()
        found = super().layer_facts(model)
        return [replace(facts, num_prefix_tokens=int(facts.layer in behind)) for facts in found]


HOST = register_host(ConVitHost())
