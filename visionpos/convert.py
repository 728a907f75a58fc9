"""Conversion of timm models to a chosen encoding: `set_encoding`, `get_encoding`.

A conversion is written down where timm writes the arguments that it built a model with, so that a model that was saved
by `timm.models.save_for_hf(model, directory)` comes back with its encoding: every encoding with every option that it
was built with, the host's own ones by their name. The architecture that is written down is one of this package, so that
`timm.create_model("local-dir:<directory>", pretrained=True)` converts before it loads the weights, and fails loudly
where visionpos is not imported. timm records arguments since 1.0.31; with an older one, give them by hand:
`save_for_hf(model, directory, model_args={"encoding": ..., "host": "vit_tiny_patch16_224", ...})`.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest
from typing import Any

from torch import nn

from .encoding import LayerFacts, PositionEncoding
from .hosts.host import Host, discover, find_host, first, fits_stem, mixes_tokens
from .hosts.parameters import copy_encoding, has_parameters
from .positions import Positions
from .registry import (
    FIXED,
    Spec,
    check_agreement,
    complete_options,
    get_encoding_class,
    is_native,
    is_registered,
    parse_spec,
)

__all__ = ["ARCHITECTURE", "convert_model", "get_encoding", "items_of", "set_encoding"]

ARCHITECTURE = "visionpos"  # the entry point that converts any timm model, and the prefix of the others
Item = tuple[str, dict[str, Any]] | PositionEncoding  # of a spec, as `parse_spec` returns it
Layers = list[list[PositionEncoding]]


def set_encoding(model: nn.Module, encoding: Spec) -> nn.Module:
    """Replace what encodes position in a timm model, in place.

    An encoding that the model has already, asked for by its name alone, stays as it is, weights and all; with options
    it is built anew. All other weights stay. One module serves all layers if it has no parameters and is built alike
    in all of them; otherwise every layer has its own.

    Args:
        model: a timm model of a supported family, converted or not.
        encoding: a name, names joined by "+", a dict {"name": ..., **options}, an encoding, or a list of those;
            "none" removes every position. A dict may say which `layers` it is for: [0, 5], "3::4", "::2", "-4:" (the
            last four). An encoding given as an object stays where the model has it; one that the model has not serves
            all layers, and of one that belongs to another model a copy does. So
            `set_encoding(model, get_encoding(model))` changes nothing.

    Returns:
        The model.

    Raises:
        ValueError: an unknown encoding or option, one that does not fit the model or is there twice, or a model that is
            no host. The model is unchanged then.

    Example:
        >>> model = timm.create_model("vit_tiny_patch16_224", depth=2)
        >>> model = vp.set_encoding(model, ["learned", {"name": "rope_axial", "temperature": 100.0}])
        >>> [encoding.name for encoding in vp.get_encoding(model)]
        ['learned', 'rope_axial']
        >>> model = vp.set_encoding(model, {"name": "rope_mixed", "layers": "1:"})  # not in the first layer
        >>> [len(block.attn.encodings) for block in model.blocks]
        [0, 1]
    """
    return convert_model(model, items_of(encoding))


def get_encoding(model: nn.Module) -> list[PositionEncoding]:
    """Return the encodings of a model: input encodings first, then those of the attention layers in order.

    A model that was not converted yet is prepared for encodings, which changes neither its output nor its names.

    Raises:
        ValueError: the model is no host.

    Example:
        >>> swin = timm.create_model("swin_tiny_patch4_window7_224", depths=(1, 2), num_heads=(3, 6))
        >>> [(encoding.name, encoding.num_heads) for encoding in vp.get_encoding(swin)]
        [('relative_table', 3), ('relative_table', 6), ('relative_table', 6)]
    """
    _, inputs, layers = _converted(model)
    return _distinct(inputs, layers)


def items_of(spec: Spec) -> list[Item]:
    """Return the items of a spec; a name may be one that only a family has, and all families are known from here on."""
    discover()
    return parse_spec(spec)


def _converted(model: nn.Module) -> tuple[Host, list[PositionEncoding], Layers]:
    """Return the host of a model and what the model has, converted if it was not yet."""
    host = find_host(model)
    host.convert(model)
    inputs, layers = host.encodings(model)
    for encoding in _distinct(inputs, layers):
        if encoding._spec is None:  # the host's own, which comes back with the host
            encoding._spec = {"name": encoding.name} if is_registered(type(encoding)) else {}
            if encoding in inputs and encoding._spec and len(host.stems(model)) > 1:
                encoding._spec["dim"] = encoding.dim  # which says the stem
    return host, inputs, layers


def _distinct(inputs: list[PositionEncoding], layers: Layers) -> list[PositionEncoding]:
    return list(dict.fromkeys([*inputs, *(encoding for layer in layers for encoding in layer)]))


def convert_model(model: nn.Module, spec: list[Item]) -> nn.Module:
    """Convert a model in place to the items of a spec, as `set_encoding` does, and return it."""
    host, old_inputs, old_layers = _converted(model)
    stems, layer_facts = host.stems(model), host.layer_facts(model)
    if not layer_facts:
        raise ValueError("the model has no attention layers (its depth is 0)")
    old_stems = [[encoding for encoding in old_inputs if fits_stem(encoding, stem)] for stem in stems]
    by_stem: Layers = [[] for _ in stems]
    layers: Layers = [[] for _ in layer_facts]
    for item in spec:
        cls = type(item) if isinstance(item, PositionEncoding) else get_encoding_class(item[0])
        if cls.place == "input":
            chosen = _choose_stems(item, stems)
            places, facts, old = ([of[i] for i in chosen] for of in (by_stem, stems, old_stems))
        else:
            chosen = [] if cls.place == "none" else _choose_layers(item, cls, host.mixing_layers(model), old_layers)
            places, facts, old = ([of[i] for i in chosen] for of in (layers, layer_facts, old_layers))
        for place, encoding in zip(places, _build(item, facts, old), strict=True):
            named = not isinstance(item, PositionEncoding)
            if any(other is encoding or (named and other._spec == encoding._spec) for other in place):
                raise ValueError(f"{encoding.name} is asked for twice, with the same options")
            _check_width(encoding, place)
            place.append(encoding)
    inputs = [encoding for stem in by_stem for encoding in stem]
    reference, new = next(model.parameters()), _distinct(inputs, layers)
    if (inputs, layers) == (old_inputs, old_layers):
        if all(encoding._spec for encoding in new):
            _write_down(model, host)
        return model
    for encoding in new:
        encoding.to(device=reference.device, dtype=reference.dtype).train(model.training)
    host.install(model, inputs, layers)
    for encoding in _distinct(old_inputs, old_layers):
        encoding._spec = encoding._spec if encoding in new else None
    for encoding in new:
        encoding._spec = {} if encoding._spec is None else encoding._spec
    _write_down(model, host)
    return model


def _choose_stems(item: Item, stems: list[LayerFacts]) -> Sequence[int]:
    """Return the stems that an input encoding is for: all of its width, which only a name alone leaves open."""
    width = getattr(item, "dim", None) if isinstance(item, PositionEncoding) else item[1].get("dim")
    return [index for index, stem in enumerate(stems) if width in (None, stem.dim)] or range(len(stems))


def _choose_layers(item: Item, cls: type[PositionEncoding], mixing: list[int], old: Layers) -> Sequence[int]:
    """Return the layers that an item of a spec is for."""
    default = mixing if mixes_tokens(cls) else range(len(old))
    if is_native(cls):
        default = [index for index, layer in enumerate(old) if first(layer, cls)] or default
    if isinstance(item, PositionEncoding):
        return [index for index, layer in enumerate(old) if item in layer] or default
    chosen = item[1].get("layers", default)
    if isinstance(chosen, str):
        bounds = (int(bound) if bound.strip() else None for bound in chosen.split(":"))
        if indices := range(len(old))[slice(*bounds)]:
            return sorted(indices)
        raise ValueError(f"{cls.name}: layers {chosen!r} are none of the {len(old)} layers of the model")
    if not chosen or not all(0 <= index < len(old) for index in chosen) or len(set(chosen)) < len(chosen):
        got = f"got {list(chosen)}" if chosen else "got none"
        raise ValueError(f"{cls.name}: layers must be different indices from 0 to {len(old) - 1}, {got}")
    return chosen


def _build(item: Item, facts: list[LayerFacts], old: Layers) -> list[PositionEncoding]:
    """Return one encoding for each place in the model that `facts` describe; the same module where it can be shared."""
    if isinstance(item, PositionEncoding):
        for fact in facts:
            _check_fit(item, fact)
        elsewhere = item._spec is not None and not any(item in present for present in old)
        return [copy_encoding(item) if elsewhere else item] * len(facts)
    name, options = item[0], {key: value for key, value in item[1].items() if key != "layers"}
    cls, built = get_encoding_class(name), []
    for fact, present in zip(facts, old, strict=True):
        kept = next((encoding for encoding in present if type(encoding) is cls and options.keys() <= {"dim"}), None)
        if kept is not None:
            _check_fit(kept, fact)
            built.append(kept)
            continue
        spec = {"name": name, **complete_options(cls, options, fact)}
        alike = (other for other in built if other._spec == spec and not has_parameters(other))
        encoding = next(alike, None) or cls(**{key: value for key, value in spec.items() if key != "name"})
        _check_axes(encoding, fact)
        encoding._spec = spec
        built.append(encoding)
    return built


def _check_fit(encoding: PositionEncoding, facts: LayerFacts) -> None:
    dimensions = [key for key in FIXED if key not in ("layer", "depth") and hasattr(encoding, key)]
    check_agreement(type(encoding), {key: getattr(encoding, key) for key in dimensions}, facts)
    _check_axes(encoding, facts)


def _check_axes(encoding: PositionEncoding, facts: LayerFacts) -> None:
    """Check that the tokens of a layer have as many coordinates as an encoding takes; ValueError if not."""
    encoding.promote(Positions.grid(facts.feat_shape))


def _check_width(encoding: PositionEncoding, before: list[PositionEncoding]) -> None:
    """Check that queries still have the channels that an encoding of them was built for.

    Raises:
        ValueError: one in front of it gives them more.
    """
    wider = next((other for other in before if getattr(other, "widens", False)), None)
    if wider is not None and (encoding.place == "rotary" or (encoding.content_dependent and encoding.place == "bias")):
        raise ValueError(
            f"encoding: {encoding.name} turns or reads queries as they are, and {wider.name} gives them more channels: "
            f"name {encoding.name} in front of {wider.name}"
        )


def _write_down(model: nn.Module, host: Host) -> None:
    """Record a conversion in the arguments that timm saves. A model that timm's factory did not build has none.

    An encoding that was given as an object is recorded as it is, and `save_for_hf` says that it cannot be written down.
    """
    config = getattr(model, "pretrained_cfg", None)
    if not config or "architecture" not in config:
        return
    inputs, layers = host.encodings(model)
    arguments = dict(getattr(model, "_model_args", {}))
    arguments["encoding"] = [encoding._spec or encoding for encoding in inputs]
    for encoding, chosen in _grouped(layers):
        everywhere = host.mixing_layers(model) if mixes_tokens(encoding) else list(range(len(layers)))
        only = {} if chosen == everywhere else {"layers": chosen}
        arguments["encoding"].append({**encoding._spec, **only} if encoding._spec else encoding)
    arguments["encoding"] = arguments["encoding"] or "none"
    size = getattr(model, "_traits", {}).get("img_size")
    if size is not None:
        arguments.setdefault("encoded_size", tuple(size))
    if not config["architecture"].startswith(ARCHITECTURE):
        arguments["host"] = config["architecture"]
        model.pretrained_cfg = model.default_cfg = {**config, "architecture": ARCHITECTURE}
    model._model_args = arguments


def _grouped(layers: Layers) -> list[tuple[PositionEncoding, list[int]]]:
    """Return one encoding for all that were built alike and come at the same place in their layers, and these layers.

    The first ones of all layers come first, so that every layer gets its own in the order that it has them in.
    """
    groups: list[tuple[PositionEncoding, list[int]]] = []
    for row in zip_longest(*layers):
        start = len(groups)
        for index, encoding in enumerate(row):
            if encoding is None:
                continue
            alike = (e is encoding or (e._spec and e._spec == encoding._spec) for e, _ in groups[start:])
            found = next((chosen for same, (_, chosen) in zip(alike, groups[start:], strict=True) if same), None)
            if found is None:
                groups.append((encoding, [index]))
            else:
                found.append(index)
    return groups
