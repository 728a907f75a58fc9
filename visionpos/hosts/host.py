"""The short contract that `set_encoding` works through: how a timm family becomes a host."""

from __future__ import annotations

import functools
import importlib
import pkgutil
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import ClassVar

import timm
from torch import nn

from ..encoding import LayerFacts, PositionEncoding


class Host(ABC):
    """One timm family. An adapter is a subclass that implements these methods, added by `register_host`."""

    name: ClassVar[str]
    since: ClassVar[str] = "1.0.26"  # the first timm whose models of the family can be converted
    channels_last_features: ClassVar[bool] = False  # of timm's feature extractor of the family: (B, H, W, C)

    @abstractmethod
    def accepts(self, model: nn.Module) -> bool:
        """Return whether this adapter is for the model, converted or not, by its class alone."""

    @abstractmethod
    def convert(self, model: nn.Module) -> None:
        """Swap classes, and wrap the positions that the model has into encodings; change no output. Idempotent.

        Raises:
            ValueError: the model has a part that cannot be converted.
        """

    @abstractmethod
    def input_facts(self, model: nn.Module) -> LayerFacts:
        """Return what the model knows of its stem, where input encodings act; of the first one, if it has several."""

    def stems(self, model: nn.Module) -> list[LayerFacts]:
        """Return what the model knows of each place where input encodings act, which have different widths: one."""
        return [self.input_facts(model)]

    @abstractmethod
    def layer_facts(self, model: nn.Module) -> list[LayerFacts]:
        """Return what the model knows of each attention layer, in order."""

    @abstractmethod
    def mixing_layers(self, model: nn.Module) -> list[int]:
        """Return the layers after which a conditional encoding mixes tokens: the first, or the first of each stage."""

    @abstractmethod
    def encodings(self, model: nn.Module) -> tuple[list[PositionEncoding], list[list[PositionEncoding]]]:
        """Return the encodings of a converted model: its input encodings, and those of each attention layer."""

    @abstractmethod
    def install(self, model: nn.Module, inputs: list[PositionEncoding], layers: list[list[PositionEncoding]]) -> None:
        """Put encodings into a converted model, in place of all that it has. A module in every layer is a shared one.

        Raises:
            ValueError: an encoding that the model has no place for; the model is unchanged then.
        """


def mixes_tokens(encoding: PositionEncoding | type[PositionEncoding]) -> bool:
    """Return whether an encoding acts on the tokens between blocks, not inside attention."""
    return getattr(encoding, "site", None) == "tokens"


def adds_to_outputs(encoding: PositionEncoding) -> bool:
    """Return whether the encoding adds to what attention returns for each token, and so works on values."""
    return getattr(encoding, "site", None) == "values" or getattr(encoding, "value_table", None) is not None


def attention_of(block: nn.Module) -> nn.Module:
    """Return the attention layer of a block: its `attn`, or the block itself where that is both."""
    return getattr(block, "attn", block)


def refuse_pairs(layers: Iterable[Iterable[PositionEncoding]], attention: str) -> None:
    """Refuse what acts on pairs of patches in a model whose attention, as `attention` says, has none.

    Raises:
        ValueError: a rotation or a bias.
    """
    if wrong := [encoding for layer in layers for encoding in layer if encoding.place != "conditional"]:
        raise ValueError(f"{wrong[0].name} acts on pairs of patches, but the attention of {attention}")


def layer_lists(block: nn.Module, encodings: list[PositionEncoding]):
    """Return the lists of a block and what each will hold: encodings inside attention, and those that follow it."""
    mixers = [encoding for encoding in encodings if mixes_tokens(encoding)]
    inside = [encoding for encoding in encodings if encoding not in mixers]
    return (attention_of(block).encodings, inside), (block.mixers, mixers)


def fits_stem(encoding: PositionEncoding, stem: LayerFacts) -> bool:
    """Return whether an input encoding is for a stem: it has the width of its tokens."""
    return getattr(encoding, "dim", stem.dim) == stem.dim


def first(encodings: Iterable[PositionEncoding], kind: type | tuple[type, ...]) -> PositionEncoding | None:
    """Return the first encoding of a kind, if there is one."""
    return next((encoding for encoding in encodings if isinstance(encoding, kind)), None)


def encoding_parameters(model: nn.Module) -> set[str]:
    """Return the full names of the parameters of encodings, wherever they live, that want no weight decay."""
    paths = {module: path for path, module in model.named_modules()}
    return {
        f"{paths[module.owner]}.{name}".removeprefix(".")
        for module in paths
        if isinstance(module, PositionEncoding)
        for name in module.no_weight_decay()
    }


class FixedCoordinates:
    """Mixin for converted models whose layers see coordinates of windows, which no augmentation may move."""

    @property
    def coordinate_augmentation(self) -> None:
        """Return None: there is none, and setting one is an error, so that it is not ignored."""
        return None

    @coordinate_augmentation.setter
    def coordinate_augmentation(self, augmentation: object) -> None:
        if augmentation is not None:
            raise ValueError(
                f"coordinate_augmentation is for models whose layers see the whole grid (ViT, EVA, BEiT), "
                f"not for {type(self).__name__}"
            )


_HOSTS: list[Host] = []


def register_host(host: Host) -> Host:
    """Make a family known to `set_encoding`."""
    _HOSTS.append(host)
    return host


@functools.cache
def discover() -> None:
    """Import every file of this folder, so that adding a file is all it takes.

    The files of families that this timm does not have are left out.
    """
    for module in pkgutil.iter_modules(importlib.import_module(__package__).__path__):
        try:
            importlib.import_module(f"{__package__}.{module.name}")
        except ModuleNotFoundError as error:
            if not (error.name or "").startswith("timm.models."):
                raise


def timm_is_from(version: str) -> bool:
    """Return whether the installed timm is of this version, or newer."""
    installed, asked = ([*map(int, re.findall(r"\d+", text)[:3])] for text in (timm.__version__, version))
    return installed >= asked


def supported_hosts() -> list[str]:
    """Return the names of the timm families that take encodings.

    Example:
        >>> "Hiera" in vp.supported_hosts()
        True
    """
    discover()
    return [host.name for host in _HOSTS]


def find_host(model: nn.Module) -> Host:
    """Return the adapter that accepts a model.

    Raises:
        ValueError: no family fits; names the supported ones. Or the family is one of a newer timm.
    """
    discover()
    kind = type(model)
    for host in _HOSTS:
        if host.accepts(model):
            if not timm_is_from(host.since):
                raise ValueError(f"a {kind.__name__} needs timm {host.since} or newer; this is timm {timm.__version__}")
            return host
    families = ", ".join(host.name for host in _HOSTS)
    elsewhere = "" if kind.__module__.startswith("timm.") else f"; this one is from {kind.__module__}"
    raise ValueError(
        f"{kind.__name__} is not a supported host; supported: timm's models, as "
        f"timm.create_model('vit_base_patch16_224') gives them, of the families {families}{elsewhere}"
    )
