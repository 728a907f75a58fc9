"""timm's DaViT as host: its layers see windows; attention over channels between them has no tokens to tell apart."""

from __future__ import annotations

from typing import ClassVar

from timm.models.davit import DaVit, SpatialBlock, WindowAttention
from torch import Tensor, nn

from ..encoding import LayerFacts, OneNode
from .attention import NO_DROPOUT, attend
from .grid_hosts import EncodedGridModel, StagedHost, blocks_in, trained_size
from .grids import AddPositionsToMap, MixMap, encode_grid
from .host import register_host


class EncodedWindowAttention(OneNode, WindowAttention):
    """Window attention of DaViT with encodings, on tokens x (B * windows, N, C)."""

    def forward(self, x: Tensor) -> Tensor:
        """Return tokens (B * windows, N, C)."""
        if not len(self.encodings):
            return super().forward(x)
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        out = attend(encode_grid(self, x, self.window_size, q, k, v), self.scale, NO_DROPOUT, self.fused_attn)
        return self.proj(out.transpose(1, 2).flatten(2))


class EncodedSpatialBlock(MixMap, SpatialBlock):
    """A block with attention in windows of x (B, C, H, W), after which conditional encodings may mix the whole map."""


class EncodedIdentity(AddPositionsToMap, nn.Identity):
    """The place of downsampling in the first stage, which has none: here input encodings are added."""


class EncodedDaVit(EncodedGridModel, DaVit):
    """A DaViT whose positions are encodings of this package."""


class DaVitHost(StagedHost):
    """The family of DaViT; its layers are the spatial blocks, and the convolutions in its blocks stay."""

    name = "DaVit (DaViT)"
    models: ClassVar = {DaVit: EncodedDaVit}
    parts: ClassVar = {
        SpatialBlock: EncodedSpatialBlock,
        WindowAttention: EncodedWindowAttention,
        nn.Identity: EncodedIdentity,
    }
    input_part = "stages.0.downsample"

    def stages(self, model: DaVit) -> list[list[nn.Module]]:
        return blocks_in(model.stages, SpatialBlock)

    def grids(self, model: DaVit) -> list[tuple[int, int]]:
        size = trained_size(model)
        return [tuple(-(-n // (4 * 2**stage)) for n in size) for stage in range(len(model.stages))]

    def seen_shape(self, block: nn.Module, grid: tuple[int, int]) -> tuple[int, int]:
        return tuple(block.window_size)

    def input_facts(self, model: DaVit) -> LayerFacts:
        return LayerFacts(dim=model.stem.out_chs, feat_shape=self.grids(model)[0])


HOST = register_host(DaVitHost())
