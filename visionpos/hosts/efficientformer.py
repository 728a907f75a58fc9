"""timm's EfficientFormer as host: the last blocks have attention, with LeViT's table on a grid of 7 x 7 tokens."""

from __future__ import annotations

from typing import ClassVar

from timm.layers import register_notrace_module
from timm.models.efficientformer import Attention, EfficientFormer, MetaBlock1d, Stem4
from torch import Tensor, nn

from ..encoding import LayerFacts
from .attention import NO_DROPOUT, attend_logits
from .attention_biases import BiasesHost, EncodedBiases, adopt_biases
from .grids import AddPositionsToMap, EncodedGridModel, add_to_tokens, encode_grid
from .host import register_host

GRID = (7, 7)  # whatever the size of pictures, which must give 49 tokens: timm's table has no other


@register_notrace_module
class EncodedAttention(EncodedBiases, Attention):
    """Self-attention of EfficientFormer with encodings, on tokens x (B, 49, C)."""

    def forward(self, x: Tensor) -> Tensor:
        """Return tokens (B, 49, C)."""
        qkv = self.qkv(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # (B, heads, 49, channels)
        tensors = encode_grid(self, x, GRID, *qkv.split([self.key_dim, self.key_dim, self.val_dim], dim=-1))
        out = attend_logits(tensors, (tensors.q @ tensors.k.mT) * self.scale, NO_DROPOUT)
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

    def stages(self, model: EfficientFormer) -> list[list[nn.Module]]:
        return [[block for block in stage.blocks if isinstance(block, MetaBlock1d)] for stage in model.stages]

    def convert_parts(self, model: EfficientFormer) -> None:
        for block in self.blocks(model):
            block.__class__, block.mixers = EncodedBlock, nn.ModuleList()
            block.attn.resolution = GRID
            adopt_biases(block.attn, EncodedAttention)
        model.stem.input_encodings = (model.pos_embed_input,)
        model.stem.__class__ = EncodedStem

    def input_facts(self, model: EfficientFormer) -> LayerFacts:
        halvings = sum(not isinstance(stage.downsample, nn.Identity) for stage in model.stages)
        return LayerFacts(dim=model.stem.conv2.out_channels, feat_shape=tuple(n * 2**halvings for n in GRID))

    def widths(self, block: nn.Module) -> dict[str, int]:
        return {"dim": block.attn.proj.out_features, "value_dim": block.attn.val_attn_dim}


HOST = register_host(EfficientFormerHost())
