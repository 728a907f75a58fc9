"""MViTv2 as host: pooled queries and keys, its tables kept, class tokens without a place.

timm's model takes square pictures to start with, and any that are smaller later on.
"""

import copy

import pytest
import timm
import torch
from timm.models import save_for_hf
from timm.models.mvitv2 import MultiScaleVit, MultiScaleVitCfg

import visionpos as vp
from tests.small import in_turn, needs_newer_timm, pictures, randomised
from visionpos.convert import find_host

SIZE, OTHER = (64, 64), (64, 40)
KINDS = {  # with strides of (queries, keys) of (1, 2), (2, 1), (1, 1), (2, 1) in the four blocks, or (1, 4) ...
    "plain": {},
    "class token": {"use_cls_token": True, "expand_attn": True},
    "no residual": {"expand_attn": False, "residual_pooling": False},
    "coarse keys": {"stride_kv_adaptive": (4, 4)},
    "no tables": {"rel_pos_type": "none"},
}


def plain_model(kind="plain", size=SIZE, **options):
    config = {
        "depths": (1, 2, 1),
        "embed_dim": 32,
        "num_heads": 2,
        "stride_q": ((1, 1), (2, 2), (2, 2)),
        "stride_kv": None,
        "stride_kv_adaptive": (2, 2),
        **KINDS[kind],
        **options,
    }
    torch.manual_seed(0)
    return randomised(MultiScaleVit(MultiScaleVitCfg(**config), img_size=size, num_classes=4))


@pytest.mark.parametrize("size", [SIZE, OTHER])
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_converting_to_what_the_host_has_changes_no_bit(kind, size):
    plain, x = plain_model(kind), pictures(size)
    model = copy.deepcopy(plain)
    name = "none" if kind == "no tables" else "decomposed"
    assert [encoding.name for encoding in vp.get_encoding(model)] == [name] * (0 if kind == "no tables" else 4)
    for spec in (name, vp.get_encoding(model)):
        vp.set_encoding(model, spec)
        assert {k: t.shape for k, t in model.state_dict().items()} == {
            k: t.shape for k, t in plain.state_dict().items()
        }
        assert torch.equal(model(x), plain(x))
    for options in ({}, {"norm": True}, {"indices": [0], "stop_early": True}):
        (last, found), (last_of_timm, found_of_timm) = (m.forward_intermediates(x, **options) for m in (model, plain))
        assert torch.equal(last, last_of_timm)
        assert all(torch.equal(a, b) for a, b in zip(found, found_of_timm, strict=True))
    assert torch.equal(model.double()(x.double()), plain.double()(x.double()))
    assert plain.no_weight_decay() <= model.no_weight_decay()


@pytest.mark.parametrize("kind", KINDS)
def test_beside_a_bias_of_zero_it_computes_what_timm_computes_and_its_gradients(kind):
    """By the path with encodings, which reads timm's tables at the coordinates of pooled tokens."""
    plain, x = plain_model(kind).double(), pictures(SIZE).double()
    model = copy.deepcopy(plain)
    vp.set_encoding(model, [*vp.get_encoding(model), {"name": "relative_table", "init_std": 0.0}])
    want = {name: tensor.shape for name, tensor in plain.state_dict().items()}
    assert want.items() <= {name: tensor.shape for name, tensor in model.state_dict().items()}.items()
    assert (model(x) - plain(x)).abs().max() < 1e-12
    for each in (model, plain):
        each(x).square().sum().backward()
    named = dict(model.named_parameters())
    for name, parameter in plain.named_parameters():
        scale = parameter.grad.abs().max().clamp(min=1e-3)  # some are zero: a shift of all keys changes nothing
        assert (named[name].grad - parameter.grad).abs().max() <= 1e-10 * scale, name


