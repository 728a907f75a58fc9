"""The harness finds what it is for: other exceptions, lines that name nothing, messages of two lines."""

import pytest
from hypothesis import strategies as st

from tests.fuzz.harness import SEED, fuzz


def tried(attempt, **options):
    recorded = {}
    outcomes = fuzz(attempt, 50, recorded.__setitem__, fields=["width"], n=st.integers(), **options)
    return outcomes, recorded["fuzz"]


def test_right_and_refused_are_counted():
    def attempt(n):
        if n < 0:
            raise ValueError(f"width must be 0 or more, got {n}")

    outcomes, line = tried(attempt)
    assert outcomes["right"] + outcomes["refused"] >= 50
    assert min(outcomes.values()) > 0
    assert (
        line
        == f"seed {SEED}, {sum(outcomes.values())} inputs: {outcomes['right']} right, {outcomes['refused']} refused"
    )


@pytest.mark.parametrize(
    "error",
    [KeyError("width"), ValueError(""), ValueError("wrong"), ValueError("width\nis"), ValueError("width \x1b[0m")],
)
def test_violations(error):
    def attempt(n):
        if n > 3:
            raise error

    with pytest.raises((AssertionError, KeyError)):
        tried(attempt)
    if isinstance(error, KeyError):
        assert tried(attempt, errors=KeyError)[0]["refused"] > 0


def test_too_few_inputs_are_a_failure():
    with pytest.raises(AssertionError, match="only 2 different inputs"):
        fuzz(lambda n: None, 50, lambda key, value: None, fields=["n"], n=st.booleans())
