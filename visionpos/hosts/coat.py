"""timm's CoaT as host: its attention is factorised, which sees no pair of patches, in stages and across scales.

What mixes tokens, a PEG in timm's, acts in front of all layers of a scale; it belongs to the first of them.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from timm.layers import PatchEmbed
from timm.models.coat import CoaT, ConvPosEnc, FactorAttnConvRelPosEnc
from torch import Tensor, nn

from ..conditional.peg import PEG
from ..encoding import LayerFacts, OneNode
from .grid_hosts import EncodedGridModel, StagedHost
from .grids import add_to_tokens, encode_grid
from .host import mixes_tokens, refuse_pairs, register_host
from .native_encodings import ConvRelPosEnc
from .parameters import adopt_parameters, bind_first, bind_parameters


class EncodedAttention(OneNode, FactorAttnConvRelPosEnc):
    """Factorised attention, to whose output encodings may add mixed values; it is a layer and its attention in one."""

    @property
    def attn(self) -> nn.Module:
        """Return itself: a block of several scales has several of it."""
        return self

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        """Return tokens (B, 1 + N, C) of tokens x (B, 1 + N, C) on a grid (H, W)."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        out = self.scale * (q @ (k.softmax(dim=2).mT @ v))  # (B, heads, 1 + N, head_dim)
        mixed = encode_grid(self, x, tuple(size), q, k, v, num_prefix_tokens=1).output
        return self.proj_drop(self.proj((out if mixed is None else out + mixed).transpose(1, 2).flatten(2)))


class EncodedConvPosEnc(ConvPosEnc):
    """What comes before each layer of a scale; it has the parameters of the first PEG there, under timm's names."""

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        """Return the tokens (B, 1 + N, C) with their patches mixed."""
        mixers = self.mixers[0]  # of the scale's first layer; in a tuple, so that they are not registered here
        return torch.cat([x[:, :1], add_to_tokens(x[:, 1:], mixers, tuple(size))], dim=1) if len(mixers) else x


class EncodedPatchEmbed(PatchEmbed):
    """The patches of the first scale, to which input encodings are added."""

    def forward(self, x: Tensor) -> Tensor:
        """Return tokens (B, N, C)."""
        return add_to_tokens(super().forward(x), self.input_encodings[0], tuple(self.grid_size))


class EncodedCoaT(EncodedGridModel, CoaT):
    """A CoaT whose positions are encodings of this package."""


class CoaTHost(StagedHost):
    """The family of CoaT and CoaT-Lite; its layers are those of each scale, serial ones before parallel ones."""

    name = "CoaT"
    models: ClassVar = {CoaT: EncodedCoaT}
    parts: ClassVar = {FactorAttnConvRelPosEnc: EncodedAttention, PatchEmbed: EncodedPatchEmbed}
    input_part = "patch_embed1"

    def scales(self, model: CoaT) -> list[int]:
        """Return the numbers in timm's names of the scales that were not pruned."""
        return [scale for scale in (1, 2, 3, 4) if getattr(model, f"serial_blocks{scale}") is not None]

    def stages(self, model: CoaT) -> list[list[nn.Module]]:
        stages = []
        for scale in self.scales(model):
            parallel = [] if scale == 1 else model.parallel_blocks or []
            layers = [block.factoratt_crpe for block in getattr(model, f"serial_blocks{scale}")]
            stages.append([*layers, *(getattr(block, f"factoratt_crpe{scale}") for block in parallel)])
        return stages

    def grids(self, model: CoaT) -> list[tuple[int, int]]:
        return [tuple(getattr(model, f"patch_embed{scale}").grid_size) for scale in self.scales(model)]

    def adopt_native_positions(self, model: CoaT) -> None:
        for scale, layers in zip(self.scales(model), self.stages(model), strict=True):
            cpe, crpe = getattr(model, f"cpe{scale}"), getattr(model, f"crpe{scale}")
            own = ConvRelPosEnc(crpe)
            bind_parameters(own, crpe)
            for attn in layers:
                attn.encodings.append(own)
            layers[0].mixers.append(adopt_parameters(cpe, PEG, dim=own.dim))
            cpe.__class__, cpe.mixers = EncodedConvPosEnc, (layers[0].mixers,)

    def install(self, model: CoaT, inputs, layers) -> None:
        refuse_pairs(layers, "CoaT is factorised")
        first_layers = self.mixing_layers(model)
        for index in (index for index, new in enumerate(layers) if any(map(mixes_tokens, new))):
            if index not in first_layers:
                raise ValueError(
                    "what mixes tokens acts in front of all layers of a scale and is asked for in the first, one of "
                    f"layers {', '.join(map(str, first_layers))}; got {index}"
                )
        super().install(model, inputs, layers)

    def bind_native(self, model: CoaT) -> None:
        for scale, layers in zip(self.scales(model), self.stages(model), strict=True):
            bind_first(layers[0].mixers, PEG, getattr(model, f"cpe{scale}"))
            bind_first(layers[0].encodings, ConvRelPosEnc, getattr(model, f"crpe{scale}"))

    def input_facts(self, model: CoaT) -> LayerFacts:
        return LayerFacts(dim=model.embed_dims[0], feat_shape=self.grids(model)[0])

    def facts_of(self, block: nn.Module) -> dict[str, int]:
        return {**super().facts_of(block), "num_prefix_tokens": 1}


HOST = register_host(CoaTHost())
