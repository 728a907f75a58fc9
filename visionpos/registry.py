"""The registry of encodings by name, their specs, and errors that say what would have been right."""

from __future__ import annotations

import fnmatch
import functools
import importlib
import inspect
import pkgutil
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields
from typing import Any, overload

from .encoding import LayerFacts, PositionEncoding
from .names import BiasName, ConditionalName, InputName, RotaryName
from .options import check_values, shown
from .places import BiasEncoding, ConditionalEncoding, InputEncoding, RotaryEncoding
from .suggestion import closest

FOLDERS = ("input", "rotary", "bias", "conditional")
PLACES = (*FOLDERS, "none")
CLAIMS = ("learnable", "translation_invariant", "content_dependent", "continuous", "extrapolation")
FACTS = tuple(field.name for field in fields(LayerFacts))
FIXED = ("dim", "num_heads", "head_dim", "num_prefix_tokens", "layer", "depth")  # facts that no option can change

Spec = str | Mapping[str, Any] | PositionEncoding | Iterable[Any]  # a list holds specs

_REGISTRY: dict[str, type[PositionEncoding]] = {}
_NATIVE: dict[str, type[PositionEncoding]] = {}  # of hosts alone: a model that has one keeps it by its name


def register_encoding(name: str) -> Callable[[type[PositionEncoding]], type[PositionEncoding]]:
    """Register a class: as its decorator, makes `name` work in `create_encoding`, `create_model`, configs and commands.

    Raises:
        ValueError: another class has the name already, or the class does not say its place, or its `from_model` names
            what no model knows.

    Example:
        >>> @vp.register_encoding("uphill")
        ... class Uphill(vp.BiasEncoding):
        ...     def formula(self, positions):  # higher for keys further up
        ...         return lambda head, dy, dx: dy
        >>> vp.create_model("vit_tiny_patch16_224", encoding="uphill", depth=1).blocks[0].attn.num_heads
        3
    """

    def register(cls: type[PositionEncoding]) -> type[PositionEncoding]:
        if not cls.__module__.startswith(f"{__package__}."):  # else this may be the import by `discover`
            discover()
        known = _REGISTRY.get(name, cls)
        if (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
            raise ValueError(f"the encoding name {name!r} is taken by {known.__module__}.{known.__qualname__}")
        if getattr(cls, "place", None) not in PLACES:
            raise ValueError(f"{cls.__qualname__}.place must be one of {', '.join(PLACES)}")
        for key in cls.from_model:
            if key not in FACTS:
                raise ValueError(f"{cls.__qualname__}.from_model names {key!r}; a model knows {', '.join(FACTS)}")
        cls.name = name
        _REGISTRY[name] = cls
        return cls

    return register


def register_native(cls: type[PositionEncoding]) -> type[PositionEncoding]:
    """Make the name of an encoding that only a host can have known to specs: it can be kept, and not be built."""
    _NATIVE[cls.name] = cls
    return cls


@functools.cache
def discover() -> None:
    """Import every file in the folders of encodings, so that adding a file is all it takes."""
    importlib.import_module(f"{__package__}.none")
    for folder in FOLDERS:
        package = importlib.import_module(f"{__package__}.{folder}")
        for module in pkgutil.iter_modules(package.__path__):
            importlib.import_module(f"{package.__name__}.{module.name}")


def hint(word: str, valid: Iterable[str]) -> str:
    """Return the end of an error message's first sentence: the valid word that is likely meant, or a full stop."""
    meant = closest(word, valid)
    return f"; did you mean {meant!r}?" if meant else "."


def list_encodings(pattern: str = "*", *, place: str | None = None) -> list[str]:
    """Return the names of the encodings, sorted by place and name.

    Args:
        pattern: shell-style filter, such as "rope*".
        place: only those of "input", "rotary", "bias", "conditional" or "none".

    Example:
        >>> vp.list_encodings("alibi*")
        ['alibi', 'alibi2d']
        >>> vp.list_encodings(place="conditional")
        ['lepe', 'peg']
    """
    if place is not None and place not in PLACES:
        raise ValueError(f"place must be one of {', '.join(PLACES)}, got {place!r}{hint(place, PLACES)}")
    discover()
    found = [n for n, c in _REGISTRY.items() if fnmatch.fnmatch(n, pattern) and place in (None, c.place)]
    return sorted(found, key=lambda name: (PLACES.index(_REGISTRY[name].place), name))


def get_encoding_class(name: str) -> type[PositionEncoding]:
    """Return the class of a registered name.

    Raises:
        ValueError: no encoding has it; lists the valid names.
    """
    discover()
    if not isinstance(name, str):
        raise ValueError(f"here an encoding is a name, one of {', '.join(list_encodings())}; got {name!r}")
    if name in _NATIVE:
        return _NATIVE[name]
    if name not in _REGISTRY:
        raise ValueError(f"unknown encoding {name!r}{hint(name, _REGISTRY)} Valid: {', '.join(list_encodings())}")
    return _REGISTRY[name]


def is_native(cls: type[PositionEncoding]) -> bool:
    """Return whether a class is for what a host has of its own, which no other layer can get."""
    return _NATIVE.get(cls.name) is cls


def is_registered(cls: type[PositionEncoding]) -> bool:
    """Return whether a class is the one of its name."""
    discover()
    return is_native(cls) or _REGISTRY.get(cls.name) is cls


def constructor_parameters(cls: type) -> dict[str, inspect.Parameter]:
    """Return the named constructor parameters of a class, with those that it passes on to its bases."""
    found: dict[str, inspect.Parameter] = {}
    for base in cls.__mro__:
        if "__init__" not in vars(base):
            continue
        parameters = list(inspect.signature(base.__init__).parameters.values())[1:]
        for parameter in parameters:
            if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
                found.setdefault(parameter.name, parameter)
        if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
            break
    return found


def filled_parameters(cls: type[PositionEncoding]) -> list[str]:
    """Return the constructor parameters that a model fills in: fields of `LayerFacts`, see `PositionEncoding`."""
    named = {key for base in cls.__mro__ for key in vars(base).get("from_model", ())}
    parameters = constructor_parameters(cls).values()
    return [p.name for p in parameters if p.name in FACTS and (p.default is p.empty or p.name in named)]


def known_options(cls: type[PositionEncoding], facts: LayerFacts) -> dict[str, Any]:
    """Return what a model fills in for an encoding of this class in the layer that `facts` describe."""
    known = {key: getattr(facts, key) for key in filled_parameters(cls)}
    if "dim" in known and getattr(cls, "content_source", None) == "x":  # it reads what attention gets
        known["dim"] = facts.dim_in
    elif "dim" in known and getattr(cls, "site", None) == "values" and facts.value_dim is not None:
        known["dim"] = facts.value_dim
    return {key: value for key, value in known.items() if value is not None}


def required_options(cls: type[PositionEncoding], facts: LayerFacts) -> dict[str, Any]:
    """Return the required constructor arguments that `facts` tell, for an encoding that is built outside any model."""
    parameters = constructor_parameters(cls)
    return {k: v for k, v in known_options(cls, facts).items() if parameters[k].default is parameters[k].empty}


def check_agreement(cls: type[PositionEncoding], given: Mapping[str, Any], facts: LayerFacts) -> None:
    """Check that nothing that is given contradicts what the model knows.

    Raises:
        ValueError: another width, number of heads or of prefix tokens (0 stands for no rows), layer or depth.
    """
    for key, value in known_options(cls, facts).items():
        accepted = {value, 0} if key == "num_prefix_tokens" else {value}
        if key in FIXED and given.get(key, value) not in accepted:
            raise ValueError(f"{cls.name} was built with {key}={given[key]}, but the model has {value}")


def complete_options(cls: type[PositionEncoding], options: Mapping[str, Any], facts: LayerFacts) -> dict[str, Any]:
    """Return every option of an encoding in one layer: what was asked for, else what the model knows, else defaults.

    Raises:
        ValueError: an option that contradicts the model, or a required one that neither was given nor is known.
    """
    check_agreement(cls, options, facts)
    defaults = {p.name: p.default for p in constructor_parameters(cls).values() if p.default is not p.empty}
    return require_all(cls, {**defaults, **known_options(cls, facts), **options})


def require_all(cls: type[PositionEncoding], options: dict[str, Any]) -> dict[str, Any]:
    """Return the options, lists as tuples, if nothing that the constructor requires is missing.

    Raises:
        ValueError: names what is missing, and what a model could have filled in.
    """
    required = [p.name for p in constructor_parameters(cls).values() if p.default is p.empty]
    missing = [key for key in required if key not in options]
    if missing:
        unknown = "" if set(missing) <= set(FACTS) else f"; a model fills in only {', '.join(FACTS)}"
        raise ValueError(f"{cls.name} needs {', '.join(missing)}{unknown}")
    return {key: as_tuple(value) for key, value in options.items()}


def check_options(cls: type[PositionEncoding], options: Mapping[str, Any]) -> None:
    """Check that every option exists and has a value of its type and in its range.

    Raises:
        ValueError: one line that names the option, what was given and what is accepted.
    """
    parameters = constructor_parameters(cls)
    for key in options:
        if key not in parameters:
            valid = ", ".join(parameters) or "none"
            raise ValueError(f"{cls.name} has no option {key!r}{hint(str(key), parameters)} Valid: {valid}")
    check_values(cls, options)


@overload
def create_encoding(name: InputName, **options: Any) -> InputEncoding: ...
@overload
def create_encoding(name: RotaryName, **options: Any) -> RotaryEncoding: ...
@overload
def create_encoding(name: BiasName, **options: Any) -> BiasEncoding: ...
@overload
def create_encoding(name: ConditionalName, **options: Any) -> ConditionalEncoding: ...
@overload
def create_encoding(name: str | Mapping[str, Any], **options: Any) -> PositionEncoding: ...
def create_encoding(name: str | Mapping[str, Any], **options: Any) -> PositionEncoding:
    """Build one encoding: `create_encoding("sincos2d", dim=192, preset="mae")`.

    Args:
        name: a registered name, or a dict {"name": ..., **options}.
        options: the constructor's arguments; see `encoding_info(name)["options"]`.

    Raises:
        ValueError: an unknown name or option, a wrong or a missing value. Lists what is valid.

    Example:
        >>> encoding = vp.create_encoding("sincos2d", dim=192, preset="timm")
        >>> encoding.embed(vp.Positions.grid((14, 10))).shape
        torch.Size([140, 192])
    """
    if isinstance(name, Mapping):
        ((name, given),) = parse_spec(name)
        options = {**given, **options}
    cls = get_encoding_class(name)
    check_options(cls, options)
    return cls(**require_all(cls, options))


def as_tuple(value: Any) -> Any:
    """Return a list, as YAML and JSON have it, as the tuple that constructors take; anything else as it is."""
    return tuple(map(as_tuple, value)) if isinstance(value, list) else value


def parse_spec(spec: Spec) -> list[tuple[str, dict[str, Any]] | PositionEncoding]:
    """Return a spec as a flat list of (name, options) and encoding instances; names and options are checked.

    Args:
        spec: a name, names joined by "+", a dict {"name": ..., **options}, an encoding, or a list of those. A dict may
            hold `layers` besides, those that it is for: a list of indices, or a slice of them, "3::4", "::2" or "-4:".

    Raises:
        ValueError: unknown names or options, or a spec of another type.
    """
    if isinstance(spec, PositionEncoding):
        return [spec]
    if isinstance(spec, str):
        names = [name.strip() for name in spec.split("+")]
        return [(get_encoding_class(name).name, {}) for name in names]
    if isinstance(spec, Mapping):
        options = dict(spec)
        if not isinstance(options.get("name"), str):
            raise ValueError(f"an encoding given as a dict needs a 'name', got keys: {shown(list(options))}")
        cls, layers = get_encoding_class(options.pop("name")), options.pop("layers", None)
        if layers is not None and not _names_layers(layers):
            raise ValueError(f"{cls.name}: layers must be a list of integers or a slice such as '3::4', got {layers!r}")
        if layers is not None and cls.place in ("input", "none"):
            raise ValueError(f"{cls.name} acts in no layer, and takes no layers; got {layers!r}")
        check_options(cls, options)
        return [(cls.name, options if layers is None else {**options, "layers": layers})]
    if isinstance(spec, Iterable):
        return [item for part in spec for item in parse_spec(part)]
    raise ValueError(f"an encoding is a name, a dict, an encoding or a list of those, got {type(spec).__name__}")


def _names_layers(layers: Any) -> bool:
    if isinstance(layers, str):
        return re.fullmatch(r"\s*(-?\d+)?\s*:\s*(-?\d+)?\s*(:\s*(-?[1-9]\d*)?\s*)?", layers) is not None
    return isinstance(layers, (list, tuple)) and all(type(index) is int for index in layers)


def encoding_info(name: str) -> dict[str, Any]:
    """Return what is known of an encoding without building it, as a dict.

    Returns:
        name, place, paper, summary, formula and shapes (`doc`), `required` and `options` with their defaults,
        `from_model` (those of both that a model fills in), `shared` (whether one module serves all layers), and the
        declared claims under their names.

    Example:
        >>> info = vp.encoding_info("rope_axial")
        >>> info["place"], info["required"], info["options"]["preset"]
        ('rotary', ['num_heads', 'head_dim'], 'rope_vit')
    """
    cls = get_encoding_class(name)
    parameters = constructor_parameters(cls).values()
    doc = inspect.cleandoc(cls.__doc__ or "")
    return {
        "name": cls.name,
        "place": cls.place,
        "paper": cls.paper,
        "summary": doc.split("\n", 1)[0],
        "doc": doc,
        "required": [p.name for p in parameters if p.default is p.empty],
        "options": {p.name: p.default for p in parameters if p.default is not p.empty},
        "from_model": filled_parameters(cls),
        "shared": cls.place in ("input", "none") or not (cls.learnable or "layer" in filled_parameters(cls)),
        **{claim: getattr(cls, claim) for claim in CLAIMS},
    }
