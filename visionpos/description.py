"""What encodes position in a model, as a table: `describe`."""

from __future__ import annotations

import copy
import html
from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn

from .encoding import LayerFacts, PositionEncoding
from .hosts.host import find_host, fits_stem
from .registry import FACTS, constructor_parameters

HEADER = ("layers", "place", "encoding", "options", "grid", "on another grid")
NOTHING = "no position at all"


@dataclass(frozen=True)
class Description:
    """A table of the encodings of a model. It prints itself as text, and in a notebook as a table.

    Attributes:
        model: the name of the model's class.
        rows: for each encoding layers, place, name, options, grid, and what it does on another grid.
    """

    model: str
    rows: tuple[tuple[str, ...], ...]

    def __str__(self) -> str:
        table = [HEADER, *self.rows]
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in table
        ]
        return "\n".join([self.model, *lines])

    __repr__ = __str__

    def _repr_html_(self) -> str:
        """Return the table as a notebook shows it."""
        tags = [("th", HEADER), *(("td", row) for row in self.rows)]
        rows = ("".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in row) for tag, row in tags)
        body = "".join(f"<tr>{row}</tr>" for row in rows)
        return f"<table><caption>{html.escape(self.model)}</caption>{body}</table>"


def describe(model: nn.Module) -> Description:
    """Return a table of what encodes position in a model: one row for the encodings of all layers that are alike.

    The model is not changed, also one that was never converted. Layers that come before everything that tells positions
    have the row "no position at all".

    Args:
        model: a timm model of a supported family, converted or not.

    Raises:
        ValueError: the model is no host.

    Example:
        >>> model = vp.create_model("vit_tiny_patch16_224", {"name": "rope_axial", "layers": "1::2"}, depth=4)
        >>> vp.describe(model)
        VisionTransformer
        layers  place   encoding            options  grid     on another grid
        0               no position at all
        1, 3    rotary  rope_axial                   14 x 14  coordinates run on
    """
    found, blind = distinct_encodings(model)
    rows = [(_numbers(range(blind)), "", NOTHING, "", "", "")] if blind else []
    rows += [(layers, *_cells(encoding, facts)) for layers, encoding, facts in found]
    timms = (cls for cls in type(model).__mro__ if cls.__module__.startswith("timm."))
    name = next(timms, type(model)).__name__
    return Description(name, tuple(rows))


def distinct_encodings(model: nn.Module) -> tuple[list[tuple[str, PositionEncoding, LayerFacts]], int]:
    """Return the encodings of a model that differ, and the number of layers that come before any position.

    Each with its layers as text ("stem", "0 - 11") and what the first of these knows. They are those of a copy that
    shares all tensors with the model, which is not changed, also if it was never converted.

    Raises:
        ValueError: the model is no host.
    """
    host = find_host(model)
    tensors = (*model.parameters(), *model.buffers())
    model = copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})  # of the structure, not of the tensors
    host.convert(model)
    inputs, layers = host.encodings(model)
    blind = 0 if inputs else next((index for index, layer in enumerate(layers) if layer), len(layers))
    alike: dict[tuple[str, ...], list[tuple[int, PositionEncoding, LayerFacts]]] = {}
    for index, (layer, facts) in enumerate(zip(layers, host.layer_facts(model), strict=True)):
        for encoding in layer:
            alike.setdefault(_cells(encoding, facts), []).append((index, encoding, facts))
    stems = host.stems(model)
    found = [("stem", encoding, next(stem for stem in stems if fits_stem(encoding, stem))) for encoding in inputs]
    found += [(_numbers(index for index, *_ in group), *group[0][1:]) for group in alike.values()]
    return found, blind


def _cells(encoding: PositionEncoding, facts: LayerFacts) -> tuple[str, ...]:
    return encoding.place, encoding.name, _options(encoding), _grid(facts.feat_shape), _elsewhere(encoding)


def _grid(shape: Iterable[int]) -> str:
    return " x ".join(map(str, shape))


def _numbers(indices: Iterable[int]) -> str:
    """Return increasing numbers as text, neighbours as a range: 0 - 2, 5."""
    runs: list[list[int]] = []
    for index in indices:
        if runs and runs[-1][-1] == index - 1:
            runs[-1].append(index)
        else:
            runs.append([index])
    return ", ".join(f"{run[0]} - {run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


def _options(encoding: PositionEncoding) -> str:
    """Return the options that are not the defaults, without what a model knows."""
    given = encoding._spec or {}
    shown = []
    for key, parameter in constructor_parameters(type(encoding)).items():
        default = parameter.default
        known = default if default is None or given.keys() > {"name"} else getattr(encoding, key, default)
        value = given.get(key, known)  # of the model's own encodings only attributes tell
        if key not in FACTS and default is not parameter.empty and value != default:
            shown.append(f"{key}={value}")
    return ", ".join(shown)


def _elsewhere(encoding: PositionEncoding) -> str:
    own = {"resize": "the table is resized", "error": "an error", "formula": "a formula of any grid"}
    if encoding.extrapolation in own:
        return own[encoding.extrapolation]
    if encoding.reference_shape is None or encoding.runs_on:
        return "coordinates run on"
    return f"coordinates interpolated into {_grid(encoding.reference_shape)}"
