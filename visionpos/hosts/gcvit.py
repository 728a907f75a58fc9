"""timm's GCViT as host: windows, in every second layer of which the queries are a summary of the whole picture.

The summary has the size of a window, and its queries have the coordinates of a window's tokens, as in timm's table.
"""

from __future__ import annotations

from typing import ClassVar

from timm.models.gcvit import GlobalContextVit, GlobalContextVitBlock, Stem, WindowAttentionGlobal
from torch import Tensor, nn

from ..encoding import LayerFacts, OneNode
from .attention import attend
from .grid_hosts import EncodedGridModel, StagedHost
from .grids import AddPositionsToMap, add_positions, encode_grid
from .host import register_host
from .rel_pos import RelPosInBlocks


class EncodedWindowAttention(OneNode, WindowAttentionGlobal):
    """Window attention of GCViT with encodings, on tokens x (B * windows, N, C)."""

    def forward(self, x: Tensor, q_global: Tensor | None = None) -> Tensor:
        """Return tokens (B * windows, N, C); q_global (B, h, w, C) are the queries of a layer without its own."""
        parts = self.qkv(x).unflatten(-1, (-1, self.num_heads, self.head_dim)).permute(2, 0, 3, 1, 4).unbind(0)
        if self.use_global and q_global is not None:
            q = q_global.repeat_interleave(x.shape[0] // q_global.shape[0], dim=0)  # of each window of a picture
            parts = (q.flatten(1, 2).unflatten(-1, (self.num_heads, -1)).transpose(1, 2), *parts)
        tensors = encode_grid(self, x, tuple(self.window_size), *parts)
        out = attend(tensors, self.scale, self.attn_drop, fused=False)  # (B * windows, heads, N, head_dim), timm's bits
        return self.proj_drop(self.proj(out.transpose(1, 2).flatten(2)))


class EncodedBlock(GlobalContextVitBlock):
    """A block on x (B, H, W, C), after which conditional encodings may mix the tokens of the whole grid."""

    def forward(self, x: Tensor, q_global: Tensor | None = None) -> Tensor:
        """Return the tokens (B, H, W, C)."""
        return add_positions(super().forward(x, q_global), self.mixers)


class EncodedStem(AddPositionsToMap, Stem):
    """The convolutions before the first stage, to whose map input encodings are added."""


class EncodedGCViT(EncodedGridModel, GlobalContextVit):
    """A GCViT whose positions are encodings of this package."""


class GCViTHost(RelPosInBlocks, StagedHost):
    """The family of GCViT; the tables of its windows keep their names."""

    name = "GlobalContextVit (GCViT)"
    since = "1.0.31"  # keeps the pictures of a batch apart
    models: ClassVar = {GlobalContextVit: EncodedGCViT}
    parts: ClassVar = {
        GlobalContextVitBlock: EncodedBlock,
        WindowAttentionGlobal: EncodedWindowAttention,
        Stem: EncodedStem,
    }
    input_part = "stem"

    def grids(self, model: GlobalContextVit) -> list[tuple[int, int]]:
        return [tuple(stage.feat_size) for stage in model.stages]

    def seen_shape(self, block: nn.Module, grid: tuple[int, int]) -> tuple[int, int]:
        return tuple(block.window_size)

    def input_facts(self, model: GlobalContextVit) -> LayerFacts:
        return LayerFacts(dim=model.stem.conv1.out_channels, feat_shape=self.grids(model)[0])


HOST = register_host(GCViTHost())
