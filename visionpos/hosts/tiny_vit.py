"""timm's TinyViT as host: attention in windows that are not shifted, with LeViT's table, between convolutions."""

from __future__ import annotations

from typing import ClassVar

from timm.models.tiny_vit import Attention, PatchEmbed, TinyVit, TinyVitBlock
from torch import Tensor, nn

from ..encoding import LayerFacts, OneNode
from .attention import NO_DROPOUT, attend
from .attention_biases import BiasesHost, EncodedBiases, heads_of
from .grid_hosts import EncodedGridModel, trained_size
from .grids import AddPositionsToMap, MixPositions, encode_grid
from .host import register_host


class EncodedAttention(OneNode, EncodedBiases, Attention):
    """Window attention of TinyViT with encodings, on tokens x (B * windows, N, C)."""

    def forward(self, x: Tensor) -> Tensor:
        """Return tokens (B * windows, N, C)."""
        x = self.norm(x)
        qkv = heads_of(self, self.qkv(x)).split([self.key_dim, self.key_dim, self.val_dim], dim=-1)
        out = attend(encode_grid(self, x, self.resolution, *qkv), self.scale, NO_DROPOUT, self.fused_attn)
        return self.proj(out.transpose(1, 2).flatten(2))


class EncodedBlock(OneNode, MixPositions, TinyVitBlock):
    """A block on x (B, H, W, C), after which conditional encodings may mix the tokens of the whole grid."""


class EncodedPatchEmbed(AddPositionsToMap, PatchEmbed):
    """The convolutions before the first stage, to whose map input encodings are added."""


class EncodedTinyVit(EncodedGridModel, TinyVit):
    """A TinyViT whose positions are encodings of this package."""


class TinyVitHost(BiasesHost):
    """The family of TinyViT; its layers are the blocks of all stages but the first, which has convolutions."""

    name = "TinyVit (TinyViT)"
    models: ClassVar = {TinyVit: EncodedTinyVit}
    parts: ClassVar = {TinyVitBlock: EncodedBlock, Attention: EncodedAttention, PatchEmbed: EncodedPatchEmbed}
    input_part = "patch_embed"

    def stages(self, model: TinyVit) -> list[list[nn.Module]]:
        return [[block for block in stage.blocks if isinstance(block, TinyVitBlock)] for stage in model.stages]

    def input_facts(self, model: TinyVit) -> LayerFacts:
        shape = tuple(-(-n // 4) for n in trained_size(model))
        return LayerFacts(dim=model.patch_embed.conv2.conv.out_channels, feat_shape=shape)

    def channels(self, block: nn.Module) -> dict[str, int]:
        return {"dim": block.dim, "value_dim": block.attn.out_dim}


HOST = register_host(TinyVitHost())
