"""CoaT as host: factorised attention, with a PEG and a convolution of the values that all layers of a scale share."""

import pytest
import timm
import torch

import visionpos as vp
from tests.hosts.same_bits import OWN, check_same_bits
from tests.small import needs_newer_timm, pictures, randomised

SIZE, OTHER = (64, 96), (96, 32)
OPTIONS = {"num_classes": 4, "num_heads": 8, "serial_depths": (1, 2, 1, 1), "mlp_ratios": (2, 2, 2, 2)}
KINDS = {
    "coat_lite_tiny": {"embed_dims": (64, 64, 96, 128)},
    "coat_tiny": {"embed_dims": (64, 64, 64, 64), "parallel_depth": 2},
}
OWN_NAMES = ["ConvRelPosEnc", "peg"]  # of each scale


def plain_model(name="coat_lite_tiny", size=SIZE):
    torch.manual_seed(0)
    return randomised(timm.create_model(name, img_size=size, **OPTIONS, **KINDS[name]))


@needs_newer_timm  # or it has no intermediates
@pytest.mark.parametrize("size", [SIZE, OTHER])
@torch.no_grad()
def test_converting_to_what_the_host_has_changes_no_bit(size):
    ways = ({}, {"norm": True}, {"indices": [1], "stop_early": True})
    plain = plain_model(size=size)
    model = check_same_bits(plain, pictures(size), OWN_NAMES * 4, "peg+ConvRelPosEnc", OWN, ways=ways)
    assert model.no_weight_decay() - plain.no_weight_decay() == {f"cpe{scale}.proj.bias" for scale in range(1, 5)}


@needs_newer_timm  # or it has no intermediates
@torch.no_grad()
def test_with_parallel_blocks_neither():
    """Whose features are those of three scales."""
    plain, model = plain_model("coat_tiny"), plain_model("coat_tiny")
    assert [encoding.name for encoding in vp.get_encoding(model)] == OWN_NAMES * 4
    for spec in ("peg+ConvRelPosEnc", vp.get_encoding(model)):
        vp.set_encoding(model, spec)
        assert torch.equal(model(pictures(SIZE)), plain(pictures(SIZE)))
        (last, found), (want, found_want) = (each.forward_intermediates(pictures(SIZE)) for each in (model, plain))
        assert all(torch.equal(a, b) for a, b in zip([*last, *found], [*want, *found_want], strict=True))
    assert list(model.state_dict()) == list(plain.state_dict())


@pytest.mark.parametrize("name", KINDS)
@torch.no_grad()
def test_what_goes_takes_its_parameters_along_and_a_peg_comes_back_under_its_names(name):
    plain, model, x = plain_model(name), plain_model(name), pictures(SIZE)
    vp.set_encoding(model, "none")
    assert not [key for key in model.state_dict() if "cpe" in key or "conv_list" in key]
    assert (model(x) - plain(x)).abs().max() > 1e-3
    vp.set_encoding(model, "peg")
    assert {key for key in model.state_dict() if "cpe" in key} == {key for key in plain.state_dict() if "cpe" in key}
    model.load_state_dict(plain.state_dict(), strict=False)
    kept = plain_model(name)
    vp.set_encoding(kept, "peg")
    assert torch.equal(model(x), kept(x))


@torch.no_grad()
def test_the_convolution_of_values_is_weighed_by_queries():
    model = plain_model("coat_tiny").double()
    (scale,) = {tuple(e.channel_splits) for e in vp.get_encoding(model) if e.name == "ConvRelPosEnc"}
    attn = model.serial_blocks1[0].factoratt_crpe
    x = torch.randn(2, 1 + 4 * 6, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    with_it = attn(x, (4, 6))
    q, _, v = attn.qkv(x).view(2, 25, 3, 8, 8).unbind(2)
    maps = v[:, 1:].flatten(2).mT.reshape(2, 64, 4, 6).split(scale, dim=1)
    mixed = torch.cat([conv(part) for conv, part in zip(attn.crpe.conv_list, maps, strict=True)], dim=1)
    added = q.flatten(2) * torch.nn.functional.pad(mixed.flatten(2).mT, (0, 0, 1, 0))
    vp.set_encoding(model, "none")
    assert (with_it - attn(x, (4, 6)) - added @ attn.proj.weight.T).abs().max() < 1e-10


def test_a_convolution_in_front_belongs_to_a_scale():
    model = plain_model("coat_tiny")
    with pytest.raises(ValueError, match="asked for in the first, one of layers 0, 1, 5, 8; got 2"):
        vp.set_encoding(model, {"name": "peg", "layers": [0, 2]})
    vp.set_encoding(model, [{"name": "peg", "layers": [1]}, {"name": "lepe", "layers": "::2"}])
    assert "parallel_blocks.1.factoratt_crpe2.encodings.0.proj.weight" in model.state_dict()
    assert [encoding.name for encoding in vp.get_encoding(model)].count("peg") == 1


@pytest.mark.parametrize("name", ["rope_axial", "alibi2d", "shaw", "irpe"])
def test_what_acts_on_pairs_of_patches_is_one_line(name):
    model = plain_model()
    before = vp.get_encoding(model)
    with pytest.raises(ValueError, match=f"^{name} acts on pairs of patches, but the attention of CoaT is factorised"):
        vp.set_encoding(model, f"{name}+sincos2d")
    assert vp.get_encoding(model) == before
