"""CrossViT as host: two branches, each with a grid, a table and blocks of its own."""

import copy

import pytest
import timm
import torch

import visionpos as vp
from tests.hosts.same_bits import OWN, shapes
from tests.small import needs_newer_timm, pictures, randomised
from visionpos.convert import find_host

SIZE, OTHER = (48, 72), (72, 96)
OPTIONS = {
    "patch_size": (12, 16),
    "embed_dim": (48, 96),
    "depth": ((1, 2, 0), (1, 1, 0)),
    "num_heads": (3, 6),
    "num_classes": 4,
}
KINDS = {  # pictures are cropped in the one, and scaled in the other, whose patches are convolutions
    "crossvit_9_240": {"img_scale": (1.0, 2 / 3), "crop_scale": True},
    "crossvit_9_dagger_240": {"img_scale": (1.0, 2 / 3)},
}

pytestmark = needs_newer_timm


def plain_model(name="crossvit_9_240", size=SIZE):
    torch.manual_seed(0)
    return randomised(timm.create_model(name, img_size=size, **OPTIONS, **KINDS[name]))


@pytest.mark.parametrize("size", [SIZE, OTHER])
@pytest.mark.parametrize("name", KINDS)
@torch.no_grad()
def test_converting_to_what_the_host_has_changes_no_bit(name, size):
    plain, x = plain_model(name, size), pictures(size)
    model = copy.deepcopy(plain)
    assert [encoding.name for encoding in vp.get_encoding(model)] == ["learned", "learned"]
    for spec in ("learned", OWN):
        parameters = dict(model.named_parameters())
        vp.set_encoding(model, vp.get_encoding(model) if spec is OWN else spec)
        assert shapes(model) == shapes(plain)
        assert all(parameter is parameters[name] for name, parameter in model.named_parameters())
        assert torch.equal(model(x), plain(x))
    for way in ({}, {"indices": [0, 3], "norm": True}, {"indices": [0], "stop_early": True}):
        (last, found), (last_of_timm, found_of_timm) = (each.forward_intermediates(x, **way) for each in (model, plain))
        pairs = zip([*last, *found], [*last_of_timm, *found_of_timm], strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)
    assert torch.equal(model.double()(x.double()), plain.double()(x.double()))
    assert model.no_weight_decay() == plain.no_weight_decay()


@torch.no_grad()
def test_each_branch_has_an_encoding_of_its_width_on_its_grid():
    model, x = plain_model(), pictures(SIZE)
    vp.set_encoding(model, "sincos2d+alibi2d")
    assert [(e.dim, e.reference_shape) for e in vp.get_encoding(model) if e.place == "input"] == [
        (48, (4, 6)),
        (96, (2, 3)),
    ]
    facts = find_host(model).layer_facts(model)
    assert [(fact.feat_shape, fact.num_heads, fact.layer, fact.depth) for fact in facts] == [
        ((4, 6), 3, 0, 2),
        ((4, 6), 3, 1, 2),
        ((2, 3), 6, 0, 3),
        ((2, 3), 6, 1, 3),
        ((2, 3), 6, 2, 3),
    ]
    before = model._embed(x)
    vp.set_encoding(model, ["alibi2d", {"name": "sincos2d", "dim": 96}])
    after = model._embed(x)
    assert torch.equal(before[1], after[1])
    assert (before[0] - after[0]).abs().max() > 0.1
    with pytest.raises(ValueError, match="dim=64, but the model has 48"):
        vp.set_encoding(model, {"name": "sincos2d", "dim": 64})


@torch.no_grad()
def test_without_positions_a_branch_is_a_set_of_patches():
    model = vp.set_encoding(plain_model(), "none")
    assert not [key for key in model.state_dict() if "pos_embed" in key]
    branch, x = model.blocks[0].blocks[1], torch.randn(2, 7, 96, generator=torch.Generator().manual_seed(0))
    order = torch.tensor([0, 4, 2, 6, 1, 3, 5])
    assert torch.allclose(branch(x[:, order]), branch(x)[:, order], atol=1e-5)
    vp.set_encoding(model, "rope_axial")
    assert (branch(x[:, order]) - branch(x)[:, order]).abs().max() > 1e-3


def test_saved_and_loaded_with_other_encodings_in_each_branch(tmp_path):
    spec = [{"name": "learned", "dim": 96}, {"name": "sincos2d", "dim": 48, "temperature": 10.0}, "rope_axial"]
    model = randomised(vp.set_encoding(plain_model(), spec))
    timm.models.save_for_hf(model, tmp_path)
    loaded = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert [encoding.name for encoding in vp.get_encoding(loaded)][:2] == ["sincos2d", "learned"]
    assert torch.equal(loaded(pictures(SIZE)), model(pictures(SIZE)))


def test_branches_of_one_width_are_one_line():
    model = timm.create_model("crossvit_9_240", img_size=SIZE, **{**OPTIONS, "embed_dim": (48, 48)})
    with pytest.raises(ValueError, match="adds positions to tokens of 48 and 48 channels: only where these differ"):
        vp.set_encoding(model, "none")
