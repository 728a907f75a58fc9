"""Shared parts of the families that add a learned table to their tokens, in one place or in several.

Such a place is a stem: the patches, a branch of two, the start of a stage. Stems have different widths, which tells to
which of them an encoding belongs.
"""

from __future__ import annotations

from abc import abstractmethod

import torch.fx
from torch import Tensor, nn

from ..encoding import LayerFacts, PositionEncoding
from ..input.learned import Learned
from ..positions import Positions
from .attention import AttentionContext
from .grid_hosts import Place, StagedHost
from .host import fits_stem
from .isotropic import add_encodings
from .parameters import View, adopt_parameters, bind_first

torch.fx.wrap("add_encodings")  # here, too


@torch.fx.wrap  # one call in its graphs
def locate_tokens(x: Tensor, grid: tuple[int, int]) -> Positions:
    """Return the positions of tokens x (B, 1 + N, C): those of a grid, behind a class token."""
    return Positions.grid(grid, 1, device=x.device).promote(x.dtype)


def context_of_grid(x: Tensor, grid: tuple[int, int]) -> AttentionContext:
    """Return what blocks need to know of tokens x (B, 1 + N, C), which are a class token and a grid."""
    return AttentionContext(locate_tokens(x, grid))


def add_to_grid(x: Tensor, encodings: nn.ModuleList, grid: tuple[int, int], table: Tensor | None) -> Tensor:
    """Return tokens x (B, 1 + N, C) with input encodings; `table` is what timm's model has for one of them."""
    return add_encodings(x, locate_tokens(x, grid), encodings, [] if table is None else [table])


class MapLayout:
    """The layout of a learned table that its owner has as a map, (1, C, H, W), and that is (1, H W, C) here."""

    def read(self, parameter: Tensor) -> Tensor:
        """Return the table, one row for each patch."""
        return parameter.flatten(2).mT

    def write(self, value: Tensor, encoding: PositionEncoding) -> Tensor:
        """Return the map."""
        return value.mT.unflatten(2, encoding.feat_shape).contiguous()


class StemsHost(StagedHost):
    """A family whose stems have a learned table each; the lists are `pos_embed_input`, `pos_embed_input_1`, ..."""

    @abstractmethod
    def stems(self, model: nn.Module) -> list[LayerFacts]:
        """Return what the model knows of each stem."""

    @abstractmethod
    def tables(self, model: nn.Module) -> list[tuple[nn.Module, str, View | None]]:
        """Return, for each stem, who has timm's table, its name there, and how an encoding sees it."""

    def input_facts(self, model: nn.Module) -> LayerFacts:
        return self.stems(model)[0]

    def input_lists(self, model: nn.Module) -> list[nn.ModuleList]:
        """Return the list of input encodings of each stem."""
        rest = (getattr(model, f"pos_embed_input_{index}") for index in range(1, len(self.tables(model))))
        return [model.pos_embed_input, *rest]

    def input_places(self, model: nn.Module, inputs: list[PositionEncoding]) -> list[Place]:
        places = zip(self.input_lists(model), self.stems(model), strict=True)
        return [(encodings, [each for each in inputs if fits_stem(each, stem)]) for encodings, stem in places]

    def convert(self, model: nn.Module) -> None:
        stems = self.stems(model)
        if len({facts.dim for facts in stems}) < len(stems):
            raise ValueError(
                f"{self.name} adds positions to tokens of {' and '.join(str(facts.dim) for facts in stems)} channels: "
                "only where these differ is it clear for which an encoding is"
            )
        super().convert(model)

    def adopt_native_positions(self, model: nn.Module) -> None:
        """Make encodings of timm's tables; a family goes on with the stems themselves."""
        for index, (facts, (owner, name, view)) in enumerate(zip(self.stems(model), self.tables(model), strict=True)):
            encodings = nn.ModuleList() if index else model.pos_embed_input
            if index:
                setattr(model, f"pos_embed_input_{index}", encodings)
            if getattr(owner, name, None) is not None:
                options = {"dim": facts.dim, "feat_shape": facts.feat_shape}
                options["num_prefix_tokens"] = facts.num_prefix_tokens
                encodings.append(adopt_parameters(owner, Learned, view, {"pos_embed": name}, **options))

    def bind_native(self, model: nn.Module) -> None:
        for encodings, (owner, name, view) in zip(self.input_lists(model), self.tables(model), strict=True):
            bind_first(encodings, Learned, owner, view, {"pos_embed": name})
