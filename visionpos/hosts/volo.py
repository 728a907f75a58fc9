"""timm's VOLO as host: encodings act in its transformer blocks, on the grid behind the outlookers, and in front of it.

Outlook attention reads its weights off one token, and class attention asks for one: both stay timm's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from timm.models.volo import VOLO, Attention, Downsample, Transformer
from torch import Tensor, nn

from ..encoding import LayerFacts, OneNode, PositionEncoding
from ..input.learned import Learned
from .attention import attend
from .grid_hosts import EncodedGridModel, Place, StagedHost, own_place_first
from .grids import MixPositions, add_positions, encode_grid
from .host import register_host
from .parameters import adopt_parameters, bind_first


@dataclass(frozen=True)
class AsMap:
    """A view of a table (1, H W, C) that its owner has as a map, (1, H, W, C)."""

    grid: tuple[int, int]

    def read(self, parameter: Tensor) -> Tensor:
        """Return (1, H W, C) of (1, H, W, C)."""
        return parameter.flatten(1, 2)

    def write(self, value: Tensor, encoding: Learned) -> Tensor:
        """Return (1, H, W, C) of (1, H W, C)."""
        return value.unflatten(1, self.grid)


class EncodedAttention(OneNode, Attention):
    """Self-attention of VOLO with encodings, on a grid x (B, H, W, C)."""

    def forward(self, x: Tensor) -> Tensor:
        """Return tokens (B, H, W, C)."""
        if not len(self.encodings):
            return super().forward(x)
        grid, tokens = tuple(x.shape[1:3]), x.flatten(1, 2)
        q, k, v = self.qkv(tokens).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        tensors = encode_grid(self, tokens, grid, q, k, v)
        out = attend(tensors, self.scale, self.attn_drop, self.fused_attn)  # (B, heads, H W, head_dim)
        return self.proj_drop(self.proj(out.transpose(1, 2).flatten(2))).unflatten(1, grid)


class EncodedTransformer(MixPositions, Transformer):
    """A block on a grid x (B, H, W, C), after which conditional encodings may mix the tokens."""


class EncodedDownsample(Downsample):
    """The convolution in front of the transformer blocks, to whose grid input encodings are added, but timm's own."""

    def forward(self, x: Tensor) -> Tensor:
        """Return the tokens (B, H, W, C)."""
        return add_positions(super().forward(x), self.input_encodings[0])


class EncodedVOLO(EncodedGridModel, VOLO):
    """A VOLO whose positions are encodings of this package."""


class VOLOHost(StagedHost):
    """The family of VOLO. The first `learned` is `pos_embed`, which timm adds by itself, on its own grid alone."""

    name = "VOLO"
    since = "1.0.31"  # runs without its table
    models: ClassVar = {VOLO: EncodedVOLO}
    parts: ClassVar = {Transformer: EncodedTransformer, Attention: EncodedAttention, Downsample: EncodedDownsample}
    input_part = "network.1"

    def stages(self, model: VOLO) -> list[list[nn.Module]]:
        return [[block for block in stage if isinstance(block, Transformer)] for stage in list(model.network)[2:]]

    def grids(self, model: VOLO) -> list[tuple[int, int]]:
        return [model.token_grid for _ in list(model.network)[2:]]

    def convert(self, model: VOLO) -> None:
        kinds = [type(part) in (Downsample, EncodedDownsample) for part in model.network]
        if kinds[1:2] != [True] or any(kinds[2:]):
            raise ValueError("only a VOLO that downsamples once, after its first stage, takes encodings")
        super().convert(model)

    def adopt_native_positions(self, model: VOLO) -> None:
        model.token_grid, model.pos_embed_own = tuple(model.pos_embed.shape[1:3]), nn.ModuleList()
        options = {"dim": model.pos_embed.shape[-1], "feat_shape": model.token_grid}
        model.pos_embed_own.append(adopt_parameters(model, Learned, AsMap(model.token_grid), **options))

    def input_places(self, model: VOLO, inputs: list[PositionEncoding]) -> list[Place]:
        grid = model.token_grid
        return own_place_first(model, inputs, lambda each: isinstance(each, Learned) and each.feat_shape == grid)

    def bind_native(self, model: VOLO) -> None:
        bind_first(model.pos_embed_own, Learned, model, AsMap(model.token_grid))

    def input_facts(self, model: VOLO) -> LayerFacts:
        return LayerFacts(dim=model.network[1].proj.out_channels, feat_shape=model.token_grid)


HOST = register_host(VOLOHost())
