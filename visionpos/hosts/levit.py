"""timm's LeViT as host: LeViT's table in every layer, also in those that keep every second query of each axis."""

from __future__ import annotations

from typing import ClassVar

from timm.models import levit as timms
from torch import Tensor, nn

from ..encoding import AttentionTensors, LayerFacts, OneNode
from .attention_biases import BiasesHost, EncodedBiases, as_tokens, attend_by_steps, encode_every_second, heads_of
from .grid_hosts import EncodedGridModel, blocks_in
from .grids import AddPositionsToMap, add_to_map, add_to_tokens, encode_grid
from .host import register_host


def attend_and_project(layer: nn.Module, tensors: AttentionTensors, x: Tensor) -> Tensor:
    """Return the output of an attention layer with input x, in the form of x, by timm's steps."""
    out = attend_by_steps(layer, tensors).transpose(1, 2).flatten(2)  # (B, queries, heads * val_dim)
    if x.ndim == 4:
        stride = getattr(layer, "stride", 1)
        out = out.mT.unflatten(2, x[:, :, ::stride, ::stride].shape[2:])
    return layer.proj(out)


class EncodedAttention(OneNode, EncodedBiases, timms.Attention):
    """Self-attention of LeViT with encodings, on tokens x (B, N, C), or a map (B, C, H, W)."""

    def forward(self, x: Tensor) -> Tensor:
        """Return what x is, tokens or a map."""
        qkv = heads_of(self, self.qkv(x)).split([self.key_dim, self.key_dim, self.val_dim], dim=-1)
        return attend_and_project(self, encode_grid(self, as_tokens(x), self.resolution, *qkv), x)


class EncodedAttentionDownsample(OneNode, EncodedBiases, timms.AttentionDownsample):
    """Self-attention of LeViT with a query at every second token of each axis."""

    def forward(self, x: Tensor) -> Tensor:
        """Return what x is, of a quarter of the tokens."""
        q, (k, v) = heads_of(self, self.q(x)), heads_of(self, self.kv(x)).split([self.key_dim, self.val_dim], dim=-1)
        return attend_and_project(self, encode_every_second(self, as_tokens(x), self.resolution, q, k, v), x)


class MixEither:
    """Mixin for a block after which conditional encodings may mix the tokens (B, N, C), or the map (B, C, H, W)."""

    def forward(self, x: Tensor) -> Tensor:
        """Return what x is, tokens or a map."""
        x, stride = super().forward(x), getattr(self.attn, "stride", 1)
        if x.ndim == 4:
            return add_to_map(x, self.mixers)
        return add_to_tokens(x, self.mixers, tuple(-(-n // stride) for n in self.attn.resolution))


class EncodedBlock(OneNode, MixEither, timms.LevitBlock):
    """A block of a converted LeViT."""


class EncodedDownsample(OneNode, MixEither, timms.LevitDownsample):
    """A block that leaves a quarter of the tokens, after which conditional encodings may mix these."""

    @property
    def attn(self) -> nn.Module:
        """Return the attention, under the name that it has in other blocks."""
        return self.attn_downsample


class EncodedStem8(AddPositionsToMap, timms.Stem8):
    """The convolutions before the first stage, to whose map input encodings are added."""


class EncodedStem16(AddPositionsToMap, timms.Stem16):
    """The convolutions before the first stage, with patches of twice the size."""


class EncodedLevit(EncodedGridModel, timms.Levit):
    """A LeViT whose positions are encodings of this package."""


class EncodedLevitDistilled(EncodedGridModel, timms.LevitDistilled):
    """A LeViT with a second head, whose positions are encodings of this package."""


class LevitHost(BiasesHost):
    """The family of LeViT; the block that leaves a quarter of the tokens is the first layer of its stage."""

    name = "Levit (LeViT)"
    models: ClassVar = {timms.Levit: EncodedLevit, timms.LevitDistilled: EncodedLevitDistilled}
    parts: ClassVar = {
        timms.LevitBlock: EncodedBlock,
        timms.LevitDownsample: EncodedDownsample,
        timms.Attention: EncodedAttention,
        timms.AttentionDownsample: EncodedAttentionDownsample,
        timms.Stem8: EncodedStem8,
        timms.Stem16: EncodedStem16,
    }
    input_part = "stem"

    def stages(self, model: timms.Levit) -> list[list[nn.Module]]:
        return blocks_in(model.stages, timms.LevitBlock, timms.LevitDownsample)

    def input_facts(self, model: timms.Levit) -> LayerFacts:
        return LayerFacts(dim=model.embed_dim[0], feat_shape=tuple(self.blocks(model)[0].attn.resolution))

    def channels(self, block: nn.Module) -> dict[str, int]:
        inner = getattr(block.attn, "kv", None) or block.attn.qkv
        widths = {"dim_in": inner.linear.weight.shape[1], "value_dim": block.attn.val_attn_dim}
        return {"dim": block.mlp.ln2.linear.weight.shape[0], **widths}


HOST = register_host(LevitHost())
