"""GCViT as host: windows and global queries, its tables kept."""

import copy

import pytest
import timm
import torch

import visionpos as vp
from tests.hosts.same_bits import OWN, check_same_bits
from tests.small import needs_newer_timm, pictures, randomised
from visionpos.convert import find_host

pytestmark = needs_newer_timm


def plain_model(size):
    torch.manual_seed(0)
    return randomised(
        timm.create_model("gcvit_xxtiny", img_size=size, embed_dim=16, num_classes=4, layer_scale=0.3), scale=0.05
    )


@pytest.mark.parametrize("size", [(64, 96), (96, 64)])
@torch.no_grad()
def test_converting_to_what_the_host_has_changes_no_bit(size):
    model = check_same_bits(plain_model(size), pictures(size), ["relative_table"] * 12, "relative_table", OWN)
    facts = find_host(model).layer_facts(model)
    windows = [tuple(n // ratio for n in size) for ratio in (32, 32, 16, 32)]
    assert [fact.feat_shape for fact in facts] == [windows[stage] for stage in (0, 0, 1, 1, *[2] * 6, 3, 3)]


@torch.no_grad()
def test_global_queries_are_rotated_by_their_place_in_the_window():
    """By hand in float64: q of the summary and k of a window have the angles of the window's tokens."""
    model = vp.set_encoding(plain_model((64, 96)).double(), "rope_axial")
    attn = model.stages[0].blocks[1].attn
    draw = torch.Generator().manual_seed(0)
    x, q = (torch.randn(n, 6, 16, dtype=torch.float64, generator=draw) for n in (4, 2))  # two windows of two pictures
    k, v = attn.qkv(x).view(4, 6, 2, 2, 8).permute(2, 0, 3, 1, 4)
    heads = q[[0, 0, 1, 1]].view(4, 6, 2, 8).transpose(1, 2)
    rotated, keys = attn.encodings[0](heads, k, vp.Positions.grid((2, 3)).promote(torch.float64))
    want = (rotated @ keys.mT / 8**0.5).softmax(-1) @ v
    want = attn.proj(want.transpose(1, 2).reshape(4, 6, 16))
    assert (attn(x, q.view(2, 2, 3, 16)) - want).abs().max() < 1e-12


@torch.no_grad()
def test_without_its_table_it_computes_and_the_table_is_gone():
    plain, x = plain_model((64, 96)), pictures((64, 96))
    model = vp.set_encoding(copy.deepcopy(plain), "none")
    assert not [key for key in model.state_dict() if "rel_pos" in key]
    assert (model(x) - plain(x)).abs().max() > 1e-3
    zero = copy.deepcopy(plain)
    for name, parameter in zero.named_parameters():
        if "relative_position_bias_table" in name:
            parameter.zero_()
    assert (model(x) - zero(x)).abs().max() < 1e-5
