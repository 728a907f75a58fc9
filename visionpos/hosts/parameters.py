"""Parameters of an encoding under timm's names, where optimisers and checkpoints look for them.

A bound encoding reads its parameters from the owner: a parameter exists once, and an assignment to the owner's is seen.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from ..encoding import PositionEncoding
from .host import first


class ParameterHolder(nn.Module):
    """A module of timm's name that holds parameters of an encoding, and does nothing else."""

    def __init__(self, window_size: tuple[int, int], **parts: nn.Parameter | nn.Module):
        super().__init__()
        self.window_size = tuple(window_size)  # timm's, for its own checkpoint conversion
        for name, part in parts.items():
            setattr(self, name, part)

    def set_window_size(self, window_size: tuple[int, int]) -> None:
        """Note the new grid; the encoding resizes its own parameters."""
        self.window_size = tuple(window_size)


@runtime_checkable
class View(Protocol):
    """Let an encoding see a parameter that its owner has in another layout."""

    def read(self, parameter: Tensor) -> Tensor:
        """Return the encoding's layout of the owner's parameter."""

    def write(self, value: Tensor, encoding: PositionEncoding) -> Tensor:
        """Return the owner's layout of a new value, after `encoding` was resized."""


class PartialView:
    """A view of a part of a parameter, of which other encodings see the rest."""

    def write(self, value: Tensor, encoding: PositionEncoding) -> Tensor:
        """Refuse: what several encodings have together is not resized for one of them."""
        raise TypeError(f"{encoding.name} shares a parameter with others, which cannot be resized for one")


@dataclass(frozen=True)
class OfLayer(PartialView):
    """One layer of a parameter that all layers have together, (n, layers, ...)."""

    layer: int

    def read(self, parameter: Tensor) -> Tensor:
        """Return the part of the layer, (n, ...)."""
        return parameter[:, self.layer]


def bind_parameters(
    encoding: PositionEncoding, owner: nn.Module, view: View | None = None, names: Mapping[str, str] | None = None
) -> None:
    """Keep the parameters and child modules of an encoding in `owner`, under their own names, or the owner's.

    Those that the owner has already take the place of the encoding's. An encoding that is bound stays where it is.

    Args:
        encoding: reads them from the owner from now on.
        owner: a part of the model.
        view: how the encoding sees the owner's parameters, where it is not as they are.
        names: what the owner calls them, by the encoding's own names, where it is something else.
    """
    if "_bound" in encoding.__dict__:
        return
    names = {name: name for name in (*encoding._parameters, *encoding._modules)} | dict(names or {})
    for name, theirs in names.items():
        part = getattr(encoding, name)
        delattr(encoding, name)
        if getattr(owner, theirs, None) is None:
            setattr(owner, theirs, part if view is None else _written(part, view, encoding))
    encoding._bound = (owner, names, view)  # in a tuple, so that the owner is not registered as a child


def bind_first(
    encodings: Iterable[PositionEncoding],
    kind: type | tuple[type, ...],
    owner: nn.Module,
    view: View | None = None,
    names: Mapping[str, str] | None = None,
) -> PositionEncoding | None:
    """Bind the first encoding of a kind to `owner`, if there is one, and return it; see `bind_parameters`."""
    own = first(encodings, kind)
    if own is not None:
        bind_parameters(own, owner, view, names)
    return own


def release_parameters(encoding: PositionEncoding) -> None:
    """Give an encoding its parameters and child modules back; the owner keeps those that others see a part of."""
    owner, names, view = encoding.__dict__.pop("_bound", (None, {}, None))
    for name, theirs in names.items():
        part = getattr(owner, theirs)
        setattr(encoding, name, part if view is None else _seen(part, view))
        if not isinstance(view, PartialView):
            setattr(owner, theirs, None)


def has_parameters(encoding: PositionEncoding) -> bool:
    """Return whether an encoding has parameters, wherever they are."""
    return "_bound" in encoding.__dict__ or any(True for _ in encoding.parameters())


def _seen(parameter: Tensor, view: View) -> nn.Parameter:
    return nn.Parameter(view.read(parameter).detach().clone(), requires_grad=parameter.requires_grad)


def _written(part: nn.Parameter, view: View, encoding: PositionEncoding) -> nn.Parameter:
    return nn.Parameter(view.write(part.detach(), encoding), requires_grad=part.requires_grad)


def adopt_parameters(
    owner: nn.Module,
    cls: type[PositionEncoding],
    view: View | None = None,
    names: Mapping[str, str] | None = None,
    **options,
) -> PositionEncoding:
    """Return an encoding bound to parameters that `owner` has already; nothing is drawn at random."""
    with torch.device("meta"):
        encoding = cls(**options)
    bind_parameters(encoding, owner, view, names)
    encoding.to_empty(device=next(owner.parameters()).device)  # its buffers: nothing else is left
    encoding.reinit_buffers()
    return encoding.train(owner.training)


def copy_encoding(encoding: PositionEncoding) -> PositionEncoding:
    """Return a copy that has parameters of its own, wherever the encoding's are, and belongs to no model."""
    bound = encoding.__dict__.get("_bound")
    copied = copy.deepcopy(encoding, {} if bound is None else {id(bound): bound})  # without the owner
    copied._spec = None
    owner, names, view = copied.__dict__.pop("_bound", (None, {}, None))
    for name, theirs in names.items():
        part: Tensor | nn.Module = getattr(owner, theirs)
        setattr(copied, name, copy.deepcopy(part) if view is None else _seen(part, view))
    return copied


def replace_encodings(*places: tuple[nn.ModuleList, Iterable[PositionEncoding]]) -> None:
    """Put other encodings into lists of a model, in place of all that these have; every encoding gets its parameters.

    Args:
        places: each list, which stays the same object, and what it will hold.
    """
    for encodings, _ in places:
        for encoding in encodings:
            release_parameters(encoding)
    for encodings, new in places:
        new = list(new)
        del encodings[:]
        encodings.extend(new)
