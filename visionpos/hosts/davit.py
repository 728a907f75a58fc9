"""timm's DaViT as host: its layers see windows; attention over channels between them has no tokens to tell apart."""

from __future__ import annotations

from typing import ClassVar

from timm.layers import register_notrace_module
from timm.models.davit import DaVit, SpatialBlock, WindowAttention
from torch import Tensor, nn

from ..encoding import LayerFacts
from .attention import NO_DROPOUT, attend
from .grids import AddPositionsToMap, EncodedGridModel, StagedHost, add_to_map, encode_grid, trained_size
from .host import register_host


@register_notrace_module
class EncodedWindowAttention(WindowAttention):
    """Window attention of DaViT with encodings, on tokens x (B * windows, N, C)."""

    def forward(self, x: Tensor) -> Tensor:
        """Return tokens (B * windows, N, C)."""
        if not len(self.encodings):
            return super().forward(x)
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        out = attend(encode_grid(self, x, self.window_size, q, k, v), self.scale, NO_DROPOUT, self.fused_attn)
        return self.proj(out.transpose(1, 2).flatten(2))


class EncodedSpatialBlock(SpatialBlock):
    """A block with attention in windows of x (B, C, H, W), after which conditional encodings may mix the whole map."""

    def forward(self, x: Tensor) -> Tensor:
        """Return the map (B, C, H, W)."""
        return add_to_map(super().forward(x), self.mixers)


class EncodedIdentity(AddPositionsToMap, nn.Identity):
    """The place of downsampling in the first stage, which has none: here input encodings are added."""


class EncodedDaVit(EncodedGridModel, DaVit):
    """A DaViT whose positions are encodings of this package."""


class DaVitHost(StagedHost):
    """The family of DaViT; its layers are the spatial blocks, and the convolutions in its blocks stay."""

    name = "DaVit (DaViT)"
    models: ClassVar = {DaVit: EncodedDaVit}

    def stages(self, model: DaVit) -> list[list[nn.Module]]:
        return [[m for m in stage.modules() if isinstance(m, SpatialBlock)] for stage in model.stages]

    def grids(self, model: DaVit) -> list[tuple[int, int]]:
        size = trained_size(model)
        return [tuple(-(-n // (4 * 2**stage)) for n in size) for stage in range(len(model.stages))]

    def seen_shape(self, block: nn.Module, grid: tuple[int, int]) -> tuple[int, int]:
        return tuple(block.window_size)

    def convert_parts(self, model: DaVit) -> None:
        for block in self.blocks(model):
            block.__class__, block.mixers = EncodedSpatialBlock, nn.ModuleList()
            block.attn.__class__, block.attn.encodings = EncodedWindowAttention, nn.ModuleList()
        model.stages[0].downsample.input_encodings = (model.pos_embed_input,)
        model.stages[0].downsample.__class__ = EncodedIdentity

    def input_facts(self, model: DaVit) -> LayerFacts:
        return LayerFacts(dim=model.stem.out_chs, feat_shape=self.grids(model)[0])


HOST = register_host(DaVitHost())
