"""Shared parts of the hosts whose blocks see a grid of tokens, or windows of it: Swin, SAM, MaxViT and their kin."""

from __future__ import annotations

import itertools
from abc import abstractmethod
from collections.abc import Callable, Iterable
from typing import ClassVar

from torch import nn

from ..encoding import LayerFacts, PositionEncoding
from .host import (
    FixedCoordinates,
    Host,
    adds_to_outputs,
    attention_of,
    encoding_parameters,
    find_host,
    layer_lists,
)
from .parameters import replace_encodings

Place = tuple[nn.ModuleList, list[PositionEncoding]]  # a list of a model, and what it will hold


def blocks_in(stages: Iterable[nn.Module], *kinds: type) -> list[list[nn.Module]]:
    """Return the blocks of some classes in each stage, in order, however deep in it they are."""
    return [[module for module in stage.modules() if isinstance(module, kinds)] for stage in stages]


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


class ResizedGridModel(EncodedGridModel):
    """Mixin for models that timm sets to another size of pictures, and with it the windows of their layers."""

    def set_input_size(self, *args, **kwargs) -> None:
        """Change the input size as timm does; learned tables are resized, formulas interpolate their coordinates."""
        super().set_input_size(*args, **kwargs)
        host = find_host(self)
        places = [(self.pos_embed_input, host.input_facts(self))]
        places += zip([block.attn.encodings for block in host.blocks(self)], host.layer_facts(self), strict=True)
        for encodings, facts in places:
            for encoding in encodings:
                encoding.set_feat_shape(facts.feat_shape)


