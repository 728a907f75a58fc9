"""Encodings built with options of any value: used on a grid they are right, or the option is named in one line."""

from typing import get_args

import pytest
import torch
from hypothesis import strategies as st

import visionpos as vp
from tests.fuzz.harness import JUNK, counts, fuzz, mostly
from visionpos.options import fits, hints
from visionpos.probe import BATCH, DIM, GRID, HEAD_DIM, HEADS, SMALL
from visionpos.registry import constructor_parameters, get_encoding_class, required_options

pytestmark = pytest.mark.unhooked

NAMES = [name for name in vp.list_encodings() if name != "none"]
MISSING = object()
SENSIBLE = [
    True,
    False,
    None,
    *range(9),
    16,
    24,
    48,
    -0.5,
    1e-30,
    1e-3,
    0.1,
    0.9,
    1.5,
    100.0,
    1e4,
    1e30,
    (1, 1),
    (4, 7),
]
SENSIBLE += [[9, 2], (0.5, -1.5), (-1e-3, 1e3)]


def allocates(value):
    """Whether an integer stands for more memory than a test may take, and for no more than a machine could have."""
    return any(isinstance(n, int) and 65 < n < 2**31 for n in (value if isinstance(value, (list, tuple)) else [value]))


ANY = st.one_of(JUNK.filter(lambda value: not allocates(value)), st.floats(), st.integers(-3, 64))


def values(hint):
    """Values of an option: most of its type and in its range, the others any."""
    words = [word for part in (hint, *get_args(hint)) for word in get_args(part) if isinstance(word, str)]
    good = [value for value in [*SENSIBLE, *words] if fits(value, hint)]
    return mostly(st.sampled_from(good), ANY, percent=25) if good else ANY


def pairs(name):
    """An option of an encoding and a value; that it is missing, for a required one; or one that no encoding has."""
    cls = get_encoding_class(name)
    known, required = hints(cls), required_options(cls, SMALL)
    options = [st.tuples(st.just(key), values(known[key])) for key in constructor_parameters(cls) if key in known]
    missing = [st.tuples(st.sampled_from(sorted(required)), st.just(MISSING))] * bool(required)
    unknown = st.tuples(st.text(max_size=5) | st.sampled_from(["temprature", "num_head"]), JUNK)
    return mostly(st.one_of(*options), st.one_of(*missing, unknown), percent=8)


ENCODINGS = st.one_of(*(st.tuples(st.just(name), st.lists(pairs(name), max_size=3)) for name in NAMES))
FIELDS = {key for name in NAMES for key in constructor_parameters(get_encoding_class(name))} | {"has no option"}


def used(encoding, positions):
    """The output of an encoding on the small tokens of its own heads and channels."""
    tokens = positions.num_tokens
    heads, width = getattr(encoding, "num_heads", HEADS), getattr(encoding, "head_dim", HEAD_DIM)
    queries = torch.ones(BATCH, heads, tokens, width)
    if encoding.place == "rotary":
        return torch.cat(encoding(queries, queries, positions))
    if encoding.place in ("input", "conditional"):
        return encoding(torch.ones(BATCH, tokens, encoding.dim), positions)
    content = {"q": queries, "x": torch.ones(BATCH, tokens, getattr(encoding, "dim", DIM))}
    more = [positions, content[encoding.content_source]] if encoding.content_dependent else []
    return encoding(torch.zeros(BATCH, heads, tokens, tokens), positions, *more)


@counts(fast=2_400, slow=30_000)
def test_options_of_any_value(count, record_property):
    positions = vp.Positions.grid(GRID, num_prefix_tokens=1)

    def attempt(encoding):
        name, changes = encoding
        options = {**required_options(get_encoding_class(name), SMALL), **dict(changes)}
        built = vp.create_encoding(name, **{key: value for key, value in options.items() if value is not MISSING})
        with torch.no_grad():
            out = used(built, positions)
        assert out.dtype == torch.float32
        assert out.isfinite().all(), "not finite"

    fuzz(attempt, count, record_property, fields=FIELDS, encoding=ENCODINGS)
