"""Twins as host: windows, pooled keys, and the PEG of every stage under timm's name."""

import copy

import pytest
import timm
import torch

import visionpos as vp
from tests.hosts.same_bits import OWN, check_same_bits
from tests.small import pictures, randomised

SIZE, OTHER = (64, 96), (80, 52)  # the second is no multiple of a window
OPTIONS = {
    "img_size": SIZE,
    "embed_dims": (24, 48),
    "depths": (2, 1),
    "num_heads": (2, 3),
    "sr_ratios": (4, 1),
    "mlp_ratios": (2, 2),
    "num_classes": 4,
}
KINDS = {"twins_svt_small": {"wss": (5, 3)}, "twins_pcpvt_small": {}}


def plain_model(name="twins_svt_small"):
    torch.manual_seed(0)
    return randomised(timm.create_model(name, **OPTIONS, **KINDS[name]))


@pytest.mark.parametrize("size", [SIZE, OTHER])
@pytest.mark.parametrize("name", KINDS)
@torch.no_grad()
def test_converting_to_what_the_host_has_changes_no_bit(name, size):
    ways = ({}, {"norm": True}, {"indices": [0], "stop_early": True})
    check_same_bits(plain_model(name), pictures(size), ["peg", "peg"], "peg", OWN, ways=ways)


@pytest.mark.parametrize("size", [SIZE, OTHER])
@pytest.mark.parametrize("name", KINDS)
@torch.no_grad()
def test_a_bias_of_zero_changes_nothing(name, size):
    """By the path with encodings, windows that are padded included."""
    plain, x = plain_model(name).double(), pictures(size).double()
    model = vp.set_encoding(copy.deepcopy(plain), ["peg", {"name": "relative_table", "init_std": 0.0}])
    assert {k: t.shape for k, t in plain.state_dict().items()}.items() <= {
        k: t.shape for k, t in model.state_dict().items()
    }.items()
    assert (model(x) - plain(x)).abs().max() < 1e-12


@torch.no_grad()
def test_a_peg_that_goes_takes_its_parameters_along_and_comes_back_under_its_name():
    plain, x = plain_model(), pictures(SIZE)
    model = copy.deepcopy(plain)
    pegs = vp.get_encoding(model)
    vp.set_encoding(model, "none")
    assert not [key for key in model.state_dict() if key.startswith("pos_block")]
    assert (model(x) - plain(x)).abs().max() > 1e-3
    vp.set_encoding(model, [{"name": "peg", "layers": [1]}])
    assert [key for key in model.state_dict() if "mixers" in key] == [
        "blocks.0.1.mixers.0.proj.weight",
        "blocks.0.1.mixers.0.proj.bias",
    ]
    vp.set_encoding(model, "peg")
    for peg, conv in zip(vp.get_encoding(model), plain.pos_block, strict=True):
        peg.proj.load_state_dict(conv.proj[0].state_dict())
    assert list(model.state_dict()) == list(plain.state_dict())
    assert torch.equal(model(x), plain(x))
    assert len(pegs) == 2


@torch.no_grad()
def test_windows_know_no_other_windows():
    """A change in one window of the first layer changes the tokens of that window alone."""
    model = vp.set_encoding(plain_model(), "rope_axial+alibi2d")
    attn = model.blocks[0][0].attn
    x = torch.randn(1, 16 * 24, 24, generator=torch.Generator().manual_seed(0))
    y = x.clone().view(1, 16, 24, 24)
    y[:, 5:10, 20:] += 1  # the window of row 1 and column 4, which the border cuts
    apart = (attn(y.flatten(1, 2), (16, 24)) - attn(x, (16, 24))).view(16, 24, 24).abs().amax(-1) > 1e-6
    assert apart[5:10, 20:].all()
    apart[5:10, 20:] = False
    assert not apart.any()


def test_weight_decay_spares_the_bias_of_a_peg_by_the_name_it_has():
    model = plain_model()
    for peg, conv in zip(vp.get_encoding(model), model.pos_block, strict=True):
        assert [peg.owner.get_parameter(name) is conv.proj[0].bias for name in peg.no_weight_decay()] == [True]
    assert model.no_weight_decay() <= set(dict(model.named_parameters()))
