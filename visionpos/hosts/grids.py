"""Shared parts of the hosts whose blocks see a grid of tokens, or windows of it: Swin, SAM, MaxViT and their kin.

Where tokens are follows from the shape of what a layer gets, so that nothing has to be handed on.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar

import torch.fx
from torch import Tensor, nn

from ..encoding import LayerFacts
from ..positions import Positions
from .host import Host, layer_lists
from .parameters import replace_encodings


@torch.fx.wrap  # one call in its graphs: the size of a picture is known when they run
def add_positions(x: Tensor, encodings: nn.ModuleList) -> Tensor:
    """Return x (B, H, W, C) after input or conditional encodings."""
    for encoding in encodings:
        positions = Positions.grid(tuple(x.shape[1:3]), device=x.device)
        x = encoding(x.flatten(1, 2), positions).view(x.shape)
    return x


def add_to_map(x: Tensor, encodings: nn.ModuleList) -> Tensor:
    """Return x (B, C, H, W) after input or conditional encodings; x itself where there are none."""
    return add_positions(x.permute(0, 2, 3, 1), encodings).permute(0, 3, 1, 2) if len(encodings) else x


class AddPositions:
    """Mixin for a module of timm's that the tokens pass before the first block, where input encodings are added.

    The model has them, as `pos_embed_input`; `input_encodings` is the same list in a tuple, so that it is not
    registered as a child.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Return x (B, H, W, C) as timm does, with input encodings."""
        return super().forward(add_positions(x, self.input_encodings[0]))


class GridHost(Host):
    """A family of such blocks; each has `attn` with a list of encodings, and `mixers` behind it."""

    models: ClassVar[dict[type, type]]  # timm's class: the converted one

    def accepts(self, model: nn.Module) -> bool:
        return type(model) in self.models or type(model) in self.models.values()

    def convert(self, model: nn.Module) -> None:
        if type(model) in self.models.values():
            return
        model.pos_embed_input = nn.ModuleList()
        self.convert_parts(model)
        model.__class__ = self.models[type(model)]

    @abstractmethod
    def convert_parts(self, model: nn.Module) -> None:
        """Swap the classes of blocks and attention, and of what the tokens pass before the first block."""

    @abstractmethod
    def blocks(self, model: nn.Module) -> list[nn.Module]:
        """Return all blocks with attention, in order."""

    def encodings(self, model: nn.Module):
        layers = [[*block.attn.encodings, *block.mixers] for block in self.blocks(model)]
        return list(model.pos_embed_input), layers

    def install(self, model: nn.Module, inputs, layers) -> None:
        blocks = self.blocks(model)
        lists = (place for block, new in zip(blocks, layers, strict=True) for place in layer_lists(block, new))
        replace_encodings((model.pos_embed_input, inputs), *lists)
        self.bind_native(model)

    @abstractmethod
    def bind_native(self, model: nn.Module) -> None:
        """Put parameters that timm and its checkpoints have under names of their own there."""


class StagedHost(GridHost):
    """Such a family whose blocks come in stages, each of which has a grid of its own."""

    @abstractmethod
    def stages(self, model: nn.Module) -> list[tuple[tuple[int, int], list[nn.Module]]]:
        """Return the grid (H, W) of each stage, and its blocks with attention in order."""

    def seen_shape(self, block: nn.Module, grid: tuple[int, int]) -> tuple[int, int]:
        """Return (H, W) of the tokens that see each other in a block on a grid: the grid, or a window."""
        return grid

    def blocks(self, model: nn.Module) -> list[nn.Module]:
        return [block for _, blocks in self.stages(model) for block in blocks]

    def layer_facts(self, model: nn.Module) -> list[LayerFacts]:
        placed = [(grid, block) for grid, blocks in self.stages(model) for block in blocks]
        return [
            LayerFacts(
                dim=block.attn.proj.out_features,
                feat_shape=self.seen_shape(block, grid),
                num_heads=block.attn.num_heads,
                head_dim=block.attn.proj.in_features // block.attn.num_heads,
                layer=layer,
                depth=len(placed),
            )
            for layer, (grid, block) in enumerate(placed)
        ]

    def mixing_layers(self, model: nn.Module) -> list[int]:
        depths = [len(blocks) for _, blocks in self.stages(model)]
        return [sum(depths[:stage]) for stage, depth in enumerate(depths) if depth]
