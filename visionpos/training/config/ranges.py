"""The ranges of a configuration's fields: which values each accepts, as a test and in words."""

from dataclasses import MISSING, field, fields, is_dataclass
from pathlib import Path
from typing import Any

from visionpos.options import Range
from visionpos.training.errors import ConfigError


def is_path(text: str) -> bool:
    """Return whether a file system can have a file of that name; others raise where one is looked for."""
    whole = text.encode(errors="surrogatepass")
    return bool(text) and b"\0" not in whole and len(whole) < 4096 and max(map(len, whole.split(b"/"))) < 256


def is_file(path: str | Path) -> bool:
    """Return whether there is a file; where no file system can have one of that name there is none."""
    return is_path(str(path)) and Path(path).is_file()


PATH = Range(is_path, "a path, of names with at most 255 bytes, none of them NUL")
COUNT = Range(lambda value: 1 <= value < 2**31, "a whole number from 1, below 2**31")
SEED = Range(lambda value: 0 <= value < 2**64, "a whole number from 0, below 2**64")
NATURAL = Range(lambda value: 0 <= value < float("inf"), "a number from 0")
SHARE = Range(lambda value: 0 <= value < 1, "a number from 0 to below 1")
FRACTION = Range(lambda value: 0 < value < 1, "a number above 0, below 1")
POSITIVE = Range(lambda value: 0 < value < float("inf"), "a number above 0")
DECAY_FACTOR = Range(lambda value: 0 < value <= 1, "a number above 0, at most 1")
MASK_RATIO = Range(lambda value: 0 < value <= 0.95, "a number above 0, at most 0.95")
SIZE = Range(lambda value: min(value if isinstance(value, tuple) else (value,)) >= 1, "whole numbers from 1")
PORTION = Range(lambda value: 0 < value <= 1, "a number above 0, at most 1")
MEAN = Range(lambda value: all(0 <= each <= 1 for each in value), "three numbers from 0 to 1")
STD = Range(lambda value: all(0 < each <= 1 for each in value), "three numbers above 0, at most 1")
CROP_SCALE = Range(lambda value: 0 < value[0] <= value[1] <= 1, "two numbers above 0, at most 1, the smaller first")
GRID = Range(lambda value: min(value) >= 1 and max(value) < 2**31, "two whole numbers from 1, cells down and across")
BETAS = Range(lambda value: all(0 <= beta < 1 for beta in value), "two numbers from 0 to below 1")


def within(accepted: Range, default: Any = MISSING) -> Any:
    """Return a dataclass field with the range of its values; null is accepted wherever the type accepts it."""
    return field(default=default, metadata={"range": accepted})


def path_given(flag: str, text: str) -> Path:
    """Return the path that a flag gives; ConfigError where it is none: empty is not the current directory."""
    if not PATH.accepts(text):
        raise ConfigError(f"{flag}: {text!r} given; accepted: {PATH.text}")
    return Path(text)


def check_ranges(group: Any, prefix: str = "") -> None:
    """Raise ConfigError for a field, in a group of fields or one inside it, whose value is outside its range."""
    for each in fields(group):
        name, value, accepted = prefix + each.name, getattr(group, each.name), each.metadata.get("range")
        if is_dataclass(value):
            check_ranges(value, f"{name}.")
        elif isinstance(value, str) and (not value or "\0" in value):
            raise ConfigError(f"{name}: {value!r} given; accepted: text of one character or more, none of them NUL")
        elif accepted and value is not None and not accepted.accepts(value):
            raise ConfigError(f"{name}: {value} given; accepted: {accepted.text}")
