"""Shared parts of the hosts whose blocks see a grid of tokens, or windows of it: Swin, SAM, MaxViT and their kin.

Where tokens are follows from the shape of what a layer gets, so that nothing has to be handed on.
"""

from __future__ import annotations

import itertools
from abc import abstractmethod
from typing import ClassVar

import torch.fx
from torch import Tensor, nn

from ..encoding import AttentionTensors, LayerFacts, PositionEncoding
from ..positions import Positions
from .attention import encoded
from .host import FixedCoordinates, Host, encoding_parameters, fits_stem, layer_lists
from .parameters import replace_encodings


@torch.fx.wrap  # one call in its graphs: the size of a picture is known when they run
def _add_on_grid(x: Tensor, encodings: nn.ModuleList, tables: list[Tensor]) -> Tensor:
    for encoding in encodings:
        positions = Positions.grid(tuple(x.shape[1:3]), device=x.device)
        x = encoding(x.flatten(1, 2), positions).view(x.shape)
    return x


def add_positions(x: Tensor, encodings: nn.ModuleList) -> Tensor:
    """Return x (B, H, W, C) after input or conditional encodings; x itself where there are none."""
    if not len(encodings):
        return x
    tables = []  # what encodings read from elsewhere, for graphs to have it among their own parameters
    for encoding in encodings if isinstance(x, torch.fx.Proxy) else ():
        names = () if encoding.owner is encoding else PositionEncoding.no_weight_decay(encoding)
        tables += [parameter for name, parameter in encoding.owner.named_parameters() if name in names]
    return _add_on_grid(x, encodings, tables)  # torch.fx wraps no function that was imported


def add_to_tokens(x: Tensor, encodings: nn.ModuleList, grid: tuple[int, int]) -> Tensor:
    """Return x (B, H W, C), the tokens of a grid (H, W), after encodings; x itself where there are none."""
    return add_positions(x.unflatten(1, grid), encodings).flatten(1, 2) if len(encodings) else x


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


class AddPositionsToMap:
    """Mixin for a module that ends in a map (B, C, H, W), to which input encodings are added."""

    def forward(self, x: Tensor) -> Tensor:
        """Return the map (B, C, H, W) as timm does, with input encodings."""
        return add_to_map(super().forward(x), self.input_encodings[0])


