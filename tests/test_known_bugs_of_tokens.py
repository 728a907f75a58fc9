"""Bugs that position code had elsewhere, 21 to 26: masks, tokens, batches, options.

Each test puts its bug back and must notice it. The others are in the other test_known_bugs files.
"""

import itertools
import typing

import pytest
import torch
import torch.nn.functional as F

import visionpos as vp
from tests.bugs import ENCODINGS, RIGHT_INIT, SIZE, put_back, vit
from tests.small import pictures
from visionpos import places
from visionpos.encoding import AttentionTensors
from visionpos.hosts import attention
from visionpos.hosts import vit as vit_host
from visionpos.options import hints
from visionpos.probe import DIM, GRID, HEAD_DIM, HEADS, output, small_encoding
from visionpos.registry import constructor_parameters, get_encoding_class
from visionpos.rotary.rope_axial import RopeAxial

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("fused", [True, False])
def test_bug_21_query_that_sees_no_key(fused):
    def check():
        hidden = torch.ones(97, 97, dtype=torch.bool).triu()  # query i sees i keys
        for spec, dtype in itertools.product(("alibi2d", "rope_axial", {"name": "shaw", "values": True}), DTYPES):
            model = vp.set_encoding(vit(), spec).to(dtype)
            model.blocks[0].attn.fused_attn = fused
            lowest = torch.zeros(97, 97).masked_fill(hidden, torch.finfo(torch.float32).min)  # -inf in bfloat16
            for mask in (~hidden, lowest):
                out = model.forward_features(pictures().to(dtype), attn_mask=mask)
                out.square().sum().backward()
                assert out.isfinite().all(), (spec, dtype)
                assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())

    check()
    with put_back(attention, softmax_over_keys=lambda logits, fully_masked: logits.softmax(-1)):
        check()


def test_bug_22_bias_in_another_dtype_than_the_query():
    model, right, seen = vp.set_encoding(vit(), "alibi2d+relative_table"), F.scaled_dot_product_attention, []

    def spy(q, k, v, attn_mask=None, **options):
        seen.append((attn_mask.ndim, attn_mask.dtype == q.dtype, q.dtype))
        return right(q, k, v, attn_mask=attn_mask.to(q.dtype), **options)

    def check():
        with pytest.MonkeyPatch.context() as patch, torch.autocast("cpu", torch.bfloat16), torch.no_grad():
            patch.setattr(F, "scaled_dot_product_attention", spy)
            model(pictures())
        assert seen.pop() == (4, True, torch.bfloat16)  # 4-D: a 3-D bias misses the fused kernels

    def uncast(x, q, k, v, prepared):
        tensors = AttentionTensors(x, q, k, v)
        for encoding, table in prepared:
            encoding.modify_attention(tensors, table)
        return tensors

    check()
    with put_back(attention, encoded=uncast):
        check()


def test_bug_23_prefix_tokens():
    def check():
        for name, prefix in itertools.product(vp.list_encodings(place="rotary"), (0, 1, 2, 5)):
            positions = vp.Positions.grid(GRID, prefix)
            q = torch.randn(1, HEADS, positions.num_tokens, HEAD_DIM)
            encoding = small_encoding(get_encoding_class(name))
            for x, turned in zip((q, -q), encoding(q, -q, positions), strict=True):
                want = x if encoding.linear else torch.cat([F.softplus(x), 0 * x], dim=-1)  # polar, at (0, 0)
                assert torch.equal(turned[:, :, :prefix], want[:, :, :prefix]), name
                assert not torch.equal(turned[:, :, -1], x[:, :, -1]), name

    def at_the_end(self, positions):
        angles = F.pad(self.encode(positions), (0, 0, 0, positions.num_prefix_tokens))
        return torch.stack([angles.cos(), angles.sin()]).float()

    check()
    with put_back(places.RotaryEncoding, prepare=at_the_end):
        check()
    model = vp.set_encoding(vit(reg_tokens=2), "none")
    features = model.forward_features(pictures())
    assert features.shape == (2, 3 + 96, 48)  # removing the encoding keeps them
    assert torch.equal(model(pictures()), model.head(model.fc_norm(features[:, 3:].mean(1))))  # none pooled as a patch


def test_bug_24_dropped_tokens():
    index = torch.stack([torch.randperm(96, generator=torch.Generator().manual_seed(i))[:48] for i in range(3)])

    def drop(x, prob, num_prefix_tokens, ordered, training):
        patches = x[:, num_prefix_tokens:]
        return torch.cat([x[:, :num_prefix_tokens], patches[torch.arange(3)[:, None], index]], 1), index

    def check(spec):
        model, x = vp.set_encoding(vit(patch_drop_rate=0.5), spec), pictures(batch=3)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(vit_host, "patch_dropout_forward", drop)
            dropped = model.forward_features(x)
        model.patch_drop = torch.nn.Identity()
        for sample in range(3):
            rows = torch.cat([torch.zeros(1, dtype=torch.long), 1 + index[sample]])
            seen = torch.zeros(97, dtype=torch.bool).index_fill(0, rows, True)
            alone = model.forward_features(x[sample : sample + 1], attn_mask=seen.expand(97, 97))
            assert (dropped[sample] - alone[0, rows]).abs().max() < 1e-5, sample

    def of_the_first(right):
        def wrong(self, *args):  # the index (B, K) is the one tensor of whole numbers
            indices = [isinstance(each, torch.Tensor) and each.dtype == torch.long for each in args]
            return right(
                self, *(a[:1].expand_as(a) if is_index else a for a, is_index in zip(args, indices, strict=True))
            )

        return wrong

    places = {"rope_axial": (vp.RotaryEncoding, "take_tokens"), "relative_table": (vp.Positions, "keep")}
    for spec in ("rope_axial", "learned+alibi2d", "relative_table"):
        check(spec)
        if spec in places:
            owner, name = places[spec]
            with put_back(owner, **{name: of_the_first(getattr(owner, name))}):
                check(spec)


