"""timm's Twins as host: PCPVT and SVT, with windows or keys of a smaller map; the PEG of a stage is an encoding."""

from __future__ import annotations

from typing import ClassVar

import torch.nn.functional as F
from timm.models.twins import Block, GlobalSubSampleAttn, LocallyGroupedAttn, PatchEmbed, PosConv, Twins
from torch import Tensor, nn

from ..conditional.peg import PEG
from ..encoding import LayerFacts, OneNode
from ..positions import Positions
from ..windows import window_partition, window_reverse
from .attention import AttentionContext, prepare_encodings, self_attention, split_heads
from .grid_hosts import EncodedGridModel, StagedHost
from .grids import AddPositionsToTokens
from .host import register_host
from .parameters import adopt_parameters, bind_first
from .pooled_keys import MixGrid, PooledKeys

NAMES = {"proj": "0"}  # of PEG's convolution in `pos_block.*.proj`


class EncodedLocallyGroupedAttn(OneNode, LocallyGroupedAttn):
    """Attention in windows with encodings, on tokens x (B, H W, C); a grid that they do not divide is padded."""

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        """Return tokens (B, H W, C)."""
        if not len(self.encodings):
            return super().forward(x, size)
        (height, width), window = size, (self.ws, self.ws)
        x = F.pad(x.unflatten(1, tuple(size)), (0, 0, 0, -width % self.ws, 0, -height % self.ws))  # (B, H', W', C)
        windows = window_partition(x, window)  # (B * windows, N, C)
        context = AttentionContext(Positions.grid(window, device=x.device).promote(x.dtype))
        qkv = self.qkv(windows).unflatten(-1, (3, self.num_heads, -1))  # (B * windows, N, 3, heads, head_dim)
        out = self_attention(self, windows, *split_heads(self, qkv, prepare_encodings(self, context)))
        return window_reverse(out, window, tuple(x.shape[1:3]))[:, :height, :width].flatten(1, 2)


class EncodedGlobalSubSampleAttn(OneNode, PooledKeys, GlobalSubSampleAttn):
    """Attention of all tokens to a smaller map, with encodings."""

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        """Return tokens (B, H W, C)."""
        return super().forward(x, size)


class EncodedBlock(MixGrid, Block):
    """A block of Twins."""

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        """Return the tokens (B, H W, C)."""
        return super().forward(x, size)


class EncodedPatchEmbed(AddPositionsToTokens, PatchEmbed):
    """The patches of the first stage, to which input encodings are added."""


class EncodedPosConv(PosConv):
    """The holder of a convolution that acts as an encoding behind the first block of its stage, and not here."""

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        """Return x."""
        return x


class EncodedTwins(EncodedGridModel, Twins):
    """A Twins whose positions are encodings of this package."""


class TwinsHost(StagedHost):
    """The family of Twins; the PEG of a stage keeps its name, `pos_block.*.proj.0`."""

    name = "Twins (PCPVT, SVT)"
    models: ClassVar = {Twins: EncodedTwins}
    parts: ClassVar = {
        Block: EncodedBlock,
        LocallyGroupedAttn: EncodedLocallyGroupedAttn,
        GlobalSubSampleAttn: EncodedGlobalSubSampleAttn,
        PatchEmbed: EncodedPatchEmbed,
    }
    input_part = "patch_embeds.0"

    def stages(self, model: Twins) -> list[list[nn.Module]]:
        return [list(blocks) for blocks in model.blocks]

    def grids(self, model: Twins) -> list[tuple[int, int]]:
        return [(embed.H, embed.W) for embed in model.patch_embeds]

    def seen_shape(self, block: nn.Module, grid: tuple[int, int]) -> tuple[int, int]:
        return (block.attn.ws,) * 2 if isinstance(block.attn, LocallyGroupedAttn) else grid

    def pools(self, block: nn.Module) -> bool:
        return getattr(block.attn, "sr", None) is not None

    def adopt_native_positions(self, model: Twins) -> None:
        for blocks, conv in zip(model.blocks, model.pos_block, strict=True):
            conv.__class__ = EncodedPosConv
            peg = adopt_parameters(conv.proj, PEG, names=NAMES, dim=conv.proj[0].out_channels)
            blocks[0].mixers.append(peg)

    def bind_native(self, model: Twins) -> None:
        for blocks, conv in zip(model.blocks, model.pos_block, strict=True):
            bind_first(blocks[0].mixers, PEG, conv.proj, names=NAMES)

    def input_facts(self, model: Twins) -> LayerFacts:
        return LayerFacts(dim=model.embed_dims[0], feat_shape=self.grids(model)[0])


HOST = register_host(TwinsHost())
