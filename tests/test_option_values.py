"""Values of options that no encoding can use: one line each, however the encoding is asked for."""

import copy
import math
import pickle
from typing import get_args

import pytest
import torch

import visionpos as vp
from tests.small import vit
from visionpos.encoding import LayerFacts
from visionpos.options import describe, hints
from visionpos.registry import constructor_parameters, get_encoding_class, required_options

FACTS = LayerFacts(dim=48, feat_shape=(3, 5), num_heads=2, head_dim=24, layer=0, depth=2)
ENCODINGS = [name for name in vp.list_encodings() if name != "none"]
NUMBERS = [-1, math.nan, math.inf, -math.inf, 10**400, 2**64, True, "4", [1, 2]]
BAD = {
    "a positive integer": [0, 0.5, 2**31, *NUMBERS],
    "an integer, 0 or more": [0.5, 2**31, *NUMBERS],
    "a positive, finite number": [0, -0.0, -1e-9, *NUMBERS],
    "a finite number, 0 or more": [-1e-9, *NUMBERS],
    "a number from 0 to 10000": [-1e-9, 10001, 2**31, 1e30, *NUMBERS],
    "a finite number": NUMBERS[1:],
    "in [0, 1)": [1, *NUMBERS],
    "a number from 0.01 to 64": [0, 1e-3, 64.1, 3436, *NUMBERS],
    "in [0, 1]": [1.01, *NUMBERS],
    "two positive integers": [(0, 0), (3, -1), (3,), (3, 4, 5), (2.0, 3), (True, 2), 7, "ab", torch.ones(2)],
    "two positive integers (one or three on as many axes)": [
        *[(0, 0), (3, -1), (), (0,), (3, 4, 0), (3, 4, 5, 6), (2.0, 3), (True, 2), 7, "ab", torch.ones(2)],
    ],
    "a tuple of 2, each a finite number": [(1.0, math.nan), (math.inf, 1), (1.0,), 3.0],
    "a tuple of 3, each an integer, 0 or more": [(1, 2), (1, 2, 3, 4), (1, -1, 2), (1, 2, 0.5), (True, 2, 3), 3, "abc"],
    "true or false": [0, "no", None],
}
GOOD = {
    "an integer, 0 or more": 0,
    "a positive, finite number": 3,
    "a finite number, 0 or more": 0,
    "a number from 0 to 10000": 0,
    "a finite number": -1.5,
    "in [0, 1)": 0.25,
    "a number from 0.01 to 64": 64,
    "in [0, 1]": 0.25,
    "two positive integers": [2, 4],
    "two positive integers (one or three on as many axes)": [2, 4],
    "a tuple of 2, each a finite number": [0, -1.5],
    "true or false": True,
}


def accepted(name):
    """What every option of an encoding that has a range accepts, in words."""
    cls = get_encoding_class(name)
    known = {key: describe(hint) for key, hint in hints(cls).items() if key in constructor_parameters(cls)}
    return {key: text for key, text in known.items() if "one of" not in text}


@pytest.mark.unhooked
@pytest.mark.parametrize("name", ENCODINGS)
def test_every_option_refuses_what_it_cannot_use(name):
    cls = get_encoding_class(name)
    required = required_options(cls, FACTS)
    for key, text in accepted(name).items():
        for value in BAD[text.removesuffix(" or None")]:
            if value is None and text.endswith(" or None"):
                continue
            for build in (
                lambda options: vp.create_encoding(name, **options),
                lambda options: cls(**options),
                lambda options: vp.set_encoding(None, {"name": name, **options}),  # before any model is looked at
            ):
                with pytest.raises(ValueError, match=f"^{name}: {key} must be ") as caught:
                    build({**required, key: value})
                line = str(caught.value)
                assert line.startswith(f"{name}: {key} must be {text}, got ")
                assert line.isprintable()


@pytest.mark.parametrize("name", ENCODINGS)
def test_every_option_takes_the_ends_of_its_range(name):
    required = required_options(get_encoding_class(name), FACTS) | {"reference_shape": (3, 5)}
    required = {
        key: value for key, value in required.items() if key in constructor_parameters(get_encoding_class(name))
    }
    for key, text in accepted(name).items():
        value = GOOD.get(text.removesuffix(" or None"))
        if value is None or key in ("min_period", "max_period", "gamma", "layer", "min_freq"):  # not by themselves
            continue
        encoding = vp.create_encoding(name, **{**required, key: value})
        assert all(parameter.isfinite().all() for parameter in encoding.parameters())


@pytest.mark.parametrize("name", ENCODINGS)
def test_every_number_has_a_range(name):
    for key, hint in hints(get_encoding_class(name)).items():
        assert not {int, float} & {hint, *get_args(hint)} or get_args(hint)[:1] in ((int,), (float,)), key


@pytest.mark.unhooked
def test_values_given_by_place_and_by_subclasses():
    with pytest.raises(ValueError, match="^alibi2d: num_heads must be a positive integer, got 0$"):
        get_encoding_class("alibi2d")(0)

    class Mine(vp.BiasEncoding):
        def __init__(self, num_heads: int, steepness, **grid_options):
            super().__init__(num_heads, **grid_options)

    assert Mine(2, -1.0).num_heads == 2
    with pytest.raises(ValueError, match=r"^Mine: reference_shape must be two positive integers .*, got \(0, 2\)$"):
        Mine(2, -1.0, reference_shape=(0, 2))


def test_copies_are_not_asked_again():
    encoding = vp.create_encoding("learned", dim=8, feat_shape=(3, 5))
    for twin in (copy.deepcopy(encoding), pickle.loads(pickle.dumps(encoding))):
        assert torch.equal(twin.pos_embed, encoding.pos_embed)


@pytest.mark.unhooked
@pytest.mark.parametrize("key", [1, None, (2, 3)])
def test_an_option_whose_name_is_no_word(key):
    with pytest.raises(ValueError, match="learned has no option .* Valid: dim, "):
        vp.set_encoding(vit(), {"name": "learned", key: 2})


def test_functions_refuse_temperatures_that_are_no_numbers():
    for temperature in (0, -3.0, math.nan, math.inf):
        with pytest.raises(ValueError, match=f"temperature must be positive, finite and a number, got {temperature}"):
            vp.sincos_2d((2, 3), 8, temperature)
