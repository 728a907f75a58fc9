"""PVT v2 as host: keys stand in the middle of the cells that were pooled, whatever the size of the picture."""

import copy

import pytest
import timm
import torch

import visionpos as vp
from tests.hosts.same_bits import OWN, check_same_bits
from tests.small import pictures, randomised
from visionpos.convert import find_host

SIZE, OTHER = (64, 96), (80, 52)
OPTIONS = {
    "embed_dims": (24, 48),
    "depths": (1, 2),
    "num_heads": (2, 3),
    "sr_ratios": (4, 1),
    "mlp_ratios": (2, 2),
    "num_classes": 4,
    "pretrained_cfg_overlay": {"input_size": (3, *SIZE)},
}
KINDS = {"convolution": {}, "linear": {"linear": True}}


def plain_model(kind="convolution", **options):
    torch.manual_seed(0)
    return randomised(timm.create_model("pvt_v2_b0", **{**OPTIONS, **KINDS[kind], **options}))


@pytest.mark.parametrize("size", [SIZE, OTHER])
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_converting_to_what_the_host_has_changes_no_bit(kind, size):
    check_same_bits(plain_model(kind), pictures(size), [], OWN, "none")


@pytest.mark.parametrize("size", [SIZE, OTHER])
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_a_bias_of_zero_changes_nothing(kind, size):
    """By the path with encodings: tables start at zero."""
    plain, x = plain_model(kind).double(), pictures(size).double()
    model = vp.set_encoding(copy.deepcopy(plain), {"name": "relative_table", "init_std": 0.0})
    assert (model(x) - plain(x)).abs().max() < 1e-12


@torch.no_grad()
def test_attention_with_a_bias_is_softmax_of_logits_plus_bias_between_tokens_and_middles():
    """By hand in float64: 6 x 8 tokens, keys of 2 x 2 cells, alibi2d's slope times the distance."""
    model = vp.set_encoding(plain_model(sr_ratios=(2, 1)).double(), "alibi2d")
    attn = model.stages[0].blocks[0].attn
    x = torch.randn(2, 48, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    pooled = attn.norm(attn.sr(x.mT.reshape(2, 24, 6, 8)).flatten(2).mT)
    q = attn.q(x).view(2, 48, 2, 12).transpose(1, 2)
    k, v = (t.transpose(1, 2) for t in attn.kv(pooled).view(2, 12, 2, 2, 12).unbind(2))
    tokens = torch.tensor([(y, x) for y in range(6) for x in range(8)], dtype=torch.float64)
    middles = torch.tensor([(2 * y + 0.5, 2 * x + 0.5) for y in range(3) for x in range(4)], dtype=torch.float64)
    (alibi,) = attn.encodings
    bias = alibi.bias(vp.Positions(tokens, (6, 8)), vp.Positions(middles, (6, 8)))
    want = ((q @ k.mT) / 12**0.5 + bias).softmax(-1) @ v
    want = attn.proj(want.transpose(1, 2).reshape(2, 48, 24))
    assert (attn(x, (6, 8)) - want).abs().max() < 1e-12
    assert (
        attn(x, (6, 8)) - vp.set_encoding(copy.deepcopy(model), "none").stages[0].blocks[0].attn(x, (6, 8))
    ).abs().max() > 1e-3


def test_keys_of_the_linear_variant_stand_in_the_middle_of_what_is_averaged():
    attn = plain_model("linear")
    vp.get_encoding(attn)
    attn = attn.stages[0].blocks[0].attn
    positions = vp.Positions.grid((16, 24))
    coords = attn.pool_coords(positions.coords.mT.unflatten(1, (16, 24)))
    cells = [(i * 24 // 7, -(-(i + 1) * 24 // 7)) for i in range(7)]  # torch's adaptive bins, [start, end)
    want = torch.tensor([sum(range(a, b)) / (b - a) for a, b in cells])
    assert torch.allclose(coords[1, 0], want)


def test_what_has_no_place_is_one_line_and_may_go_to_layers_without_pooling():
    model = plain_model()
    with pytest.raises(
        ValueError, match="lepe works on the value of every token, but layer 0 of this PyramidVisionTransformerV2 "
    ):
        vp.set_encoding(model, "lepe")
    with pytest.raises(ValueError, match="irpe works on the value of every token"):
        vp.set_encoding(model, {"name": "irpe", "values": True})
    vp.set_encoding(model, {"name": "lepe", "layers": [1, 2]})
    assert model(pictures(SIZE)).isfinite().all()


def test_the_grid_is_that_of_the_configuration_or_asked_for():
    model = plain_model()
    vp.get_encoding(model)
    facts = find_host(model).layer_facts(model)
    maps = [tuple(found.shape[2:]) for found in model.forward_intermediates(pictures(SIZE))[1]]
    assert [fact.feat_shape for fact in facts] == [maps[0], maps[1], maps[1]]
    direct = type(plain_model())(embed_dims=(24,), depths=(1,), num_heads=(2,), sr_ratios=(2,))
    with pytest.raises(ValueError, match="PVTv2 knows no picture size"):
        vp.set_encoding(direct, "relative_table")
