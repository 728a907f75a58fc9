"""timm's EfficientViT of MSRA as host: LeViT's table in windows, and heads that work one after the other."""

from __future__ import annotations

from functools import partial
from typing import ClassVar

import torch
from timm.models.efficientvit_msra import CascadedGroupAttention, EfficientVitBlock, EfficientVitMsra, PatchEmbedding
from torch import Tensor, nn

from ..encoding import AttentionTensors, LayerFacts, OneNode
from ..positions import Positions
from .attention import NO_DROPOUT, attend_logits, encoded
from .attention_biases import BiasesHost, EncodedBiases
from .grid_hosts import ResizedGridModel, trained_size
from .grids import AddPositionsToMap, MixMap
from .host import register_host


def take_head(tensors: AttentionTensors, head: int) -> AttentionTensors:
    """Return the tensors of one head, with a single one on their second axis, after all encodings."""

    def value_term(term, probabilities: Tensor) -> Tensor:
        return term(probabilities.expand(-1, heads, -1, -1))[:, head : head + 1]

    heads = tensors.q.shape[1]
    tensors.value_terms = [partial(value_term, term) for term in tensors.value_terms]
    for name in ("q", "k", "v", "bias", "output"):
        tensor = getattr(tensors, name)
        setattr(tensors, name, tensor if tensor is None or tensor.shape[1] == 1 else tensor[:, head : head + 1])
    return tensors


class EncodedAttention(OneNode, EncodedBiases, CascadedGroupAttention):
    """Attention of windows x (B * windows, C, h, w) with encodings; a head gets what the one before it returned.

    Encodings act as if all heads had the queries, keys and values of the head at hand, of which its own are kept.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Return windows (B * windows, C, h, w)."""
        positions = Positions.grid(tuple(x.shape[2:]), device=x.device).promote(x.dtype)
        prepared = [(encoding, encoding.prepare(positions)) for encoding in self.encodings]
        parts, feat, out = x.chunk(self.num_heads, dim=1), 0, []
        for head, part in enumerate(parts):
            q, k, v = self.qkvs[head](feat + part).split([self.key_dim, self.key_dim, self.val_dim], dim=1)
            qkv = (
                each.flatten(2).mT.unsqueeze(1).expand(-1, self.num_heads, -1, -1) for each in (self.dws[head](q), k, v)
            )
            tensors = take_head(encoded(x.flatten(2).mT, *qkv, prepared), head)  # (B * windows, 1, h w, channels) each
            feat = attend_logits(tensors, (tensors.q * self.scale) @ tensors.k.mT, NO_DROPOUT)
            feat = feat.squeeze(1).mT.unflatten(2, x.shape[2:])
            out.append(feat)
        return self.proj(torch.cat(out, dim=1))

    def set_resolution(self, resolution: int) -> None:
        """Work on windows of another size from now on; the model resizes their tables."""
        self.resolution = resolution


class EncodedBlock(MixMap, EfficientVitBlock):
    """A block after which conditional encodings may mix the tokens of the map."""

    @property
    def attn(self) -> nn.Module:
        """Return the attention, under the name that it has in other families."""
        return self.mixer.m.attn


class EncodedPatchEmbedding(AddPositionsToMap, PatchEmbedding):
    """The convolutions before the first stage, to whose map input encodings are added."""


class EncodedEfficientVitMsra(ResizedGridModel, EfficientVitMsra):
    """An EfficientViT whose positions are encodings of this package."""


class EfficientVitMsraHost(BiasesHost):
    """The family of EfficientViT by MSRA."""

    name = "EfficientVitMsra (EfficientViT)"
    since = "1.0.31"  # takes pictures that are not square
    models: ClassVar = {EfficientVitMsra: EncodedEfficientVitMsra}
    parts: ClassVar = {
        EfficientVitBlock: EncodedBlock,
        CascadedGroupAttention: EncodedAttention,
        PatchEmbedding: EncodedPatchEmbedding,
    }
    input_part = "patch_embed"

    def input_facts(self, model: EfficientVitMsra) -> LayerFacts:
        shape = tuple(-(-n // 16) for n in trained_size(model))
        return LayerFacts(dim=model.patch_embed.conv4.conv.out_channels, feat_shape=shape)

    def channels(self, block: nn.Module) -> dict[str, int]:
        attn, last = block.attn, block.ffn1.m.pw2
        return {"dim": last.bn.num_features, "value_dim": attn.val_dim * attn.num_heads}


HOST = register_host(EfficientVitMsraHost())
