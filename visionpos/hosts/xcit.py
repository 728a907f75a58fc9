"""timm's Xcit as host: attention over channels, which sees no pair of patches; every block is told the grid."""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from timm.models.xcit import XCA, ConvPatchEmbed, PositionalEncodingFourier, XCABlock, Xcit
from torch import Tensor, nn

from ..encoding import LayerFacts, OneNode, PositionEncoding
from ..input.fourier import Fourier
from .grid_hosts import EncodedGridModel, Place, StagedHost, own_place_first
from .grids import add_to_map, encode_grid
from .host import refuse_pairs, register_host
from .parameters import adopt_parameters, bind_parameters


class EncodedXCA(OneNode, XCA):
    """Attention over channels, to whose output encodings may add mixed values; x (B, N, C) of a grid (H, W)."""

    def forward(self, x: Tensor, H: int | None = None, W: int | None = None) -> Tensor:
        """Return tokens (B, N, C)."""
        if not len(self.encodings):
            return super().forward(x)
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 4, 1).unbind(0)
        q, k = F.normalize(q, dim=-1) * self.temperature, F.normalize(k, dim=-1)  # (B, heads, head_dim, N)
        out = self.attn_drop((q @ k.mT).softmax(dim=-1)) @ v
        mixed = encode_grid(self, x, (int(H), int(W)), q.mT, k.mT, v.mT).output
        out = out.mT + mixed  # (B, heads, N, head_dim)
        return self.proj_drop(self.proj(out.transpose(1, 2).flatten(2)))


class EncodedXCABlock(XCABlock):
    """A block that tells attention the grid, and after which conditional encodings may mix the tokens."""

    def forward(self, x: Tensor, H: int, W: int) -> Tensor:
        """Return the tokens (B, N, C) of a grid (H, W) after the block."""
        x = x + self.drop_path1(self.gamma1 * self.attn(self.norm1(x), H, W))
        x = x + self.drop_path3(self.gamma3 * self.local_mp(self.norm3(x), H, W))
        x = x + self.drop_path2(self.gamma2 * self.mlp(self.norm2(x)))
        return add_to_map(x.transpose(1, 2).unflatten(2, (H, W)), self.mixers).flatten(2).transpose(1, 2)


class EncodedPatchEmbed(ConvPatchEmbed):
    """The convolutions in front, to whose patches input encodings are added, all but timm's own."""

    def forward(self, x: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Return the patches (B, N, C) of pictures, and their grid."""
        x, feat_shape = super().forward(x)
        x = add_to_map(x.transpose(1, 2).unflatten(2, feat_shape), self.input_encodings[0])
        return x.flatten(2).transpose(1, 2), feat_shape


class EncodedXcit(EncodedGridModel, Xcit):
    """An Xcit whose positions are encodings of this package."""


class XcitHost(StagedHost):
    """The family of Xcit. A `fourier` of its kind is `pos_embed`, which timm adds by itself."""

    name = "Xcit (XCiT)"
    models: ClassVar = {Xcit: EncodedXcit}
    parts: ClassVar = {XCABlock: EncodedXCABlock, XCA: EncodedXCA, ConvPatchEmbed: EncodedPatchEmbed}
    input_part = "patch_embed"

    def adopt_native_positions(self, model: Xcit) -> None:
        model.pos_embed_own, own, stem = nn.ModuleList(), model.pos_embed, model.patch_embed
        stem.grid_size = tuple(n // stem.patch_size for n in stem.img_size)
        if own is not None:
            options = {"feat_shape": stem.grid_size, "num_bands": own.hidden_dim // 2}
            model.pos_embed_own.append(adopt_parameters(own, Fourier, dim=own.dim, preset="xcit", **options))

    def stages(self, model: Xcit) -> list[list[nn.Module]]:
        return [list(model.blocks)]

    def grids(self, model: Xcit) -> list[tuple[int, int]]:
        return [model.patch_embed.grid_size]

    def input_places(self, model: Xcit, inputs: list[PositionEncoding]) -> list[Place]:
        return own_place_first(model, inputs, lambda each: isinstance(each, Fourier) and each.preset == "xcit")

    def install(self, model: Xcit, inputs, layers) -> None:
        refuse_pairs(layers, "Xcit is over channels")
        super().install(model, inputs, layers)

    def bind_native(self, model: Xcit) -> None:
        model.pos_embed = None
        for own in model.pos_embed_own:
            with torch.device("meta"):
                model.pos_embed = PositionalEncodingFourier(2 * own.num_bands, own.dim)
            model.pos_embed.token_projection = None
            bind_parameters(own, model.pos_embed)

    def input_facts(self, model: Xcit) -> LayerFacts:
        return LayerFacts(dim=model.embed_dim, feat_shape=model.patch_embed.grid_size)


HOST = register_host(XcitHost())