@torch.no_grad()
def test_tables_come_back_as_they_were_after_others():
    plain, x = plain_model("coarse keys"), pictures(SIZE)
    model = copy.deepcopy(plain)
    own = vp.get_encoding(model)
    vp.set_encoding(model, [*own, "alibi2d"])
    assert (model(x) - plain(x)).abs().max() > 1e-4
    vp.set_encoding(model, own)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), plain.state_dict().values(), strict=True))
    assert torch.equal(model(x), plain(x))
    vp.set_encoding(model, "none")
    assert not [key for key in model.state_dict() if "rel_pos" in key]
    assert (model(x) - plain(x)).abs().max() > 1e-4


@pytest.mark.parametrize("layer", [0, 1, 2])
@torch.no_grad()
def test_pooled_tokens_stand_at_multiples_of_their_stride(layer):
    """By hand in float64, on a grid of 16 x 10: the bias of alibi2d between the places of queries and of keys."""
    model = vp.set_encoding(plain_model("class token").double(), "alibi2d")
    attn = find_host(model).blocks(model)[layer].attn
    height, width = (16, 10) if layer < 2 else (8, 5)
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(2, 1 + height * width, attn.qkv.in_features, dtype=torch.float64, generator=draw)

    def pooled(tokens, pool, norm):  # (B, T, C): one head after the other
        heads = []
        for head in tokens.split(attn.head_dim, dim=-1):
            grid = pool(head[:, 1:].mT.unflatten(2, (height, width))).flatten(2).mT
            heads.append(norm(torch.cat([head[:, :1], grid], dim=1)))
        return torch.stack(heads, dim=1)

    q, k, v = attn.qkv(x).chunk(3, dim=-1)
    q, k, v = (
        pooled(q, attn.pool_q, attn.norm_q),
        pooled(k, attn.pool_k, attn.norm_k),
        pooled(v, attn.pool_v, attn.norm_v),
    )
    step_q, step_k = ((1, 2), (2, 1), (1, 1))[layer]
    places = [
        vp.Positions(
            torch.tensor([(y, x) for y in range(0, height, s) for x in range(0, width, s)], dtype=torch.float64),
            (height, width),
            1,
        )
        for s in (step_q, step_k)
    ]
    (alibi,) = attn.encodings
    out = ((q @ k.mT) / attn.head_dim**0.5 + alibi.bias(*places)).softmax(-1) @ v + q
    want = attn.proj(out.transpose(1, 2).flatten(2))
    got, grid = attn(x, [height, width])
    assert (got - want).abs().max() < 1e-12
    assert list(grid) == [-(-height // step_q), -(-width // step_q)]


TRAINED = [name for name in vp.list_encodings() if name not in ("none", "lepe")]  # lepe has a test of its own below


@pytest.mark.parametrize("kind", ["plain", "class token"])
@pytest.mark.parametrize("name", in_turn(TRAINED, 1))
def test_every_encoding_trains(kind, name):
    model = vp.set_encoding(plain_model(kind, depths=(1, 1, 1)), name).train()
    model(pictures(OTHER)).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_what_has_no_place_is_one_line():
    model = plain_model()
    with pytest.raises(ValueError, match=r"lepe works on the value of every token, but layer 0 of this .* pools"):
        vp.set_encoding(model, "lepe")
    vp.set_encoding(model, ["decomposed", {"name": "lepe", "layers": [2]}])
    assert model(pictures(OTHER)).isfinite().all()
    for options in ({"use_abs_pos": True}, {"pool_first": True}):
        model = plain_model(**options)
        with pytest.raises(ValueError, match="use_abs_pos or pool_first takes no encodings"):
            vp.set_encoding(model, "none")
        assert type(model) is MultiScaleVit


@needs_newer_timm
@torch.no_grad()
def test_saved_and_loaded_it_is_the_same_function(tmp_path):
    """The smallest that timm's factory builds."""
    model = vp.create_model("mvitv2_tiny", encoding="decomposed+rope_axial+peg", img_size=32, num_classes=3).eval()
    save_for_hf(model, tmp_path)
    loaded = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert torch.equal(loaded(pictures((32, 32))), model(pictures((32, 32))))
