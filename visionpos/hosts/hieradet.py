"""timm's HieraDet as host: SAM 2's encoder. A pooled query stands in the middle of the tokens that it was made of."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import ClassVar

import torch.nn.functional as F
from timm.models.hieradet_sam2 import HieraDet, MultiScaleAttention, MultiScaleBlock
from torch import Tensor, nn

from ..encoding import LayerFacts, OneNode
from ..input.abs_win import AbsWin
from ..positions import Positions
from .attention import NO_DROPOUT, attend, encoded_pairs
from .grid_hosts import EncodedGridModel, StagedHost, trained_size
from .grids import MixPositions, add_positions, encode_grid
from .host import register_host
from .parameters import adopt_parameters, bind_first

NAMES = {"pos_embed_win": "pos_embed_window"}


class EncodedMultiScaleAttention(OneNode, MultiScaleAttention):
    """Self-attention of HieraDet with encodings, on x (B, H, W, C): the grid, or a window of it."""

    def pool(self, x: Tensor) -> Tensor:
        """Return the maxima (B, C, h w) of maps x (B, C, H, W)."""
        return self.q_pool(x).flatten(2)

    def forward(self, x: Tensor) -> Tensor:
        """Return tokens (B, h, w, dim_out); h and w are H and W, or smaller where queries are pooled."""
        if not len(self.encodings):
            return super().forward(x)
        grid, tokens = tuple(x.shape[1:3]), x.flatten(1, 2)
        q, k, v = self.qkv(tokens).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        if self.q_pool is None:
            tensors = encode_grid(self, tokens, grid, q, k, v)
        else:
            keys = Positions.grid(grid, device=x.device).promote(x.dtype)
            stride = self.q_pool.stride
            coords = F.avg_pool2d(keys.coords.mT.unflatten(1, grid), stride).flatten(1).mT.contiguous()  # (h w, 2)
            q = self.pool(q.mT.flatten(1, 2).unflatten(2, grid)).unflatten(1, (self.num_heads, -1)).mT
            tokens = self.pool(x.permute(0, 3, 1, 2)).mT  # (B, h w, C)
            queries = replace(keys, coords=coords, is_grid=False)
            tensors = encoded_pairs(tokens, q, k, v, self.encodings, queries, keys)
            grid = tuple(n // s for n, s in zip(grid, stride, strict=True))
        out = attend(tensors, self.scale, NO_DROPOUT, self.fused_attn).transpose(1, 2)  # (B, h w, heads, head_dim)
        return self.proj(out.flatten(2).unflatten(1, grid))


class EncodedMultiScaleBlock(MixPositions, MultiScaleBlock):
    """A block on x (B, H, W, C), after which conditional encodings may mix the whole map."""


class EncodedHieraDet(EncodedGridModel, HieraDet):
    """A HieraDet whose positions are encodings of this package."""

    def _pos_embed(self, x: Tensor) -> Tensor:
        return add_positions(x, self.pos_embed_input)


class HieraDetHost(StagedHost):
    """The family of HieraDet. Its tables keep their names; timm resizes them in float32, which differs by rounding."""

    name = "HieraDet (SAM 2)"
    models: ClassVar = {HieraDet: EncodedHieraDet}
    parts: ClassVar = {MultiScaleBlock: EncodedMultiScaleBlock, MultiScaleAttention: EncodedMultiScaleAttention}

    def stages(self, model: HieraDet) -> list[list[nn.Module]]:
        bounds = itertools.pairwise((0, *(end + 1 for end in model.stage_ends)))
        return [list(model.blocks[a:b]) for a, b in bounds if a < len(model.blocks)]  # pruned, it has not all of them

    def grids(self, model: HieraDet) -> list[tuple[int, int]]:
        shape, grids = self.input_facts(model).feat_shape, []
        for first, *_ in self.stages(model):
            shape = tuple(n // s for n, s in zip(shape, first.q_stride or (1, 1), strict=True))
            grids.append(shape)
        return grids

    def seen_shape(self, block: nn.Module, grid: tuple[int, int]) -> tuple[int, int]:
        return tuple(block.window_size) if block.is_windowed else grid  # where queries are pooled, there are windows

    def adopt_native_positions(self, model: HieraDet) -> None:
        facts = self.input_facts(model)
        options = {"window_size": facts.window_size, "global_size": model.global_pos_size, "antialias": False}
        model.pos_embed_input.append(adopt_parameters(model, AbsWin, None, NAMES, dim=facts.dim, **options))

    def pools(self, block: nn.Module) -> bool:
        return bool(block.q_stride)

    def bind_native(self, model: HieraDet) -> None:
        tables = [each for each in model.pos_embed_input if isinstance(each, AbsWin) and not each.antialias]
        bind_first([table for table in tables if table.interpolation == "bicubic"], AbsWin, model, names=NAMES)

    def input_facts(self, model: HieraDet) -> LayerFacts:
        strides = zip(trained_size(model), model.patch_embed.proj.stride, strict=True)
        shape, window = tuple(-(-n // s) for n, s in strides), (model.window_spec[0],) * 2
        return LayerFacts(dim=model.patch_embed.proj.out_channels, feat_shape=shape, window_size=window)

    def facts_of(self, block: nn.Module) -> dict[str, int]:
        return {**super().facts_of(block), "dim_in": block.dim}


HOST = register_host(HieraDetHost())
