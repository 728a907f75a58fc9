"""timm's Hiera as host: tokens in unrolled order, attention in mask units, queries that are pooled.

Coordinates travel with the tokens: `unroll` orders both, a mask drops both, and where a block pools the queries of
`q_stride` neighbours, the query stands in their middle. In mask units encodings see the coordinates of the unit.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection
from dataclasses import replace
from typing import ClassVar

import torch
from timm.models._features import feature_take_indices
from timm.models.hiera import Hiera, HieraBlock, MaskUnitAttention
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..encoding import LayerFacts
from ..input.abs_win import AbsWin
from ..input.learned import Learned
from ..positions import Positions
from .attention import NO_DROPOUT, AttentionContext, attend, encoded, encoded_pairs, positions_of
from .grid_hosts import EncodedGridModel, GridHost
from .grids import add_to_tokens
from .host import encoding_parameters, register_host
from .isotropic import mix
from .parameters import adopt_parameters, bind_first


def pool_max(x: Tensor, q_stride: int) -> Tensor:
    """Return the maxima (..., K, C) of tokens (..., q_stride * K, C) in unrolled order, as Hiera pools queries."""
    return x.unflatten(-2, (q_stride, -1)).amax(-3)


def pool_mean(x: Tensor, q_stride: int) -> Tensor:
    """Return the means (..., K, C) of the tokens (..., q_stride * K, C) that `pool_max` pools."""
    return x.unflatten(-2, (q_stride, -1)).mean(-3)


def pool_middle(positions: Positions, q_stride: int) -> Positions:
    """Return the positions of pooled queries on the grid of their keys: the middle of the tokens that were pooled."""
    return replace(positions, coords=pool_mean(positions.coords, q_stride), is_grid=False)


def pool_grid(positions: Positions, stride: tuple[int, int]) -> Positions:
    """Return the positions of pooled tokens on a grid of their own."""
    coords = positions.coords.unflatten(-2, (stride[0] * stride[1], -1))[..., 0, :, :]  # of the upper left one
    coords = torch.stack([axis / s for axis, s in zip(coords.unbind(-1), stride, strict=True)], dim=-1)
    shape = tuple(n // s for n, s in zip(positions.feat_shape, stride, strict=True))
    return replace(positions, coords=coords, feat_shape=shape)


class EncodedMaskUnitAttention(MaskUnitAttention):
    """Attention in mask units, or of all tokens, with encodings, on tokens x (B, T, C) in unrolled order."""

    def forward(self, x: Tensor, context: AttentionContext | None = None) -> Tensor:
        """Return tokens (B, T / q_stride, dim_out) of tokens x (B, T, C)."""
        if not len(self.encodings):
            return super().forward(x)
        positions = positions_of(context, "attention layer")
        units = x.shape[1] // (self.q_stride * self.window_size) if self.use_mask_unit_attn else 1
        x = x.unflatten(1, (-1, units)).transpose(1, 2).flatten(0, 1)  # (B * units, T / units, C)
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        if self.q_stride > 1:
            x, q = pool_max(x, self.q_stride), pool_max(q, self.q_stride)
            tensors = encoded_pairs(x, q, k, v, self.encodings, pool_middle(positions, self.q_stride), positions)
        else:
            tensors = encoded(x, q, k, v, [(encoding, encoding.prepare(positions)) for encoding in self.encodings])
        out = attend(tensors, self.scale, NO_DROPOUT, self.fused_attn).transpose(1, 2).flatten(2)
        return self.proj(out.unflatten(0, (-1, units)).transpose(1, 2).flatten(1, 2))


class EncodedHieraBlock(HieraBlock):
    """A block that hands positions on to its attention, and after which conditional encodings may mix the tokens."""

    def forward(self, x: Tensor, context: AttentionContext | None = None) -> Tensor:
        """Return the tokens after the block for x (B, T, C) in unrolled order, whose context is `context`."""
        normed = self.norm1(x)
        if self.do_expand:
            x = self.expand(x, normed)
        inside = self.unit(context) if context is not None and self.attn.use_mask_unit_attn else context
        x = x + self.drop_path1(self.ls1(self.attn(normed, inside)))
        x = x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))
        return mix(x, self.mixers, self.pooled(context)) if len(self.mixers) else x

    def expand(self, x: Tensor, normed: Tensor) -> Tensor:
        """Return the shortcut of a block with more channels, pooled where it pools: (B, T / q_stride, dim_out)."""
        if self.proj is not None:
            return pool_max(self.proj(normed), self.attn.q_stride)
        return torch.cat([pool_max(x, self.attn.q_stride), pool_mean(x, self.attn.q_stride)], dim=-1)

    def pooled(self, context: AttentionContext | None) -> AttentionContext:
        """Return the context of the tokens after this block."""
        positions = positions_of(context, "block")
        return AttentionContext(pool_grid(positions, self.stride)) if self.attn.q_stride > 1 else context

    def unit(self, context: AttentionContext) -> AttentionContext:
        """Return the context of the tokens of one mask unit, in its own coordinates."""
        coords = context.positions.coords
        coords = coords if coords.ndim == 2 else coords[0]
        first = coords.unflatten(0, (self.attn.q_stride * self.attn.window_size, -1))[:, 0]
        axes = zip(first.unbind(-1), self.feat_shape, strict=True)
        return AttentionContext(Positions(torch.stack([axis % n for axis, n in axes], dim=-1), self.feat_shape))


class EncodedHiera(EncodedGridModel, Hiera):
    """A Hiera whose positions are encodings of this package."""

    def _pos_embed(self, x: Tensor) -> Tensor:
        return add_to_tokens(x, self.pos_embed_input, tuple(self.tokens_spatial_shape))

    def forward_stem(self, x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, AttentionContext]:
        """Return the tokens of pictures in unrolled order, (B, T, C), and where they are.

        Args:
            x: pictures (B, C, H, W).
            mask: (B, mask units), true where tokens stay, as many in every sample.
        """
        whole = None if mask is None else mask.view(x.shape[0], 1, *self.mask_spatial_shape)
        x = self.unroll(self._pos_embed(self.patch_embed(x, mask=whole)))
        positions = Positions.grid(tuple(self.tokens_spatial_shape), device=x.device).promote(x.dtype)
        coords = self.unroll(positions.coords.unsqueeze(0))
        if mask is None:
            coords = coords.squeeze(0)
        else:
            seen = mask.bool().tile(1, self.mu_size)  # (B, N), for timm's `unroll` orders units last
            x, coords = (t.expand(len(seen), -1, -1)[seen].unflatten(0, (len(seen), -1)) for t in (x, coords))
        return x, AttentionContext(replace(positions, coords=coords, is_grid=False))

    def forward_blocks(
        self, x: Tensor, context: AttentionContext, mask: Tensor | None, wanted: Collection[int], last: int
    ) -> tuple[Tensor, list[Tensor]]:
        """Return the tokens after block `last`, and those after the `wanted` ones, rolled up into (B, H, W, C)."""
        found = []
        for index, block in enumerate(list(self.blocks)[: last + 1]):
            x = checkpoint(block, x, context, use_reentrant=False) if self.grad_checkpointing else block(x, context)
            context = block.pooled(context)
            if index in wanted:
                found.append(self.reroll(x, index, mask=mask))
        return x, found

    def forward_features(self, x: Tensor, mask: Tensor | None = None, return_intermediates: bool = False):
        """Return the features (B, T, C) in unrolled order as timm does, and those of every stage if asked for."""
        if self.training and self.patch_drop_rate > 0:
            assert mask is None, "patch dropout draws the mask itself"
            mask = self.get_random_mask(x, mask_ratio=self.patch_drop_rate)
        wanted = self.stage_ends if return_intermediates else ()
        x, found = self.forward_blocks(*self.forward_stem(x, mask), mask, wanted, len(self.blocks))
        return (x, found) if return_intermediates else x

    def forward_intermediates(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = True,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
        coarse: bool = True,
    ):
        """Return features and intermediates as timm does."""
        if norm or output_fmt not in ("NCHW", "NHWC"):
            raise ValueError(f"norm must be False and output_fmt 'NCHW' or 'NHWC', got {norm} and {output_fmt!r}")
        wanted, last = feature_take_indices(len(self.stage_ends if coarse else self.blocks), indices)
        if coarse:
            wanted, last = [self.stage_ends[stage] for stage in wanted], self.stage_ends[last]
        last = last if stop_early else len(self.blocks)
        x, found = self.forward_blocks(*self.forward_stem(x, mask), mask, wanted, last)
        found = [tokens.permute(0, 3, 1, 2) for tokens in found] if output_fmt == "NCHW" else found
        return found if intermediates_only else (x, found)

    def no_weight_decay(self) -> set[str]:
        """Return every parameter of an encoding; timm names no others, and none without `pos_embed`."""
        return encoding_parameters(self)


class HieraHost(GridHost):
    """The family of Hiera on images."""

    name = "Hiera"
    models: ClassVar = {Hiera: EncodedHiera}
    parts: ClassVar = {HieraBlock: EncodedHieraBlock, MaskUnitAttention: EncodedMaskUnitAttention}

    def convert(self, model: Hiera) -> None:
        if len(model.tokens_spatial_shape) != 2:
            raise ValueError(
                f"only Hiera on pictures takes encodings; this one has tokens {model.tokens_spatial_shape}"
            )
        super().convert(model)

    def adopt_native_positions(self, model: Hiera) -> None:
        facts = self.input_facts(model)
        if model.pos_embed_win is not None:
            options = {"window_size": facts.window_size, "global_size": tuple(model.pos_embed.shape[-2:])}
            model.pos_embed_input.append(adopt_parameters(model, AbsWin, dim=facts.dim, **options))
        elif model.pos_embed is not None:
            table = adopt_parameters(model, Learned, dim=facts.dim, feat_shape=facts.feat_shape)
            model.pos_embed_input.append(table)
        pooled = 0
        for block in model.blocks:
            size = model.mask_unit_size if block.attn.use_mask_unit_attn else model.tokens_spatial_shape
            block.feat_shape = tuple(n // s**pooled for n, s in zip(size, model.q_stride, strict=True))
            block.stride = tuple(model.q_stride)
            pooled += block.attn.q_stride > 1

    def stages(self, model: Hiera) -> list[list[nn.Module]]:
        bounds = itertools.pairwise((0, *(end + 1 for end in model.stage_ends)))
        return [list(model.blocks[start:end]) for start, end in bounds]

    def seen_shapes(self, model: Hiera) -> list[tuple[int, int]]:
        return [block.feat_shape for block in model.blocks]

    def facts_of(self, block: nn.Module) -> dict[str, int]:
        heads = {"num_heads": block.attn.heads, "head_dim": block.attn.head_dim}
        return {"dim": block.dim_out, "dim_in": block.dim, **heads}

    def pools(self, block: nn.Module) -> bool:
        return block.attn.q_stride > 1

    def input_facts(self, model: Hiera) -> LayerFacts:
        return LayerFacts(
            dim=model.patch_embed.proj.out_channels,
            feat_shape=tuple(model.tokens_spatial_shape),
            window_size=tuple(model.mask_unit_size),
        )

    def bind_native(self, model: Hiera) -> None:
        bind_first(model.pos_embed_input, (AbsWin, Learned), model)


HOST = register_host(HieraHost())
