"""PiT as host: its table keeps timm's layout, every stage sees a grid of its own, class tokens have no place."""

import pytest
import timm
import torch

import visionpos as vp
from tests.hosts.same_bits import OWN, check_same_bits
from tests.small import pictures, randomised
from visionpos.convert import find_host

SIZE, OTHER = (64, 96), (48, 40)
OPTIONS = {"base_dims": (16, 16, 16), "depth": (1, 2, 1), "heads": (2, 4, 4), "num_classes": 4}


def plain_model(name="pit_ti_224", size=SIZE):
    torch.manual_seed(0)
    return randomised(timm.create_model(name, img_size=size, **OPTIONS))


@pytest.mark.parametrize("size", [SIZE, OTHER])
@pytest.mark.parametrize("name", ["pit_ti_224", "pit_s_distilled_224"])
@torch.no_grad()
def test_converting_to_what_the_host_has_changes_no_bit(name, size):
    check_same_bits(plain_model(name, size), pictures(size), ["learned"], "learned", OWN)


@torch.no_grad()
def test_the_table_is_resized_for_another_picture_as_its_encoding_says():
    """timm's own takes one size only."""
    model = plain_model()
    (learned,) = vp.get_encoding(model)
    rows = learned.embed(vp.Positions.grid((5, 9)))
    other = plain_model(size=(48, 80))  # 5 x 9 patches
    other.load_state_dict(model.state_dict() | {"pos_embed": rows.t().view(1, -1, 5, 9)})
    x = pictures((48, 80))
    assert (model(x) - other(x)).abs().max() < 1e-5


def test_each_stage_sees_its_own_grid_behind_its_prefix_tokens():
    model = plain_model("pit_s_distilled_224")
    vp.get_encoding(model)
    facts = find_host(model).layer_facts(model)
    maps = [tuple(found.shape[2:]) for found in model.forward_intermediates(pictures(SIZE))[1]]
    assert [fact.feat_shape for fact in facts] == [maps[0], maps[1], maps[1], maps[2]]
    assert {fact.num_prefix_tokens for fact in facts} == {2}
    vp.set_encoding(model, "lookhere+lepe")
    assert model(pictures(SIZE)).isfinite().all()


def test_without_positions_patches_of_one_stage_are_a_set():
    model = vp.set_encoding(
        timm.create_model(
            "pit_ti_224", img_size=(32, 48), patch_size=8, stride=8, base_dims=(16,), depth=(2,), heads=(3,)
        ),
        "none",
    ).eval()
    assert "pos_embed" not in model.state_dict()
    x = pictures((32, 48))
    assert torch.allclose(model(x.roll(16, -1)), model(x), atol=1e-5)
    vp.set_encoding(model, "rope_axial")
    assert (model(x.roll(16, -1)) - model(x)).abs().max() > 1e-5


def test_another_layout_of_features_is_one_line():
    with pytest.raises(ValueError, match="output_fmt must be 'NCHW', got 'NLC'"):
        vp.set_encoding(plain_model(), "none").forward_intermediates(pictures(SIZE), output_fmt="NLC")
