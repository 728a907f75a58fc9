"""Specs of any form, given to models: converted and right, or refused in one line with the model as it was."""

import copy

import pytest
import torch
from hypothesis import strategies as st

import visionpos as vp
from tests.fuzz.harness import JUNK, counts, fuzz, mostly
from tests.fuzz.test_encodings import FIELDS, MISSING, NAMES, pairs
from tests.small import pictures, swin, vit

pytestmark = pytest.mark.unhooked

MODELS = {"vit": (vit(depth=2), pictures()), "swin": (swin(depths=(1, 1)), pictures((64, 96)))}
WORD = mostly(st.sampled_from([*NAMES, "none"]), st.text(max_size=5) | st.sampled_from(["Learned", "rope", "alibi+"]))
LAYERS = mostly(st.just([]), (st.lists(st.integers(-1, 2), max_size=2) | JUNK).map(lambda chosen: [("layers", chosen)]))


def as_dict(name):
    """A dict with the name, some options and perhaps layers."""
    changed = st.lists(pairs(name), max_size=1) if name in NAMES else st.just([])
    return st.tuples(changed, LAYERS).map(
        lambda drawn: {"name": name, **{k: v for part in drawn for k, v in part if v is not MISSING}}
    )


DICT = WORD.flatmap(as_dict)
LEAF = st.one_of(WORD, st.lists(WORD, min_size=1, max_size=3).map("+".join), DICT, DICT)
SPECS = mostly(st.recursive(LEAF, lambda inner: st.lists(inner, max_size=3), max_leaves=3), JUNK, percent=5)


@counts(fast=250, slow=12_000)
def test_any_spec(count, record_property):
    def attempt(kind, spec):
        model, x = MODELS[kind]
        model = copy.deepcopy(model)
        before = {name: type(module) for name, module in model.named_modules()}
        try:
            vp.set_encoding(model, spec)
        except ValueError:
            vp.get_encoding(model)
            assert {name: type(module).__mro__[1] for name, module in model.named_modules()}.keys() >= before.keys()
            assert list(model.state_dict()) == list(MODELS[kind][0].state_dict())
            raise
        with torch.no_grad():
            out = model(x)
        assert out.shape == (2, 5)
        assert out.isfinite().all(), "not finite"

    fields = FIELDS | {"encoding", "layers", "grid", "asked for twice", "heads"}
    fuzz(attempt, count, record_property, fields=fields, kind=st.sampled_from(sorted(MODELS)), spec=SPECS)
