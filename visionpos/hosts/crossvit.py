"""timm's CrossViT as host: two branches of ViT's blocks, each on a grid of its own; class tokens look at the other's.

Fusion, in which the class token of a branch is the only query, stays timm's, for it has no place.
"""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

import torch
from timm.models import crossvit as timms
from timm.models.vision_transformer import Attention as TimmAttention
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from ..encoding import LayerFacts
from .attention import Attention, AttentionContext
from .grid_hosts import EncodedGridModel
from .host import register_host
from .isotropic import BlockSequence
from .stems import StemsHost, add_to_grid, context_of_grid
from .vit_blocks import EncodedBlock


class EncodedBranch(BlockSequence):
    """The blocks of a branch up to a fusion, which are told the grid that its pictures always have."""

    def forward(self, x: Tensor, context: AttentionContext | None = None) -> Tensor:
        """Return the tokens (B, 1 + N, C) after all blocks."""
        return super().forward(x, context_of_grid(x, self.grid_size))


class EncodedCrossVit(EncodedGridModel, timms.CrossVit):
    """A CrossViT whose positions are encodings of this package."""

    def _embed(self, x: Tensor) -> list[Tensor]:
        branches = []
        for index, (embed, grid) in enumerate(zip(self.patch_embed, HOST.grids(self), strict=True)):
            # asked of timm's module, in which a graph of torch.fx has one node in its place
            tokens = embed(timms.scale_image(x, self.img_size_scaled[index], self.crop_scale))
            tokens = torch.cat((getattr(self, f"cls_token_{index}").expand(tokens.shape[0], -1, -1), tokens), dim=1)
            table = getattr(self, f"pos_embed_{index}")
            branches.append(self.pos_drop(add_to_grid(tokens, HOST.input_lists(self)[index], grid, table)))
        return branches


class CrossVitHost(StemsHost):
    """The family of CrossViT; its layers are the blocks of the first branch, then those of the second."""

    name = "CrossVit (CrossViT)"
    since = "1.0.31"  # adds its tables in a method of their own
    models: ClassVar = {timms.CrossVit: EncodedCrossVit}
    parts: ClassVar = {Block: EncodedBlock, TimmAttention: Attention}

    def stages(self, model: timms.CrossVit) -> list[list[nn.Module]]:
        branches = zip(*(part.blocks for part in model.blocks), strict=True)
        return [[block for blocks in branch for block in blocks] for branch in branches]

    def grids(self, model: timms.CrossVit) -> list[tuple[int, int]]:
        return [tuple(n // p for n, p in zip(e.img_size, e.patch_size, strict=True)) for e in model.patch_embed]

    def stems(self, model: timms.CrossVit) -> list[LayerFacts]:
        widths = zip(model.embed_dim, self.grids(model), strict=True)
        return [LayerFacts(dim=dim, feat_shape=grid, num_prefix_tokens=1) for dim, grid in widths]

    def tables(self, model: timms.CrossVit) -> list[tuple[nn.Module, str, None]]:
        return [(model, f"pos_embed_{index}", None) for index in range(model.num_branches)]

    def adopt_native_positions(self, model: timms.CrossVit) -> None:
        super().adopt_native_positions(model)
        for part in model.blocks:
            for blocks, grid in zip(part.blocks, self.grids(model), strict=True):
                blocks.__class__, blocks.grid_size = EncodedBranch, grid

    def layer_facts(self, model: timms.CrossVit) -> list[LayerFacts]:
        """Return what the model knows of each layer; its depth is that of its branch."""
        depths = [(index, len(branch)) for branch in self.stages(model) for index in range(len(branch))]
        found = zip(super().layer_facts(model), depths, strict=True)
        return [replace(facts, num_prefix_tokens=1, layer=layer, depth=depth) for facts, (layer, depth) in found]


HOST = register_host(CrossVitHost())
