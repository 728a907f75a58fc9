"""What timm has to write down so that a saved model can be built again with its encoding.

`timm.models.save_for_hf(model, directory)` writes the arguments that timm recorded when it built the model. A
conversion adds its own to them, and names an architecture of this package, so that
`timm.create_model("local-dir:<directory>", pretrained=True)` converts before it loads the weights, and fails loudly
where visionpos is not imported. timm records arguments since 1.0.31; with an older one, give them by hand:
`save_for_hf(model, directory, model_args={"encoding": ..., "host": "vit_tiny_patch16_224", ...})`.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from ..encoding import PositionEncoding
from ..registry import constructor_parameters, get_encoding_class, parse_spec

ARCHITECTURE = "visionpos"  # the entry point that converts any timm model, and the prefix of the others
Item = tuple[str, dict[str, Any]] | PositionEncoding  # of a spec, as `parse_spec` returns it
FACTS = {"dim", "num_heads", "head_dim", "feat_shape", "reference_shape", "num_prefix_tokens", "layer", "depth"}


def remember_encoding(model: nn.Module, spec: list, present: set[type[PositionEncoding]]) -> None:
    """Record a conversion in the arguments that timm saves.

    Args:
        model: the converted model. One that timm's factory did not build has no arguments, and cannot be saved so.
        spec: what it was converted to, as `parse_spec` returns it. An encoding given as an instance is recorded as it
            is, and `save_for_hf` says that it cannot be written down.
        present: classes of the encodings that it had before, which stay where they are asked for by name alone.
    """
    config = getattr(model, "pretrained_cfg", None)
    if not config or "architecture" not in config:
        return
    arguments = dict(getattr(model, "_model_args", {}))
    before = {_name(item): item for item in parse_spec(arguments.get("encoding", []))}
    kept = [isinstance(item, tuple) and not item[1] and get_encoding_class(item[0]) in present for item in spec]
    arguments["encoding"] = [
        _written(before.get(_name(item), item) if stays else _in_full(item))
        for item, stays in zip(spec, kept, strict=True)
    ]
    size = getattr(model, "_traits", {}).get("img_size")
    if size is not None and not ("encoded_size" in arguments and any(kept)):
        arguments["encoded_size"] = tuple(size)
    if not config["architecture"].startswith(ARCHITECTURE):
        arguments["host"] = config["architecture"]
        model.pretrained_cfg = model.default_cfg = {**config, "architecture": ARCHITECTURE}
    model._model_args = arguments


def _name(item: Item) -> str:
    return item.name if isinstance(item, PositionEncoding) else item[0]


def _written(item: Item) -> dict[str, Any] | PositionEncoding:
    return item if isinstance(item, PositionEncoding) else {"name": item[0], **item[1]}


def _in_full(item: Item) -> Item:
    """With its default options, so that it is built anew and does not become the host's own of the same name."""
    if isinstance(item, PositionEncoding):
        return item
    parameters = constructor_parameters(get_encoding_class(item[0])).values()
    defaults = {p.name: p.default for p in parameters if p.default is not p.empty and p.name not in FACTS}
    return item[0], {**defaults, **item[1]}
