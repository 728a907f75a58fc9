"""timm's PVT v2 as host: every token asks, and the keys are those of a smaller map, each in the middle of its cells."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

import torch.nn.functional as F
from timm.layers import register_notrace_module
from timm.models.pvt_v2 import Attention, Block, PyramidVisionTransformerStage, PyramidVisionTransformerV2
from torch import Tensor, nn

from ..encoding import LayerFacts
from ..positions import Positions
from .attention import attend, encoded, encoded_pairs
from .grids import AddPositions, EncodedGridModel, StagedHost, add_to_tokens, trained_size
from .host import adds_to_outputs, register_host


class PooledKeys:
    """Mixin for attention of all tokens x (B, H W, C) to a map that a convolution with stride, `sr`, made of them.

    Positions are pooled as tokens are: a key stands in the middle of the cells that it was made of.
    """

    def pool_tokens(self, x: Tensor) -> Tensor:
        """Return the tokens (B, M, C) that keys and values are made of, from a map x (B, C, H, W)."""
        return self.norm(self.sr(x).flatten(2).mT)

    def pool_coords(self, coords: Tensor) -> Tensor:
        """Return the coordinates (2, h, w) of these tokens, from those of the map, (2, H, W)."""
        return F.avg_pool2d(coords, self.sr.kernel_size)

    def forward(self, x: Tensor, feat_size: tuple[int, int]) -> Tensor:
        """Return tokens (B, H W, C)."""
        if not len(self.encodings):
            return super().forward(x, feat_size)
        positions = Positions.grid(tuple(feat_size), device=x.device).promote(x.dtype)
        y = x if self.sr is None else self.pool_tokens(x.mT.unflatten(2, tuple(feat_size)))  # (B, M, C)
        q = self.q(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # (B, heads, H W, head_dim)
        k, v = self.kv(y).unflatten(-1, (2, self.num_heads, -1)).permute(2, 0, 3, 1, 4)  # (B, heads, M, head_dim)
        if self.sr is None:
            tensors = encoded(x, q, k, v, [(encoding, encoding.prepare(positions)) for encoding in self.encodings])
        else:
            coords = self.pool_coords(positions.coords.mT.unflatten(1, tuple(feat_size))).flatten(1).mT  # (M, 2)
            keys = replace(positions, coords=coords, is_grid=False)
            tensors = encoded_pairs(x, q, k, v, self.encodings, positions, keys)
        out = attend(tensors, self.scale, self.attn_drop, self.fused_attn)  # (B, heads, H W, head_dim)
        return self.proj_drop(self.proj(out.transpose(1, 2).flatten(2)))


@register_notrace_module
class EncodedAttention(PooledKeys, Attention):
    """Attention of PVT v2 with encodings; the linear variant pools every map into one of 7 x 7 before `sr`."""

    def pool_tokens(self, x: Tensor) -> Tensor:
        return super().pool_tokens(x) if self.pool is None else self.act(super().pool_tokens(self.pool(x)))

    def pool_coords(self, coords: Tensor) -> Tensor:
        return super().pool_coords(coords) if self.pool is None else self.pool(coords)


class MixGrid:
    """Mixin for a block on x (B, H W, C) on a grid (H, W), after which conditional encodings may mix the tokens."""

    def forward(self, x: Tensor, feat_size: tuple[int, int]) -> Tensor:
        """Return the tokens (B, H W, C)."""
        return add_to_tokens(super().forward(x, feat_size), self.mixers, tuple(feat_size))


class EncodedBlock(MixGrid, Block):
    """A block of PVT v2."""


class EncodedStage(AddPositions, PyramidVisionTransformerStage):
    """The first stage, before which input encodings are added."""


class EncodedPVTv2(EncodedGridModel, PyramidVisionTransformerV2):
    """A PVT v2 whose positions are encodings of this package."""


class PooledKeysHost(StagedHost):
    """A family with pooled keys; what convolves or weighs values has no place where these are fewer than queries."""

    def pools(self, block: nn.Module) -> bool:
        """Return whether the attention of a block has other numbers of queries and of keys."""
        return getattr(block.attn, "sr", None) is not None

    def install(self, model: nn.Module, inputs, layers) -> None:
        for layer, (block, encodings) in enumerate(zip(self.blocks(model), layers, strict=True)):
            for encoding in filter(adds_to_outputs, encodings if self.pools(block) else ()):
                raise ValueError(
                    f"{encoding.name} works on the value of every token, but layer {layer} of this {self.name} pools "
                    "its tokens: leave out lepe and values=True there"
                )
        super().install(model, inputs, layers)


class PVTv2Host(PooledKeysHost):
    """The family of PVT v2, whose own hints of positions, the zeros around its convolutions, stay."""

    name = "PyramidVisionTransformerV2 (PVT v2)"
    models: ClassVar = {PyramidVisionTransformerV2: EncodedPVTv2}

    def stages(self, model: PyramidVisionTransformerV2) -> list[list[nn.Module]]:
        return [list(stage.blocks) for stage in model.stages]

    def grids(self, model: PyramidVisionTransformerV2) -> list[tuple[int, int]]:
        size = trained_size(model)
        return [tuple(-(-n // (4 * 2**stage)) for n in size) for stage in range(len(model.stages))]

    def convert_parts(self, model: PyramidVisionTransformerV2) -> None:
        for block in self.blocks(model):
            block.__class__, block.mixers = EncodedBlock, nn.ModuleList()
            block.attn.__class__, block.attn.encodings = EncodedAttention, nn.ModuleList()
        model.stages[0].input_encodings = (model.pos_embed_input,)
        model.stages[0].__class__ = EncodedStage

    def input_facts(self, model: PyramidVisionTransformerV2) -> LayerFacts:
        return LayerFacts(dim=model.patch_embed.proj.out_channels, feat_shape=self.grids(model)[0])


HOST = register_host(PVTv2Host())
