"""The blocks of timm's ViT: one after the other, parallel, with differential attention, normalised behind.

timm's blocks pass `attn_mask` on to attention; here it carries the context.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from timm.layers import DiffAttention
from timm.models.vision_transformer import Attention as TimmAttention
from timm.models.vision_transformer import (
    Block,
    DiffParallelScalingBlock,
    ParallelScalingBlock,
    ParallelThingsBlock,
    ResPostBlock,
)
from torch import Tensor, nn

from ..encoding import AttentionTensors, OneNode, PositionEncoding
from .attention import Attention, AttentionContext, attend, caller_masks, encoded, prepare_encodings
from .host import attention_of
from .isotropic import mix
from .masks import add_masks
from .projections import into_heads


def difference(layer: nn.Module, tensors: AttentionTensors) -> Tensor:
    """Return differential attention, normalised, (B, heads, T, 2 d).

    Every head has two attention maps of one value, and out = (A1 - lambda A2) v. An encoding acts on both maps, and has
    a head for each: 2 h of head h for A1, 2 h + 1 for A2.

    Args:
        layer: has `scale`, `attn_drop`, `fused_attn`, `lambda_init` and `sub_norm`.
        tensors: q and k (B, 2 heads, T, d), v (B, heads, T, 2 d).
    """
    output, tensors.output = tensors.output, None
    tensors.v = tensors.v.repeat_interleave(2, dim=1)  # (B, 2 heads, T, 2 d)
    maps = attend(tensors, layer.scale, layer.attn_drop, layer.fused_attn).unflatten(1, (-1, 2))
    out = maps[:, :, 0] - layer._compute_lambda().type_as(maps) * maps[:, :, 1]  # (B, heads, T, 2 d)
    out = out if output is None else out + output
    return layer.sub_norm(out) * (1 - layer.lambda_init)


class EncodedDiffAttention(OneNode, DiffAttention):
    """Differential attention with encodings, on tokens x (B, prefix + N, C)."""

    def forward(self, x: Tensor, attn_mask: AttentionContext | Tensor | None = None, is_causal: bool = False) -> Tensor:
        """Return tokens (B, prefix + N, C)."""
        prepared = prepare_encodings(self, attn_mask)
        attn_mask, is_causal = caller_masks(attn_mask, is_causal)
        if not prepared:
            return super().forward(x, attn_mask, is_causal)
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        q, k = into_heads(self.head_dim, q, k)  # (B, 2 heads, T, d)
        (v,) = into_heads(2 * self.head_dim, v)  # (B, heads, T, 2 d)
        tensors = add_masks(encoded(x, self.q_norm(q), self.k_norm(k), v, prepared), attn_mask, is_causal)
        out = difference(self, tensors).transpose(1, 2).flatten(2)  # (B, T, C)
        return self.proj_drop(self.proj(self.norm(out)))


class MixingMixin:
    """A block after which conditional encodings may mix the tokens."""

    def forward(self, x: Tensor, attn_mask: AttentionContext | Tensor | None = None, is_causal: bool = False) -> Tensor:
        """Return the tokens (B, prefix + N, C) after the block."""
        return mix(super().forward(x, attn_mask, is_causal), self.mixers, attn_mask)


class EncodedBlock(MixingMixin, Block):
    """A block of a converted ViT."""


class EncodedResPostBlock(MixingMixin, ResPostBlock):
    """A block of a converted ViT that normalises behind attention and MLP."""


class ParallelMixin:
    """A block that is its own attention layer, with attention and MLP between the same two projections."""

    def forward(self, x: Tensor, attn_mask: AttentionContext | Tensor | None = None, is_causal: bool = False) -> Tensor:
        """Return the tokens (B, prefix + N, C) after the block."""
        context, prepared = attn_mask, prepare_encodings(self, attn_mask)
        attn_mask, is_causal = caller_masks(attn_mask, is_causal)
        if not prepared:
            return mix(super().forward(x, attn_mask, is_causal), self.mixers, context)
        y = self.in_norm(x)
        mlp, q, k, v = self.in_proj(y).split(self.in_split, dim=-1)
        mlp = self.mlp_drop(self.mlp_act(mlp if self.mlp_bias is None else mlp + self.mlp_bias))
        q, k = into_heads(self.head_dim, q, k)
        (v,) = into_heads(v.shape[-1] // self.num_heads, v)  # twice as wide in differential attention
        tensors = add_masks(encoded(y, self.q_norm(q), self.k_norm(k), v, prepared), attn_mask, is_causal)
        return mix(x + self.drop_path(self.ls(self.project(self.attend(tensors), mlp))), self.mixers, context)

    def attend(self, tensors: AttentionTensors) -> Tensor:
        """Return what attention makes of the values, (B, T, C)."""
        return attend(tensors, self.scale, self.attn_drop, self.fused_attn).transpose(1, 2).flatten(2)

    def project(self, attention: Tensor, mlp: Tensor) -> Tensor:
        """Return the sum of both branches, (B, T, C), from what each has before its last projection."""
        if self.out_proj is not None:
            return self.out_proj(torch.cat([attention, mlp], dim=-1))
        return self.attn_out_proj(attention) + self.mlp_out_proj(mlp)


class EncodedParallelScalingBlock(OneNode, ParallelMixin, ParallelScalingBlock):
    """A parallel block of a converted ViT."""


class EncodedDiffParallelScalingBlock(OneNode, ParallelMixin, DiffParallelScalingBlock):
    """A parallel block with differential attention of a converted ViT."""

    def attend(self, tensors: AttentionTensors) -> Tensor:
        return difference(self, tensors).transpose(1, 2).flatten(2)


class EncodedBranch(nn.Sequential):
    """One attention layer of several side by side, between its norm and its layer scale."""

    def forward(
        self, input: Tensor, attn_mask: AttentionContext | Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        """Return what is added to the tokens (B, prefix + N, C)."""
        return self.drop_path(self.ls(self.attn(self.norm(input), attn_mask, is_causal)))


class EncodedParallelThingsBlock(ParallelThingsBlock):
    """A block of a converted ViT with several attention layers side by side, then several MLPs."""

    def forward(self, x: Tensor, attn_mask: AttentionContext | Tensor | None = None, is_causal: bool = False) -> Tensor:
        """Return the tokens (B, prefix + N, C) after the block, and after the mixers of each attention layer."""
        x = x + torch.stack([branch(x, attn_mask, is_causal) for branch in self.attns]).sum(dim=0)
        x = x + torch.stack([branch(x) for branch in self.ffns]).sum(dim=0)
        for branch in self.attns:
            x = mix(x, branch.mixers, attn_mask)
        return x


def is_differential(attn: nn.Module) -> bool:
    """Return whether an attention layer, wrapped or not, has two maps a head."""
    return hasattr(attn, "lambda_init")


class VitBlocks:
    """The part of a host that knows the blocks of timm's ViT."""

    blocks: ClassVar = {
        Block: EncodedBlock,
        ResPostBlock: EncodedResPostBlock,
        ParallelScalingBlock: EncodedParallelScalingBlock,
        DiffParallelScalingBlock: EncodedDiffParallelScalingBlock,
        ParallelThingsBlock: EncodedParallelThingsBlock,
    }
    attentions: ClassVar = {
        TimmAttention: Attention,
        DiffAttention: EncodedDiffAttention,
        ParallelScalingBlock: EncodedParallelScalingBlock,
        DiffParallelScalingBlock: EncodedDiffParallelScalingBlock,
    }

    def layers_of(self, block: nn.Module) -> list[nn.Module]:
        return list(getattr(block, "attns", [block]))

    def heads(self, attn: nn.Module) -> tuple[int, int]:
        """Return how many attention maps a layer has, two a head where their difference counts, and their channels."""
        return attn.num_heads * (1 + is_differential(attn)), attn.head_dim

    def convert(self, model: nn.Module) -> None:
        super().convert(model)
        for block in model.blocks:
            if isinstance(block, ParallelThingsBlock):
                for branch in block.attns:
                    branch.__class__ = EncodedBranch

    def install(self, model: nn.Module, inputs: list[PositionEncoding], layers: list[list[PositionEncoding]]) -> None:
        for layer, encodings in zip(self.layers(model), layers, strict=True):
            attn = attention_of(layer)
            for encoding in encodings:
                if is_differential(attn) and getattr(encoding, "value_table", None) is not None:
                    raise ValueError(
                        f"{encoding.name} has value vectors of {attn.head_dim} channels, but differential attention "
                        f"has values of {2 * attn.head_dim}: leave out values=True"
                    )
        super().install(model, inputs, layers)
