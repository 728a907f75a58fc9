"""What share of timm's pretrained weights can be converted, counted over its registry; no weights are needed.

Every architecture is asked for its class, and those of a supported class are built on the meta device with as few
blocks as they can have, and converted.
"""

from __future__ import annotations

import inspect
import sys
from collections import Counter
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import timm
import torch
from timm.models import build_model_with_cfg, model_entrypoint
from torch import nn

from .. import convert  # noqa: F401, every family is registered
from ..hosts.host import find_host

# classes of timm with attention and positions that are no host: what tells their tokens apart
OTHERS = {
    "CSATv2": "convolutions, and attention in the last stage",
    "EdgeNeXt": "Fourier features; its attention is over channels",
}


@dataclass
class Row:
    """Hold what was counted of the architectures of one class.

    Attributes:
        family: the host's name, empty for a class that is none.
        architectures: how many timm has.
        tags: how many pretrained weights it has for them.
        converted: how many of these can be converted.
        reasons: for a host, why it refuses an architecture; for another class, what tells its tokens apart.
    """

    family: str
    architectures: int = 0
    tags: int = 0
    converted: int = 0
    reasons: list[str] = field(default_factory=list)


class _Found(Exception):
    """Say what an architecture is; raised in the place where timm would build it."""


def _shallow(cls: type, options: dict[str, Any]) -> dict[str, Any]:
    """Return the options of an architecture with one block, or one in each stage."""
    known = inspect.signature(cls).parameters
    ones = {name: options.get(name, known[name].default) for name in ("depth", "depths") if name in known}
    return options | {
        name: (1,) * len(depth) if isinstance(depth, (tuple, list)) else 1 for name, depth in ones.items()
    }


def _build_shallow(cls: type, variant: str, options: dict[str, Any]) -> nn.Module:
    """Return a model without weights and with few blocks, or as close to that as the class lets it be."""
    shallow = _shallow(cls, options)
    for chosen in (shallow, options):
        with suppress(Exception), torch.device("meta"):  # options for each block; a backbone that is on another device
            return build_model_with_cfg(cls, variant, False, **chosen)
    return build_model_with_cfg(cls, variant, False, **shallow)


def _build(cls: type, variant: str, pretrained: bool, **options: Any) -> nn.Module:
    """Stand in for timm's `build_model_with_cfg`: raise what the architecture is, and whether it converts."""
    try:
        host = find_host(cls.__new__(cls))
    except ValueError:
        raise _Found(cls.__name__, "", OTHERS.get(cls.__name__, "")) from None
    model = _build_shallow(cls, variant, options)
    try:
        host.convert(model)
    except ValueError as error:
        raise _Found(cls.__name__, host.name, str(error)) from None
    raise _Found(cls.__name__, host.name, "")


def census(pattern: str = "") -> dict[str, Row]:
    """Return a row for each class of timm's with attention and positions, most pretrained weights first.

    Args:
        pattern: of the names of architectures, as `timm.list_models` takes it; all by default.

    Example:
        >>> from visionpos.analysis.census import census
        >>> row = census("cait_xxs*")["Cait"]
        >>> row.family, row.architectures, row.tags, row.converted
        ('Cait (CaiT)', 4, 4, 4)
    """
    tags = Counter(tag.split(".")[0] for tag in timm.list_pretrained())
    rows: dict[str, Row] = {}
    with ExitStack() as stack:
        for name, module in list(sys.modules.items()):
            if name.startswith("timm.models.") and hasattr(module, "build_model_with_cfg"):
                stack.enter_context(patch.object(module, "build_model_with_cfg", _build))
        for architecture in timm.list_models(pattern):
            if model_entrypoint(architecture).__module__.startswith("visionpos"):
                continue
            try:
                model_entrypoint(architecture)(pretrained=False)
            except _Found as found:
                cls, host, why = found.args
            if host or why:
                row = rows.setdefault(cls, Row(host))
                row.architectures += 1
                row.tags += tags[architecture]
                row.converted += 0 if why else tags[architecture]
                row.reasons += [why] if why and why not in row.reasons else []
    return dict(sorted(rows.items(), key=lambda item: -item[1].tags))


def share(rows: Mapping[str, Row]) -> str:
    """Return the first line of the page: what share of the pretrained weights can be converted."""
    tags, converted = (sum(getattr(row, name) for row in rows.values()) for name in ("tags", "converted"))
    return (
        f"{converted} of the {tags} pretrained weights ({converted / tags:.0%}) that timm {timm.__version__} has for "
        "models with attention and positions can be converted."
    )


def coverage(rows: Mapping[str, Row]) -> str:
    """Return the share, and a table with a line for each class."""
    lines = [share(rows), "", "| class | host | architectures | weights | converted | what does not, or what it has |"]
    lines.append("|" + " --- |" * 6)
    for cls, row in rows.items():
        cells = cls, row.family or "-", row.architectures, row.tags, row.converted, "; ".join(row.reasons)
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines) + "\n"
