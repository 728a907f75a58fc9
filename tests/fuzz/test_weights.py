"""Damaged state dicts and files: loaded as they are, or refused in one line with no tensor changed."""

import copy

import pytest
import torch
from hypothesis import strategies as st
from safetensors.torch import save

import visionpos as vp
from tests.fuzz.harness import JUNK, counts, fuzz, mostly
from tests.small import swin, vit

pytestmark = pytest.mark.unhooked

MODELS = {
    "vit": vit("learned+rope_mixed+relative_table", depth=1),
    "swin": swin("learned+relative_table", depths=(1, 1)),
}
NAMES = sorted({key for model in MODELS.values() for key in model.state_dict()})
SHAPES = st.lists(st.integers(0, 9), max_size=4)
KINDS = [torch.float32, torch.float16, torch.float64, torch.bfloat16, torch.int64, torch.bool, torch.complex64]
TENSORS = st.builds(lambda shape, kind: torch.ones(shape, dtype=kind), SHAPES, st.sampled_from(KINDS))
OTHER_FORMATS = ["freqs", "absolute_pos_embed", "storage_tokens", "blocks.0.attn.q_bias", "encoder.layers.0.x", "bn1.w"]
KEYS = mostly(st.sampled_from([*NAMES, *OTHER_FORMATS]), st.text(max_size=8) | st.integers() | st.none(), 10)
CHANGES = mostly(
    st.sampled_from(["drop", "half", "double", "cut", "transpose", "flat", "nan", "meta", "sparse", "prefix", "same"]),
    TENSORS | JUNK,
    25,
)
RESIZES = mostly(st.sampled_from([False, True, (8, 12), (3, 5)]), JUNK, 10)
FIELDS = [*NAMES, *OTHER_FORMATS, "weights", "resize", "table", "is of type", "is torch", "is on the meta", "names of"]

DAMAGE = {
    "half": lambda x: x.half(),
    "double": lambda x: x.double(),
    "cut": lambda x: x[:-1],
    "transpose": lambda x: x.flatten(1).t() if x.ndim > 1 else x[None],
    "flat": lambda x: x.flatten(),
    "nan": lambda x: torch.full_like(x, torch.nan),
    "meta": lambda x: x.to("meta"),
    "sparse": lambda x: x.to_sparse(),
    "same": lambda x: x,
}


def damaged(weights, changes):
    """A state dict with some tensors dropped, put under another name, or replaced."""
    weights = dict(weights)
    for key, change in changes:
        if key not in weights:
            weights[key] = change
        elif isinstance(change, str) and change == "drop":
            del weights[key]
        elif isinstance(change, str) and change == "prefix":
            weights = {f"module.{name}" if isinstance(name, str) else name: value for name, value in weights.items()}
        else:
            known = isinstance(change, str) and change in DAMAGE and isinstance(weights[key], torch.Tensor)
            weights[key] = DAMAGE[change](weights[key]) if known else change
    return weights


def load(kind, weights, strict, resize):
    """Load into a copy of a model, and check that a refusal changed nothing."""
    model = copy.deepcopy(MODELS[kind])
    before = MODELS[kind].state_dict()
    try:
        result = vp.load_weights(model, weights, strict=strict, resize=resize)
    except ValueError:
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
        raise
    assert not strict or not (result.missing_keys or result.unexpected_keys)
    return model, result


@counts(fast=100, slow=8_000)
def test_damaged_state_dicts(count, record_property):
    def attempt(kind, changes, wrapped, strict, resize):
        weights = damaged({key: torch.full_like(v, 0.5) for key, v in MODELS[kind].state_dict().items()}, changes)
        model, result = load(kind, {"state_dict": weights} if wrapped else weights, strict, resize)
        for key, value in model.state_dict().items():
            if key not in result.missing_keys and not resize:
                assert torch.allclose(value, torch.full_like(value, 0.5)) or key in {name for name, _ in changes}

    fuzz(
        attempt,
        count,
        record_property,
        fields=FIELDS,
        kind=st.sampled_from(sorted(MODELS)),
        changes=st.lists(st.tuples(KEYS, CHANGES), max_size=3, unique_by=lambda change: change[0]),
        wrapped=st.booleans(),
        strict=st.booleans(),
        resize=RESIZES,
    )


@counts(fast=50, slow=2_000)
def test_damaged_files(count, record_property, tmp_path):
    files = {kind: save(model.state_dict()) for kind, model in MODELS.items()}
    path = tmp_path / "weights.safetensors"

    def attempt(kind, data, cuts, strict):
        content = bytearray(files[kind])
        for place, byte in cuts:  # most of them in the header, which says what is where
            content[place % len(content)] = byte
        path.write_bytes(bytes(content) if data is None else data)
        load(kind, path, strict, False)

    header = st.tuples(st.integers(0, 3000), st.integers(0, 255))
    fuzz(
        attempt,
        count,
        record_property,
        fields=[*FIELDS, "weights.safetensors"],
        kind=st.sampled_from(sorted(MODELS)),
        data=mostly(st.none(), st.binary(max_size=64), 20),
        cuts=st.lists(header, max_size=4),
        strict=st.booleans(),
    )