def test_bug_25_results_that_depend_on_the_batch():
    def check(name, dtype, tolerance):
        model, x = vp.set_encoding(vit(), name).to(dtype), pictures(batch=8).to(dtype)
        alone = torch.cat([model(x[i : i + 1]) for i in range(8)])
        for batch in (2, 3, 5, 8):
            assert (model(x[:batch]) - alone[:batch]).abs().max() <= tolerance * alone.abs().max(), (name, batch)

    with torch.inference_mode():
        for name in ENCODINGS:
            check(name, torch.float32, 1e-5)
            check(name, torch.bfloat16, 4 * torch.finfo(torch.bfloat16).eps)
        right = attention.split_qkv
        with put_back(attention, split_qkv=lambda x, *args, **options: right(x - 0.1 * x.mean(0), *args, **options)):
            check("rope_axial", torch.float32, 1e-5)


# Where the type of an option or its default does not tell another value, or the option needs others to act.
OTHER = {
    "reference_shape": (2, 4),
    "pretrained_window": (2, 4),
    "num_directions": 2,
    "num_parabolas": 3,
    "gamma": 3.0,
    "hidden_dim": 7,
    "init_L": 30.0,
    "min_period": 0.5,
    "max_period": 9.0,
    "zero_fraction": 0.5,
    "block": 4,
    "kernel_size": 5,
    "scaling": "linear",
}
NEEDS = {
    "extrapolate": {"reference_shape": (2, 4)},
    "scaling": {"reference_shape": (2, 4)},
    "hidden_dim": {"preset": "learnable"},
    "gamma": {"preset": "learnable"},
    "min_period": {"min_period": 0.25, "max_period": 4.0},
    "max_period": {"min_period": 0.25, "max_period": 4.0},
}


def other_value(cls, option, default):
    """Another value than the default."""
    if option == "extrapolate":
        return cls.extrapolation != "run_on"
    hint = hints(cls).get(option)
    choices = [v for part in (hint, *typing.get_args(hint)) for v in typing.get_args(part) if isinstance(v, str)]
    if option in OTHER or not (choices or isinstance(default, (bool, int, float, tuple))):
        return OTHER.get(option, 0.7)
    if choices:
        return next(value for value in choices[::-1] if value != default)
    if isinstance(default, bool):
        return not default
    return tuple(2 * v for v in default) if isinstance(default, tuple) else 2 * default + (0 if default else 1)


def behaviour(name, options):
    """All that an encoding holds and does, on its grid, on a smaller and on a longer one."""
    facts = {"dim": DIM, "num_heads": HEADS, "head_dim": HEAD_DIM, "feat_shape": GRID, "layer": 1, "depth": 3}
    accepted = constructor_parameters(get_encoding_class(name))
    torch.manual_seed(0)
    drawn = {} if "preset" in options else {"init_std": 0.5}  # a preset's tables are drawn its own way
    given = {key: value for key, value in {**facts, **drawn}.items() if key in accepted}
    encoding = vp.create_encoding(name, **{**given, **options})
    grids = GRID, (2, 3), (2, 60)
    return {**encoding.state_dict(), **{grid: output(encoding, vp.Positions.grid(grid, 4)) for grid in grids}}


def test_bug_26_options_without_effect():
    def check(name):
        cls = get_encoding_class(name)
        options = vp.encoding_info(name)["options"]
        for option, default in options.items():
            needs = NEEDS.get(option, {option: default})
            if option == "reference_shape":
                needs = {option: (7, 9), "extrapolate": cls.extrapolation == "formula"}
            needs = {key: value for key, value in needs.items() if key in options}
            before = behaviour(name, needs)
            try:
                after = behaviour(name, {**needs, option: other_value(cls, option, default)})
            except ValueError:
                continue  # says so
            same = before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
            assert not same, f"{name}: {option}"

    for name in ENCODINGS:
        check(name)

    def deaf(self, num_heads, head_dim, temperature=100.0, **options):
        RIGHT_INIT(self, num_heads, head_dim, **options)

    with put_back(RopeAxial, __init__=deaf):
        check("rope_axial")
    encoding = {"name": "rope_axial", "temperature": 7.0}
    model = vp.create_model("vit_tiny_patch16_224", encoding=encoding, img_size=SIZE, patch_size=4, depth=1)
    assert vp.get_encoding(model)[0].temperature == 7.0
