"""Many drawn inputs to one function: each is right, or refused by one line that names a field.

A test of this folder says how many inputs it tries among the fast tests and among the slow ones. The seed is fixed, so
that every machine tries the same ones; `FUZZ_SEED=7 make test-slow` tries others. Seeds and counts end pytest's output.

    @counts(fast=500, slow=10_000)
    def test_grids(count, record_property):
        def attempt(shape):  # returns: right, also where it asserts more; raises: refused
            vp.Positions.grid(shape)

        fuzz(attempt, count, record_property, fields=["feat_shape"], shape=st.lists(st.integers()))
"""

import os
import re
from collections import Counter
from collections.abc import Callable, Iterable

import pytest
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

SEED = int(os.environ.get("FUZZ_SEED", "0"))

# what no option means, among it what YAML, JSON and the shell make of a typing mistake
JUNK = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.sampled_from([0, -1, 1, 2, 10**9, 2**31, 2**63, 2**64, 10**400]),
    st.floats(),
    st.text(max_size=8),
    st.sampled_from(
        ["", " ", "1", "nan", "true", "none", "\n", "\0", "\x1b[31m", "é", "../x", "1e400", "[1, 2]", "{}"]
    ),
    st.binary(max_size=4),
    st.lists(st.integers(-2, 9), max_size=4),
    st.tuples(st.floats(), st.floats()),
    st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
    st.complex_numbers(),
)


@st.composite
def mostly(draw, usual: st.SearchStrategy, odd: st.SearchStrategy = JUNK, percent: int = 15):
    """Draws of `usual`, and in a few percent of `odd`: `one_of` would weigh by how many branches either has."""
    return draw(odd if draw(st.integers(1, 100)) > 100 - percent else usual)


def counts(fast: int, slow: int):
    """Give a test the argument `count` twice, the second time as a slow test."""
    return pytest.mark.parametrize("count", [fast, pytest.param(slow, marks=pytest.mark.slow)])


def fuzz(
    attempt: Callable,
    count: int,
    record_property: Callable,
    *,
    fields: Iterable[str],
    errors: type[Exception] | tuple[type[Exception], ...] = ValueError,
    **inputs: st.SearchStrategy,
) -> Counter:
    """Call `attempt` with `count` draws of `inputs`, and fail with the smallest that is neither right nor refused.

    Refused is an exception of the types `errors` whose message is one printable line with one of the words `fields`.
    Returns how many were which.
    """
    outcomes = Counter(right=0, refused=0)
    named = re.compile("|".join(map(re.escape, sorted(set(fields), key=len, reverse=True))))

    @seed(SEED)
    @settings(
        max_examples=count,
        database=None,
        deadline=None,
        report_multiple_bugs=False,
        suppress_health_check=list(HealthCheck),
    )
    @given(**inputs)
    def run(**drawn):
        try:
            attempt(**drawn)
        except errors as error:
            line = str(error)
            assert line.isprintable(), f"not one printable line: {line!r}"
            assert named.search(line), f"no field is named in {line!r}"
            outcomes["refused"] += 1
        else:
            outcomes["right"] += 1

    run()
    tried = outcomes["right"] + outcomes["refused"]
    record_property(
        "fuzz", f"seed {SEED}, {tried:,} inputs: {outcomes['right']:,} right, {outcomes['refused']:,} refused"
    )
    assert tried >= count, f"only {tried} different inputs"
    return outcomes
