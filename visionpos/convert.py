"""timm models with a chosen encoding."""

from __future__ import annotations

from typing import Any

import timm
from torch import nn

from .encoding import PositionEncoding
from .hosts.host import Facts, Host, find_host, mixes_tokens, register_host, supported_hosts
from .registry import Spec, constructor_parameters, create_encoding, get_encoding_class, parse_spec
from .weights.load import load_weights
from .weights.save import remember_encoding

__all__ = [
    "Host",
    "MaskedAutoencoder",
    "SimMIM",
    "create_model",
    "get_encoding",
    "load_weights",
    "register_host",
    "set_encoding",
    "supported_hosts",
]


def create_model(name: str, encoding: Spec | None = None, **kwargs: Any) -> nn.Module:
    """`timm.create_model`, then `set_encoding`.

    Args:
        name: a timm model name.
        encoding: an encoding spec; None keeps the model's own.
        kwargs: everything that `timm.create_model` takes: pretrained, img_size, patch_size, num_classes ...

    Raises:
        ValueError: an unknown encoding or option, or a model that is no host. Checked before the model is built.
    """
    spec = None if encoding is None else parse_spec(encoding)
    model = timm.create_model(name, **kwargs)
    return model if spec is None else _set_encoding(model, spec)


def set_encoding(model: nn.Module, encoding: Spec) -> nn.Module:
    """Replace what encodes position in a timm model, in place.

    An encoding that the model has already, asked for by its name alone, stays as it is, weights and all; with options
    it is built anew. All other weights stay.

    Args:
        model: a timm model of a supported family, converted or not.
        encoding: a name, names joined by "+", a dict {"name": ..., **options}, an encoding, or a list of those;
            "none" removes every position. An encoding given as an instance serves all layers.

    Returns:
        The model.

    Raises:
        ValueError: an unknown encoding or option, dimensions that do not fit, or a model that is no host.
    """
    return _set_encoding(model, parse_spec(encoding))


def get_encoding(model: nn.Module) -> list[PositionEncoding]:
    """What encodes position in a model: input encodings first, then those of the attention layers in order.

    A model that was not converted yet is prepared for encodings, which changes neither its output nor its names.

    Raises:
        ValueError: the model is no host.
    """
    host = find_host(model)
    host.prepare(model)
    inputs, layers = host.encodings(model)
    return list(dict.fromkeys([*inputs, *(encoding for layer in layers for encoding in layer)]))


def _set_encoding(model: nn.Module, spec: list) -> nn.Module:
    host = find_host(model)
    host.prepare(model)
    old_inputs, old_layers = host.encodings(model)
    input_facts, layer_facts = host.input_facts(model), host.layer_facts(model)
    inputs: list[PositionEncoding] = []
    layers: list[list[PositionEncoding]] = [[] for _ in layer_facts]
    for item in spec:
        cls = type(item) if isinstance(item, PositionEncoding) else get_encoding_class(item[0])
        if cls.place == "input":
            inputs += _build(item, [input_facts], [old_inputs])
        elif cls.place != "none":
            chosen = host.mixing_layers(model) if mixes_tokens(cls) else range(len(layers))
            built = _build(item, [layer_facts[i] for i in chosen], [old_layers[i] for i in chosen])
            for index, encoding in zip(chosen, built, strict=True):
                layers[index].append(encoding)
    reference = next(model.parameters())
    for encoding in {*inputs, *(encoding for layer in layers for encoding in layer)}:
        encoding.to(device=reference.device, dtype=reference.dtype).train(model.training)
    host.install(model, inputs, layers)
    remember_encoding(model, spec, {type(encoding) for place in (old_inputs, *old_layers) for encoding in place})
    return model


def _build(item, facts: list[Facts], old: list[list[PositionEncoding]]) -> list[PositionEncoding]:
    """One encoding for each place in the model that `facts` describes; the same module where it can be shared."""
    if isinstance(item, PositionEncoding):
        for fact in facts:
            _check_fit(item, fact)
        return [item] * len(facts)
    name, options = item
    cls = get_encoding_class(name)
    built: list[PositionEncoding] = []
    for fact, present in zip(facts, old, strict=True):
        kept = [] if options else [encoding for encoding in present if type(encoding) is cls]
        if kept:
            built.append(kept[0])
        elif cls.shared and built and all(getattr(built[-1], k, v) == v for k, v in fact.items() if k != "layer"):
            built.append(built[-1])
        else:
            accepted = constructor_parameters(cls)
            fact = {"reference_shape": fact["feat_shape"], **fact}
            if getattr(cls, "content_source", None) == "x":  # it reads what attention gets, not what it returns
                fact["dim"] = fact.get("dim_in", fact["dim"])
            known = {key: value for key, value in fact.items() if key in accepted}
            built.append(create_encoding(name, **{**known, **options}))
    return built


def _check_fit(encoding: PositionEncoding, facts: Facts) -> None:
    for key in ("dim", "num_heads", "head_dim"):
        if key in facts and getattr(encoding, key, facts[key]) != facts[key]:
            raise ValueError(
                f"{encoding.name} was built with {key}={getattr(encoding, key)}, but the model has {facts[key]}"
            )


# registers the hosts and timm entry points
from . import timm_models as registered  # noqa: E402, F401
from .hosts import beit, cait, eva, hiera, relpos, sam, swin, swin_v2, vit  # noqa: E402, F401
from .masked import decoder  # noqa: E402, F401
from .masked.mae import MaskedAutoencoder  # noqa: E402
from .masked.simmim import SimMIM  # noqa: E402
