"""The types of options: what a value must be, as a test and in words. Checked wherever an encoding is built.

An option's range stands in its annotation, `temperature: Positive = 100.0`. It holds for specs in Python, in YAML and
on the command line, and for constructors that are called directly. No number is larger than the type that computes with
it: float32 for numbers, 32 bits for integers.
"""

from __future__ import annotations

import reprlib
import types
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

LARGEST = 3.4e38  # parameters are float32
LARGEST_INTEGER = 2**31 - 1

_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = 60


class Range(NamedTuple):
    """Say which values of a type an option accepts, as a test and in words."""

    accepts: Callable[[Any], bool]
    text: str


Count = Annotated[int, Range(lambda value: value >= 1, "a positive integer")]
Natural = Annotated[int, Range(lambda value: value >= 0, "an integer, 0 or more")]
Positive = Annotated[float, Range(lambda value: 0 < value <= LARGEST, "a positive, finite number")]
Spread = Annotated[float, Range(lambda value: 0 <= value <= LARGEST, "a finite number, 0 or more")]
Scale = Annotated[float, Range(lambda value: 0 <= value <= 1e4, "a number from 0 to 10000")]  # of what is multiplied
Finite = Annotated[float, Range(lambda value: abs(value) <= LARGEST, "a finite number")]
Share = Annotated[float, Range(lambda value: 0 <= value < 1, "in [0, 1)")]
Fraction = Annotated[float, Range(lambda value: 0 <= value <= 1, "in [0, 1]")]
Size = Annotated[tuple[int, int], Range(lambda value: min(value) >= 1, "two positive integers")]
GridSize = Annotated[  # of encodings whose formula knows no number of axes
    tuple[int, ...],
    Range(
        lambda value: 1 <= len(value) <= 3 and min(value) >= 1, "two positive integers (one or three on as many axes)"
    ),
]


def hints(cls: type) -> dict[str, Any]:
    """Return the annotations of the constructor parameters of a class and of its bases."""
    found: dict[str, Any] = {}
    for base in reversed(cls.__mro__):
        if "__init__" in vars(base):
            try:
                found.update(get_type_hints(base.__init__, include_extras=True))
            except NameError:  # an author's annotations that only a type checker can read
                continue
    return found


def fits(value: Any, hint: Any) -> bool:
    """Return whether a value has an annotated type, and lies in its range."""
    origin, args = get_origin(hint), get_args(hint)
    if origin is Annotated:
        ranges = [each for each in args[1:] if isinstance(each, Range)]
        return fits(value, args[0]) and all(each.accepts(value) for each in ranges)
    if origin is Literal:
        return value in args
    if origin in (Union, types.UnionType):
        return any(fits(value, arg) for arg in args)
    if origin is tuple:
        if not isinstance(value, (tuple, list)):
            return False
        args = args[:1] * len(value) if args[-1] is Ellipsis else args
        return len(value) == len(args) and all(map(fits, value, args))
    if hint is float:
        is_whole = isinstance(value, int) and not isinstance(value, bool)
        return isinstance(value, float) or (is_whole and abs(value) < 2**63)  # as torch reads an int
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool) and abs(value) <= LARGEST_INTEGER
    return not isinstance(hint, type) or isinstance(value, hint)


def describe(hint: Any) -> str:
    """Return in words what `fits` accepts."""
    origin, args = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return next((each.text for each in args[1:] if isinstance(each, Range)), describe(args[0]))
    if origin is Literal:
        return "one of " + ", ".join(map(repr, args))
    if origin in (Union, types.UnionType):
        return " or ".join(map(describe, args))
    if origin is tuple:
        return f"a tuple of {len(args)}, each {describe(args[0])}"
    if hint is types.NoneType:
        return "None"
    return {int: "an integer", float: "a number", bool: "true or false"}.get(hint, str(hint))


def shown(value: Any) -> str:
    """Return a value for an error message: in one line, and not at any length."""
    if isinstance(value, int) and value.bit_length() > 64:
        return f"an integer of {value.bit_length()} bits"
    return " ".join(_REPR.repr(value).split())


def check_values(cls: type, options: Mapping[str, Any]) -> None:
    """Check that every option of an encoding has a value of its type, in its range.

    Raises:
        ValueError: one line that names the encoding, the option, what was given and what is accepted.
    """
    accepted = hints(cls)
    for key, value in options.items():
        if key in accepted and not fits(value, accepted[key]):
            raise ValueError(f"{cls.name or cls.__name__}: {key} must be {describe(accepted[key])}, got {shown(value)}")
