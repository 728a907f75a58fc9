"""timm's PVT v2 as host: every token asks, and the keys are those of a smaller map, each in the middle of its cells."""

from __future__ import annotations

from typing import ClassVar

from timm.models.pvt_v2 import Attention, Block, PyramidVisionTransformerStage, PyramidVisionTransformerV2
from torch import Tensor, nn

from ..encoding import LayerFacts, OneNode
from .grid_hosts import EncodedGridModel, StagedHost, trained_size
from .grids import AddPositions
from .host import register_host
from .pooled_keys import MixGrid, PooledKeys


class EncodedAttention(OneNode, PooledKeys, Attention):
    """Attention of PVT v2 with encodings; the linear variant pools every map into one of 7 x 7 before `sr`."""

    def pool_tokens(self, x: Tensor) -> Tensor:
        return super().pool_tokens(x) if self.pool is None else self.act(super().pool_tokens(self.pool(x)))

    def pool_coords(self, coords: Tensor) -> Tensor:
        return super().pool_coords(coords) if self.pool is None else self.pool(coords)


class EncodedBlock(MixGrid, Block):
    """A block of PVT v2."""


class EncodedStage(AddPositions, PyramidVisionTransformerStage):
    """The first stage, before which input encodings are added."""


class EncodedPVTv2(EncodedGridModel, PyramidVisionTransformerV2):
    """A PVT v2 whose positions are encodings of this package."""


class PVTv2Host(StagedHost):
    """The family of PVT v2, whose own hints of positions, the zeros around its convolutions, stay."""

    name = "PyramidVisionTransformerV2 (PVT v2)"
    models: ClassVar = {PyramidVisionTransformerV2: EncodedPVTv2}
    parts: ClassVar = {Block: EncodedBlock, Attention: EncodedAttention, PyramidVisionTransformerStage: EncodedStage}
    input_part = "stages.0"

    def grids(self, model: PyramidVisionTransformerV2) -> list[tuple[int, int]]:
        size = trained_size(model)
        return [tuple(-(-n // (4 * 2**stage)) for n in size) for stage in range(len(model.stages))]

    def pools(self, block: nn.Module) -> bool:
        return block.attn.sr is not None

    def input_facts(self, model: PyramidVisionTransformerV2) -> LayerFacts:
        return LayerFacts(dim=model.patch_embed.proj.out_channels, feat_shape=self.grids(model)[0])


HOST = register_host(PVTv2Host())
