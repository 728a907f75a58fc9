"""timm's MViTv2 as host: queries, keys and values are pooled by convolutions, each for itself.

A pooled token stands where the convolution that made it has its middle, at a multiple of the stride. Coordinates are in
steps of the finer grid of the two, queries' or keys'.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from timm.layers import use_fused_attn
from timm.models import mvitv2 as timms
from torch import Tensor, nn

from ..bias.decomposed import Decomposed
from ..encoding import LayerFacts, OneNode, PositionEncoding
from ..positions import Positions
from .attention import NO_DROPOUT, AttentionContext, attend, encoded, encoded_pairs, prepare_encodings
from .grid_hosts import EncodedGridModel, StagedHost
from .grids import AddPositionsToTokens
from .host import register_host
from .isotropic import mix
from .parameters import adopt_parameters, bind_first


@dataclass(frozen=True)
class CornerOffsets:
    """MViTv2's tables of `decomposed`, whose offsets are to the last cell of a key's `step` cells, not to the first."""

    step: int

    def read(self, parameter: Tensor) -> Tensor:
        """Return the table (2 n - 1, head_dim) of offsets to the first cell; rows of no pair are carried along."""
        return parameter.roll(self.step - 1, 0)

    def write(self, value: Tensor, encoding: PositionEncoding) -> Tensor:
        """Return MViTv2's table."""
        return value.roll(1 - self.step, 0)


def steps(attn: timms.MultiScaleAttention) -> tuple[int, int]:
    """Return the steps of the finer grid between neighbouring queries, and between neighbouring keys."""
    strides = [1 if pool is None else nn.modules.utils._pair(pool.stride)[0] for pool in (attn.pool_q, attn.pool_k)]
    return strides[0] // min(strides), strides[1] // min(strides)


def grid_of(layer: nn.Module, x: Tensor, size: list[int]) -> Positions:
    """Return the positions of a whole grid, behind the class token if the layer has one."""
    return Positions.grid(tuple(size), int(layer.has_cls_token), device=x.device).promote(x.dtype)


class EncodedMultiScaleAttention(OneNode, timms.MultiScaleAttention):
    """Pooling attention with encodings, on tokens x (B, prefix + N, C) of a grid."""

    def _pool(self, x: Tensor, grid, pool: nn.Module | None, norm: nn.Module | None):
        if pool is not None:
            x, prefix = timms.reshape_pre_pool(x, grid, self.has_cls_token)
            x, grid = timms.reshape_post_pool(pool(x), self.num_heads, prefix)
        return x if norm is None else norm(x), grid  # (B, heads, prefix + N', head_dim)

    def forward(self, x: Tensor, feat_size: Sequence[int]) -> tuple[Tensor, Sequence[int]]:
        """Return tokens (B, prefix + N', C') and their grid."""
        if all(encoding.owner is self for encoding in self.encodings):  # timm's own alone, or none
            return super().forward(x, feat_size)
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        q, q_size = self._pool(q, feat_size, self.pool_q, self.norm_q)
        k, k_size = self._pool(k, feat_size, self.pool_k, self.norm_k)
        v, _ = self._pool(v, feat_size, self.pool_v, self.norm_v)
        (q_step, k_step), grid = steps(self), tuple(map(max, q_size, k_size))
        queries, keys = (grid_of(self, x, size) for size in (q_size, k_size))
        if self.pool_q is not None:  # the input where each query stands
            prefix, patches = x.tensor_split([queries.num_prefix_tokens], dim=1)
            rows, columns = self.pool_q.stride
            x = torch.cat([prefix, patches.unflatten(1, tuple(feat_size))[:, ::rows, ::columns].flatten(1, 2)], dim=1)
        if q_step == k_step:
            tensors = encoded(x, q, k, v, prepare_encodings(self, AttentionContext(queries)))
        else:
            queries, keys = (
                replace(at, coords=at.coords * step, feat_shape=grid, is_grid=step == 1)
                for at, step in ((queries, q_step), (keys, k_step))
            )
            tensors = encoded_pairs(x, q, k, v, self.encodings, queries, keys)
        out = attend(tensors, self.scale, NO_DROPOUT, use_fused_attn())  # (B, heads, prefix + N', head_dim)
        out = out + q if self.residual_pooling else out
        return self.proj(out.transpose(1, 2).flatten(2)), q_size


class EncodedBlock(timms.MultiScaleBlock):
    """A block after which conditional encodings may mix the tokens."""

    def forward(self, x: Tensor, feat_size: Sequence[int]) -> tuple[Tensor, Sequence[int]]:
        """Return the tokens (B, prefix + N', C') and their grid."""
        x, grid = super().forward(x, feat_size)
        return mix(x, self.mixers, AttentionContext(grid_of(self, x, grid))), grid


class EncodedPatchEmbed(AddPositionsToTokens, timms.PatchEmbed):
    """The patches, to which input encodings are added."""


class EncodedMViTv2(EncodedGridModel, timms.MultiScaleVit):
    """An MViTv2 whose positions are encodings of this package."""


class MViTv2Host(StagedHost):
    """The family of MViTv2; its tables keep their names, and timm's own steps run where nothing else was asked for."""

    name = "MultiScaleVit (MViTv2)"
    models: ClassVar = {timms.MultiScaleVit: EncodedMViTv2}
    parts: ClassVar = {
        timms.MultiScaleBlock: EncodedBlock,
        timms.MultiScaleAttention: EncodedMultiScaleAttention,
        timms.PatchEmbed: EncodedPatchEmbed,
    }
    input_part = "patch_embed"

    def pools(self, block: nn.Module) -> bool:
        return steps(block.attn) != (1, 1)

    def convert(self, model: timms.MultiScaleVit) -> None:
        pool_first = any(not isinstance(block.attn, timms.MultiScaleAttention) for block in self.blocks(model))
        if model.pos_embed is not None or pool_first:
            raise ValueError("a MultiScaleVit with use_abs_pos or pool_first takes no encodings")
        super().convert(model)

    def adopt_native_positions(self, model: timms.MultiScaleVit) -> None:
        for block, facts in zip(self.blocks(model), self.layer_facts(model), strict=True):
            attn = block.attn
            if attn.rel_pos_type == "spatial":
                options = {"num_heads": attn.num_heads, "head_dim": attn.head_dim, "feat_shape": facts.feat_shape}
                attn.encodings.append(adopt_parameters(attn, Decomposed, CornerOffsets(steps(attn)[1]), **options))

    def bind_native(self, model: timms.MultiScaleVit) -> None:
        for block in self.blocks(model):
            attn, view = block.attn, CornerOffsets(steps(block.attn)[1])
            own = bind_first(attn.encodings, Decomposed, attn, view)
            attn.rel_pos_type = "none" if own is None else "spatial"

    def grids(self, model: timms.MultiScaleVit) -> list[tuple[int, int]]:
        return [tuple(stage.feat_size) for stage in model.stages]

    def input_facts(self, model: timms.MultiScaleVit) -> LayerFacts:
        return LayerFacts(dim=model.patch_embed.proj.out_channels, feat_shape=self.grids(model)[0])

    def facts_of(self, block: nn.Module) -> dict[str, int]:
        prefix = {"num_prefix_tokens": int(block.attn.has_cls_token)}
        return {**super().facts_of(block), "dim_in": block.dim, **prefix}

    def seen_shape(self, block: nn.Module, grid: tuple[int, int]) -> tuple[int, int]:
        return tuple(n * steps(block.attn)[0] for n in grid)


HOST = register_host(MViTv2Host())
