"""timm's EfficientFormerV2 as host: LeViT's table before a mixture of heads, on maps, also where queries are fewer."""

from __future__ import annotations

from typing import ClassVar

from timm.models.efficientformer_v2 import (
    Attention2d,
    Attention2dDownsample,
    Downsample,
    EfficientFormerV2,
    EfficientFormerV2Block,
    Stem4,
)
from torch import Tensor, nn

from ..encoding import LayerFacts, OneNode
from ..positions import Positions
from .attention import attend_logits, encoded
from .attention_biases import BiasesHost, EncodedBiases, attend_by_steps, encode_every_second, heads_of
from .grid_hosts import EncodedGridModel, trained_size
from .grids import AddPositionsToMap, MixMap
from .host import register_host


class EncodedAttention(OneNode, EncodedBiases, Attention2d):
    """Talking-heads attention of EfficientFormerV2 with encodings, on a map x (B, C, H, W).

    y = W(softmax(L(scale q k^T + b) + b')) v, where L and W mix the heads. The table b is the model's own, and every
    other bias b' is added behind L, as in CaiT: mixed by L, heads would lose what an encoding gives each of them.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Return a map (B, C, H, W)."""
        x = x if self.stride_conv is None else self.stride_conv(x)
        values = self.v(x)
        q, k, v = (heads_of(self, part) for part in (self.q(x), self.k(x), values))
        positions = Positions.grid(self.resolution, device=x.device).promote(x.dtype)
        prepared = [(encoding, encoding.prepare(positions)) for encoding in self.encodings]
        own = [table for encoding, table in prepared if encoding.owner is self]
        others = [(encoding, table) for encoding, table in prepared if encoding.owner is not self]
        tensors = encoded(x.flatten(2).mT, q, k, v, others)
        logits = sum(own, start=(tensors.q @ tensors.k.mT) * self.scale)  # (B, heads, N, N)
        logits = self.talking_head1(logits.to(x.dtype))
        out = attend_logits(tensors, logits, lambda p: self.talking_head2(p.to(x.dtype)))
        out = out.mT.reshape(values.shape) + self.v_local(values)
        return self.proj(self.act(out if self.upsample is None else self.upsample(out)))


class EncodedAttentionDownsample(OneNode, EncodedBiases, Attention2dDownsample):
    """Attention with a query at every second token of each axis."""

    def forward(self, x: Tensor) -> Tensor:
        """Return a map of a quarter of the tokens."""
        values = self.v(x)
        local = self.v_local(values)
        q, k, v = (heads_of(self, part) for part in (self.q(x), self.k(x), values))
        tensors = encode_every_second(self, x.flatten(2).mT, self.resolution, q, k, v)
        out = attend_by_steps(self, tensors)
        return self.proj(self.act(out.mT.reshape(local.shape) + local))


class EncodedBlock(MixMap, EfficientFormerV2Block):
    """A block after which conditional encodings may mix the tokens of the map."""

    @property
    def attn(self) -> nn.Module:
        """Return the attention, under the name that it has in other families."""
        return self.token_mixer


class EncodedDownsample(MixMap, Downsample):
    """Attention beside the convolution between two stages, after which conditional encodings may mix the map."""


class EncodedStem(AddPositionsToMap, Stem4):
    """The convolutions before the first stage, to whose map input encodings are added."""


class EncodedEfficientFormerV2(EncodedGridModel, EfficientFormerV2):
    """An EfficientFormerV2 whose positions are encodings of this package."""


class EfficientFormerV2Host(BiasesHost):
    """The family of EfficientFormerV2; its layers are the blocks, and the ways between stages, that have attention."""

    name = "EfficientFormerV2"
    models: ClassVar = {EfficientFormerV2: EncodedEfficientFormerV2}
    parts: ClassVar = {
        EfficientFormerV2Block: EncodedBlock,
        Downsample: EncodedDownsample,
        Attention2d: EncodedAttention,
        Attention2dDownsample: EncodedAttentionDownsample,
        Stem4: EncodedStem,
    }
    input_part = "stem"

    def stages(self, model: EfficientFormerV2) -> list[list[nn.Module]]:
        parts = [[stage.downsample, *stage.blocks] for stage in model.stages]
        return [
            [part for part in stage if (getattr(part, "attn", None) or getattr(part, "token_mixer", None)) is not None]
            for stage in parts
        ]

    def input_facts(self, model: EfficientFormerV2) -> LayerFacts:
        shape = tuple(-(-n // 4) for n in trained_size(model))
        return LayerFacts(dim=model.stem.conv2.conv.out_channels, feat_shape=shape)

    def channels(self, block: nn.Module) -> dict[str, int]:
        proj, value = block.attn.proj.conv, block.attn.v.conv
        return {"dim": proj.out_channels, "dim_in": value.in_channels, "value_dim": value.out_channels}


HOST = register_host(EfficientFormerV2Host())
