"""timm's LeViT as host: LeViT's table in every layer, also in those that keep every second query of each axis."""

from __future__ import annotations

from typing import ClassVar

from timm.layers import register_notrace_module
from timm.models.levit import (
    Attention,
    AttentionDownsample,
    Levit,
    LevitBlock,
    LevitDistilled,
    LevitDownsample,
    Stem8,
    Stem16,
)
from torch import Tensor, nn

from ..encoding import AttentionTensors, LayerFacts
from .attention import NO_DROPOUT, attend_logits
from .attention_biases import BiasesHost, EncodedBiases, adopt_biases, encode_every_second
from .grids import AddPositionsToMap, EncodedGridModel, add_to_map, add_to_tokens, encode_grid
from .host import register_host


def as_tokens(x: Tensor) -> Tensor:
    """Return tokens (B, N, C) of a map (B, C, H, W), or as they are."""
    return x.flatten(2).mT if x.ndim == 4 else x


def split_channels(layer: nn.Module, x: Tensor, *sizes: int) -> tuple[Tensor, ...]:
    """Return parts (B, heads, N, size) of tokens, or a map, whose channels are those of head after head."""
    return as_tokens(x).unflatten(-1, (layer.num_heads, -1)).transpose(1, 2).split(sizes, dim=-1)


def attend_and_project(layer: nn.Module, tensors: AttentionTensors, x: Tensor) -> Tensor:
    """Return the output of an attention layer with input x, in the form of x, by timm's steps."""
    logits = (tensors.q @ tensors.k.mT) * layer.scale  # (B, heads, queries, N)
    out = attend_logits(tensors, logits, NO_DROPOUT).transpose(1, 2).flatten(2)  # (B, queries, heads * val_dim)
    if x.ndim == 4:
        stride = getattr(layer, "stride", 1)
        out = out.mT.unflatten(2, x[:, :, ::stride, ::stride].shape[2:])
    return layer.proj(out)


@register_notrace_module
class EncodedAttention(EncodedBiases, Attention):
    """Self-attention of LeViT with encodings, on tokens x (B, N, C), or a map (B, C, H, W)."""

    def forward(self, x: Tensor) -> Tensor:
        """Return what x is, tokens or a map."""
        qkv = split_channels(self, self.qkv(x), self.key_dim, self.key_dim, self.val_dim)
        return attend_and_project(self, encode_grid(self, as_tokens(x), self.resolution, *qkv), x)


@register_notrace_module
class EncodedAttentionDownsample(EncodedBiases, AttentionDownsample):
    """Self-attention of LeViT with a query at every second token of each axis."""

    def forward(self, x: Tensor) -> Tensor:
        """Return what x is, of a quarter of the tokens."""
        k, v = split_channels(self, self.kv(x), self.key_dim, self.val_dim)
        (q,) = split_channels(self, self.q(x), self.key_dim)
        return attend_and_project(self, encode_every_second(self, as_tokens(x), self.resolution, q, k, v), x)


@register_notrace_module
class EncodedBlock(LevitBlock):
    """A block after which conditional encodings may mix the tokens."""

    def forward(self, x: Tensor) -> Tensor:
        """Return what x is, tokens (B, N, C) or a map (B, C, H, W)."""
        x = super().forward(x)
        return add_to_map(x, self.mixers) if x.ndim == 4 else add_to_tokens(x, self.mixers, self.attn.resolution)


@register_notrace_module
class EncodedDownsample(LevitDownsample):
    """A block that leaves a quarter of the tokens, after which conditional encodings may mix these."""

    @property
    def attn(self) -> nn.Module:
        """Return the attention, under the name that it has in other blocks."""
        return self.attn_downsample

    def forward(self, x: Tensor) -> Tensor:
        """Return what x is, tokens (B, N, C) or a map (B, C, H, W)."""
        x, grid = super().forward(x), tuple(-(-n // 2) for n in self.attn.resolution)
        return add_to_map(x, self.mixers) if x.ndim == 4 else add_to_tokens(x, self.mixers, grid)


class EncodedStem8(AddPositionsToMap, Stem8):
    """The convolutions before the first stage, to whose map input encodings are added."""


class EncodedStem16(AddPositionsToMap, Stem16):
    """The convolutions before the first stage, with patches of twice the size."""


class EncodedLevit(EncodedGridModel, Levit):
    """A LeViT whose positions are encodings of this package."""


class EncodedLevitDistilled(EncodedGridModel, LevitDistilled):
    """A LeViT with a second head, whose positions are encodings of this package."""


class LevitHost(BiasesHost):
    """The family of LeViT; the block that leaves a quarter of the tokens is the first layer of its stage."""

    name = "Levit (LeViT)"
    models: ClassVar = {Levit: EncodedLevit, LevitDistilled: EncodedLevitDistilled}
    parts: ClassVar = {
        LevitBlock: EncodedBlock,
        LevitDownsample: EncodedDownsample,
        Attention: EncodedAttention,
        AttentionDownsample: EncodedAttentionDownsample,
        Stem8: EncodedStem8,
        Stem16: EncodedStem16,
    }

    def stages(self, model: Levit) -> list[list[nn.Module]]:
        kinds = (LevitBlock, LevitDownsample)
        return [[module for module in stage.modules() if isinstance(module, kinds)] for stage in model.stages]

    def convert_parts(self, model: Levit) -> None:
        if type(model.stem) not in self.parts:
            raise ValueError(f"a LeViT takes encodings behind timm's Stem8 or Stem16, not {type(model.stem).__name__}")
        for block in self.blocks(model):
            block.__class__, block.mixers = self.parts[type(block)], nn.ModuleList()
            adopt_biases(block.attn, self.parts[type(block.attn)])
        model.stem.input_encodings = (model.pos_embed_input,)
        model.stem.__class__ = self.parts[type(model.stem)]

    def input_facts(self, model: Levit) -> LayerFacts:
        return LayerFacts(dim=model.embed_dim[0], feat_shape=tuple(self.blocks(model)[0].attn.resolution))

    def widths(self, block: nn.Module) -> dict[str, int]:
        inner = getattr(block.attn, "kv", None) or block.attn.qkv
        widths = {"dim_in": inner.linear.weight.shape[1], "value_dim": block.attn.val_attn_dim}
        return {"dim": block.mlp.ln2.linear.weight.shape[0], **widths}


HOST = register_host(LevitHost())
