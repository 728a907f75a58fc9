"""DaViT as host: layers are windows; attention over channels is none, and keeps what it computes."""

import copy

import pytest
import timm
import torch

import visionpos as vp
from tests.hosts.same_bits import OWN, check_same_bits
from tests.small import pictures, randomised
from visionpos.convert import find_host

SIZE, OTHER = (64, 96), (80, 52)  # the second is no multiple of a window
OPTIONS = {
    "embed_dims": (24, 48),
    "depths": (1, 2),
    "num_heads": (2, 3),
    "window_size": 5,
    "num_classes": 4,
    "pretrained_cfg_overlay": {"input_size": (3, *SIZE)},
}
KINDS = {
    "davit_tiny": {},
    "davit_huge_fl": {},  # Florence: blocks with names, another attention over channels, other convolutions
    "channels first": {"attn_types": ("channel", "spatial")},
}


def plain_model(kind="davit_tiny", **options):
    torch.manual_seed(0)
    name = kind if kind.startswith("davit") else "davit_tiny"
    return randomised(timm.create_model(name, **{**OPTIONS, **KINDS[kind], **options}))


@pytest.mark.parametrize("size", [SIZE, OTHER])
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_converting_to_what_the_host_has_changes_no_bit(kind, size):
    ways = ({}, {"norm": True}, {"indices": [0], "stop_early": True})
    check_same_bits(plain_model(kind), pictures(size), [], OWN, "none", ways=ways)


@pytest.mark.parametrize("size", [SIZE, OTHER])
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_a_bias_of_zero_changes_nothing(kind, size):
    plain, x = plain_model(kind).double(), pictures(size).double()
    model = vp.set_encoding(copy.deepcopy(plain), {"name": "relative_table", "init_std": 0.0})
    assert (model(x) - plain(x)).abs().max() < 1e-12


@torch.no_grad()
def test_layers_are_the_spatial_blocks():
    model = plain_model()
    vp.set_encoding(model, "rope_axial+peg")
    facts = find_host(model).layer_facts(model)
    assert [(fact.dim, fact.feat_shape) for fact in facts] == [(24, (5, 5)), (48, (5, 5)), (48, (5, 5))]
    assert [len(block.mixers) for block in find_host(model).blocks(model)] == [1, 1, 0]
    with pytest.raises(ValueError, match="no attention layers"):
        vp.set_encoding(plain_model(attn_types=("channel",)), "alibi2d")


@torch.no_grad()
def test_input_encodings_reach_the_first_block():
    model = plain_model()
    seen = []
    model.stages[0].blocks[0].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    x = pictures(SIZE)
    model(x)
    vp.set_encoding(model, "sincos2d")(x)
    table = vp.get_encoding(model)[0].embed(vp.Positions.grid((16, 24)))  # (N, 24)
    assert torch.allclose(seen[1], seen[0] + table.t().view(24, 16, 24), atol=1e-6)