class AddPositionsToTokens:
    """Mixin for a module that returns tokens (B, H W, C) and their grid (H, W); input encodings are added to these."""

    def forward(self, x: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Return the tokens as timm does, with input encodings, and their grid."""
        x, grid = super().forward(x)
        return add_to_tokens(x, self.input_encodings[0], tuple(grid)), grid


def encode_grid(
    layer: nn.Module,
    x: Tensor,
    grid: tuple[int, int],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    num_prefix_tokens: int = 0,
) -> AttentionTensors:
    """Return the tensors of an attention layer whose tokens are a whole grid, with its encodings applied.

    Args:
        layer: has `encodings`.
        x: (B, N, C), the layer's input.
        grid: (H, W), N = num_prefix_tokens + H W.
        q: queries, (B, heads, N, head_dim), not scaled.
        k: keys.
        v: values, of any number of channels.
        num_prefix_tokens: in front of the patches.
    """
    positions = Positions.grid(grid, num_prefix_tokens, device=x.device).promote(x.dtype)
    return encoded(x, q, k, v, [(encoding, encoding.prepare(positions)) for encoding in layer.encodings])


class EncodedGridModel(FixedCoordinates):
    """Mixin with the methods of converted models that name their input encodings `pos_embed_input`."""

    def no_weight_decay(self) -> set[str]:
        """Return timm's names and every parameter of an encoding."""
        own = getattr(super(), "no_weight_decay", set)()  # not in every family
        return {*own, *encoding_parameters(self)}

    def group_matcher(self, coarse: bool = False) -> dict:
        """Return timm's groups of layers, with input encodings in the stem."""
        groups = super().group_matcher(coarse)
        stem = next(name for name in groups if name.startswith("stem"))  # "stem1" of several
        return {**groups, stem: groups[stem] + r"|^pos_embed_input"}


class GridHost(Host):
    """A family of blocks on a grid or windows of it: each has `attn` with a list of encodings, and `mixers`."""

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
    def stages(self, model: nn.Module) -> list[list[nn.Module]]:
        """Return the blocks with attention of each stage, in order; a stage may have none."""

    def blocks(self, model: nn.Module) -> list[nn.Module]:
        """Return all blocks with attention, in order."""
        return [block for stage in self.stages(model) for block in stage]

    def mixing_layers(self, model: nn.Module) -> list[int]:
        ends = itertools.accumulate(len(stage) for stage in self.stages(model))
        return [end - len(stage) for end, stage in zip(ends, self.stages(model), strict=True) if stage]

    def input_lists(self, model: nn.Module) -> list[nn.ModuleList]:
        """Return the list of input encodings of each stem."""
        return [model.pos_embed_input]

    def encodings(self, model: nn.Module):
        layers = [[*block.attn.encodings, *block.mixers] for block in self.blocks(model)]
        return [encoding for encodings in self.input_lists(model) for encoding in encodings], layers

    def install(self, model: nn.Module, inputs, layers) -> None:
        for facts, encodings in zip(self.layer_facts(model), layers, strict=True):
            channels = facts.num_heads * facts.head_dim
            for encoding in encodings:
                if getattr(encoding, "value_table", None) is not None and channels != facts.value_dim:
                    timms = type(model).__name__.removeprefix("Encoded")
                    raise ValueError(
                        f"{encoding.name} has value vectors of {channels} channels, but layer {facts.layer} of this "
                        f"{timms} has values of {facts.value_dim}: leave out values=True"
                    )
        blocks = self.blocks(model)
        lists = (place for block, new in zip(blocks, layers, strict=True) for place in layer_lists(block, new))
        replace_encodings(
            *(
                (encodings, [encoding for encoding in inputs if fits_stem(encoding, stem)])
                for encodings, stem in zip(self.input_lists(model), self.stems(model), strict=True)
            ),
            *lists,
        )
        self.bind_native(model)

    def bind_native(self, model: nn.Module) -> None:
        """Put parameters that timm and its checkpoints have under names of their own there; by default, none."""


def trained_size(model: nn.Module) -> tuple[int, int]:
    """Return the picture size (H, W) that timm built a model for, or that of its configuration if it has none.

    `pretrained_cfg_overlay={"input_size": (3, height, width)}` of `timm.create_model` changes the latter.

    Raises:
        ValueError: there is no configuration, since timm's factory did not build the model.
    """
    built, config = getattr(model, "_traits", {}).get("img_size"), getattr(model, "pretrained_cfg", None) or {}
    if built is not None:
        return tuple(built)
    if "input_size" not in config:
        raise ValueError(
            f"{type(model).__name__.removeprefix('Encoded')} knows no picture size: build it with timm.create_model, "
            "or set its pretrained_cfg to {'input_size': (3, height, width)}"
        )
    return tuple(config["input_size"][1:])


class StagedHost(GridHost):
    """A family of blocks on grids whose stages have a grid each."""

    @abstractmethod
    def grids(self, model: nn.Module) -> list[tuple[int, int]]:
        """Return the grid (H, W) of each stage."""

    def seen_shape(self, block: nn.Module, grid: tuple[int, int]) -> tuple[int, int]:
        """Return (H, W) of the tokens that see each other in a block on a grid: the grid, or a window."""
        return grid

    def layer_facts(self, model: nn.Module) -> list[LayerFacts]:
        stages = zip(self.grids(model), self.stages(model), strict=True)
        placed = [(grid, block) for grid, blocks in stages for block in blocks]
        return [
            LayerFacts(
                dim=block.attn.proj.weight.shape[0],
                feat_shape=self.seen_shape(block, grid),
                num_heads=block.attn.num_heads,
                head_dim=block.attn.proj.weight.shape[1] // block.attn.num_heads,
                layer=layer,
                depth=len(placed),
            )
            for layer, (grid, block) in enumerate(placed)
        ]
