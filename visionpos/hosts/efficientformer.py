"""timm's EfficientFormer as host: the last blocks have attention, with LeViT's table on a grid of 7 x 7 tokens."""

from __future__ import annotations

from typing import ClassVar

from timm.models.efficientformer import Attention, EfficientFormer, MetaBlock1d, Stem4
from torch import Tensor, nn

from ..encoding import LayerFacts, OneNode
from .attention_biases import BiasesHost, EncodedBiases, attend_by_steps, heads_of
from .grid_hosts import EncodedGridModel
from .grids import AddPositionsToMap, add_to_tokens, encode_grid
from .host import register_host

GRID = (7, 7)  # whatever the size of pictures, which must give 49 tokens: timm's table has no other


class EncodedAttention(OneNode, EncodedBiases, Attention):
    """Self-attention of EfficientFormer with encodings, on tokens x (B, 49, C)."""

    resolution = GRID

    def forward(self, x: Tensor) -> Tensor:
        """Return tokens (B, 49, C)."""
        qkv = heads_of(self, self.qkv(x)).split([self.key_dim, self.key_dim, self.val_dim], dim=-1)
        out = attend_by_steps(self, encode_grid(self, x, GRID, *qkv))  # (B, heads, 49, val_dim)
        return self.proj(out.transpose(1, 2).flatten(2))


class EncodedBlock(MetaBlock1d):
    """A block after which conditional encodings may mix the tokens."""

    @property
    def attn(self) -> nn.Module:
        """Return the attention, under the name that it has in other families."""
        return self.token_mixer

    def forward(self, x: Tensor) -> Tensor:
        """Return tokens (B, 49, C)."""
        return add_to_tokens(super().forward(x), self.mixers, GRID)


class EncodedStem(AddPositionsToMap, Stem4):
    """The convolutions before the first stage, to whose map input encodings are added."""


class EncodedEfficientFormer(EncodedGridModel, EfficientFormer):
    """An EfficientFormer whose positions are encodings of this package."""


class EfficientFormerHost(BiasesHost):
    """The family of EfficientFormer; blocks that pool have no tokens that look at each other, and stay."""

    name = "EfficientFormer"
    models: ClassVar = {EfficientFormer: EncodedEfficientFormer}
    parts: ClassVar = {MetaBlock1d: EncodedBlock, Attention: EncodedAttention, Stem4: EncodedStem}
    input_part = "stem"

    def stages(self, model: EfficientFormer) -> list[list[nn.Module]]:
        return [[block for block in stage.blocks if isinstance(block, MetaBlock1d)] for stage in model.stages]

    def input_facts(self, model: EfficientFormer) -> LayerFacts:
        halvings = sum(not isinstance(stage.downsample, nn.Identity) for stage in model.stages)
        return LayerFacts(dim=model.stem.conv2.out_channels, feat_shape=tuple(n * 2**halvings for n in GRID))

    def channels(self, block: nn.Module) -> dict[str, int]:
        return {"dim": block.attn.proj.out_features, "value_dim": block.attn.val_attn_dim}


HOST = register_host(EfficientFormerHost())
