"""What share of timm's pretrained weights can be converted, counted over its registry; no weights are needed.

Every architecture is asked for its class, and those of a supported class are built on the meta device with as few
blocks as they can have, and converted.
"""

from __future__ import annotations

import inspect
import sys
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import timm
import torch
from timm.models import build_model_with_cfg, model_entrypoint
from torch import nn

from ..hosts.host import find_host

# classes of timm with attention and positions that are no host yet: what tells their tokens apart
OTHERS = {
    "CoaT": "a convolution on the tokens and one on the values of its factorised attention",
    "ConVit": "positional self-attention whose gate has a parameter for each head",
    "CrossVit": "a learned table for each of two grids, which exchange class tokens",
    "CSATv2": "convolutions, and attention in the last stage",
    "DaVit": "convolutions; half of its attention is over channels",
    "DeepseekVit": "a rotation",
    "EdgeNeXt": "Fourier features; its attention is over channels",
    "EfficientFormer": "LeViT's table on a fixed grid of 7 x 7 tokens",
    "EfficientFormerV2": "LeViT's table before a mixture of heads",
    "EfficientVitMsra": "LeViT's table; its heads work one after the other",
    "Gemma4Vit": "two tables, one for each axis, and a rotation",
    "GlobalContextVit": "Swin's table; half of its queries are global",
    "HieraDet": "a table that repeats in windows, as Hiera's",
    "Levit": "LeViT's table",
    "LevitDistilled": "LeViT's table",
    "MaxxVit": "tables in windows and dilated grids",
    "MultiScaleVit": "one table for each axis; queries and keys are pooled",
    "NaFlexVit": "a table that is resized for each picture, or a rotation",
    "Nest": "a learned table for each block of the picture",
    "PoolingVisionTransformer": "a learned table",
    "PyramidVisionTransformerV2": "a convolution in the MLP; keys are pooled",
    "Qwen3Vit": "a learned table and a rotation",
    "SwinTransformerV2Cr": "a network of log-spaced offsets",
    "TinyVit": "LeViT's table",
    "TNT": "learned tables of patches and of pixels in them",
    "Twins": "a convolution behind the first block of each stage; keys are pooled",
    "Visformer": "a learned table in each stage",
    "VOLO": "a learned table; outlook attention in the first stage",
    "Xcit": "Fourier features; its attention is over channels",
}


@dataclass
class Row:
    """The architectures of one class.

    Attributes:
        family: the host's name, empty for a class that is none.
        architectures: how many timm has.
        tags: how many pretrained weights it has for them.
        converted: how many of these can be converted.
        reasons: why the others cannot, with their tags; one sentence for a class that is no host.
    """

    family: str = ""
    architectures: int = 0
    tags: int = 0
    converted: int = 0
    reasons: Counter[str] = field(default_factory=Counter)


class _Found(Exception):
    """What an architecture is, raised in the place where timm would build it."""


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
        with suppress(Exception), torch.device("meta"):  # options for each block; a hybrid's backbone that has weights
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


def census(progress: Callable[[str], None] = lambda architecture: None) -> dict[str, Row]:
    """Return a row for each class of timm's with attention and positions, most pretrained tags first."""
    tags = Counter(tag.split(".")[0] for tag in timm.list_pretrained())
    rows: dict[str, Row] = {}
    with ExitStack() as stack:
        for name, module in list(sys.modules.items()):
            if name.startswith("timm.models.") and hasattr(module, "build_model_with_cfg"):
                stack.enter_context(patch.object(module, "build_model_with_cfg", _build))
        for architecture in timm.list_models():
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
                row.reasons[why] += tags[architecture]
    return dict(sorted(rows.items(), key=lambda item: -item[1].tags))