class GridHost(Host):
    """A family of blocks on a grid or windows of it: each has `attn` with a list of encodings, and `mixers`."""

    models: ClassVar[dict[type, type]]  # timm's class: the converted one
    parts: ClassVar[dict[type, type]]  # the same of the blocks, of their attention, and of the part named next
    input_part: ClassVar[str | None] = None  # what the tokens pass before the first block: `AddPositions` or its kin

    def accepts(self, model: nn.Module) -> bool:
        return type(model) in self.models or type(model) in self.models.values()

    def convert(self, model: nn.Module) -> None:
        if type(model) in self.models.values():
            return
        blocks = self.blocks(model)
        inputs = [] if self.input_part is None else [model.get_submodule(self.input_part)]
        for part in (*inputs, *blocks, *map(attention_of, blocks)):
            if type(part) not in self.parts:
                raise ValueError(
                    f"a {type(model).__name__} takes encodings with timm's own parts only "
                    f"({', '.join(cls.__name__ for cls in self.parts)}); this one has a {type(part).__name__}"
                )
        model.pos_embed_input = nn.ModuleList()
        for part in inputs:
            part.__class__, part.input_encodings = self.parts[type(part)], (model.pos_embed_input,)
        for block in blocks:
            self.wrap_block(block)
        self.adopt_native_positions(model)
        model.__class__ = self.models[type(model)]

    def wrap_block(self, block: nn.Module) -> None:
        """Swap the classes of a block and of its attention, and give them their lists of encodings."""
        block.__class__, block.mixers = self.parts[type(block)], nn.ModuleList()
        attn = attention_of(block)  # a block that is both has its class already
        attn.__class__, attn.encodings = self.parts.get(type(attn), type(attn)), nn.ModuleList()

    def adopt_native_positions(self, model: nn.Module) -> None:
        """Make encodings of what timm's model has of its own, the rest of `convert`; by default, of nothing."""

    def stages(self, model: nn.Module) -> list[list[nn.Module]]:
        """Return the blocks with attention of each stage, in order; a stage may have none."""
        return [list(stage.blocks) for stage in model.stages]

    def blocks(self, model: nn.Module) -> list[nn.Module]:
        """Return all blocks with attention, in order."""
        return [block for stage in self.stages(model) for block in stage]

    def mixing_layers(self, model: nn.Module) -> list[int]:
        ends = itertools.accumulate(len(stage) for stage in self.stages(model))
        return [end - len(stage) for end, stage in zip(ends, self.stages(model), strict=True) if stage]

    @abstractmethod
    def seen_shapes(self, model: nn.Module) -> list[tuple[int, int]]:
        """Return (H, W) of the tokens that see each other in each layer: a grid, or a window."""

    def facts_of(self, block: nn.Module) -> dict[str, int]:
        """Return numbers of a layer, its channels and heads above all, by their names in `LayerFacts`."""
        outer, inner = block.attn.proj.weight.shape[:2]
        return {"dim": outer, "num_heads": block.attn.num_heads, "head_dim": inner // block.attn.num_heads}

    def layer_facts(self, model: nn.Module) -> list[LayerFacts]:
        layers = list(zip(self.blocks(model), self.seen_shapes(model), strict=True))
        return [
            LayerFacts(**self.facts_of(block), feat_shape=shape, layer=layer, depth=len(layers))
            for layer, (block, shape) in enumerate(layers)
        ]

    def input_places(self, model: nn.Module, inputs: list[PositionEncoding]) -> list[Place]:
        """Return each list of input encodings of a model, and what of others belongs there: all of it."""
        return [(model.pos_embed_input, inputs)]

    def encodings(self, model: nn.Module):
        layers = [[*attention_of(block).encodings, *block.mixers] for block in self.blocks(model)]
        return [encoding for encodings, _ in self.input_places(model, []) for encoding in encodings], layers

    def pools(self, block: nn.Module) -> bool:
        """Return whether the attention of a block has other numbers of queries and of keys; by default, none has."""
        return False

    def refuse_values(self, model: nn.Module, layers: list[list[PositionEncoding]]) -> None:
        """Refuse encodings of values in layers whose values are not for the same tokens, or of another width.

        Raises:
            ValueError: there is one.
        """
        for block, facts, encodings in zip(self.blocks(model), self.layer_facts(model), layers, strict=True):
            channels = facts.num_heads * facts.head_dim
            for encoding in encodings:
                if self.pools(block) and adds_to_outputs(encoding):
                    raise ValueError(
                        f"{encoding.name} works on the value of every token, but layer {facts.layer} of this "
                        f"{self.name} pools its tokens: leave out lepe and values=True there"
                    )
                if getattr(encoding, "value_table", None) is not None and channels != facts.value_dim:
                    timms = type(model).__name__.removeprefix("Encoded")
                    raise ValueError(
                        f"{encoding.name} has value vectors of {channels} channels, but layer {facts.layer} of this "
                        f"{timms} has values of {facts.value_dim}: leave out values=True"
                    )

    def install(self, model: nn.Module, inputs, layers) -> None:
        self.refuse_values(model, layers)
        blocks = zip(self.blocks(model), layers, strict=True)
        replace_encodings(
            *self.input_places(model, inputs), *(place for block, new in blocks for place in layer_lists(block, new))
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


def own_place_first(
    model: nn.Module, inputs: list[PositionEncoding], is_own: Callable[[PositionEncoding], bool]
) -> list[Place]:
    """Return the places of input encodings in a model that adds the first like its own by itself, as timm does.

    That one is in the list `pos_embed_own`.
    """
    own = [encoding for encoding in inputs if is_own(encoding)][:1]
    others = [encoding for encoding in inputs if encoding not in own]
    return [(model.pos_embed_own, own), (model.pos_embed_input, others)]


class StagedHost(GridHost):
    """A family of blocks on grids whose stages have a grid each."""

    @abstractmethod
    def grids(self, model: nn.Module) -> list[tuple[int, int]]:
        """Return the grid (H, W) of each stage."""

    def seen_shape(self, block: nn.Module, grid: tuple[int, int]) -> tuple[int, int]:
        """Return (H, W) of the tokens that see each other in a block on a grid: the grid, or a window."""
        return grid

    def seen_shapes(self, model: nn.Module) -> list[tuple[int, int]]:
        stages = zip(self.grids(model), self.stages(model), strict=True)
        return [self.seen_shape(block, grid) for grid, blocks in stages for block in blocks]
