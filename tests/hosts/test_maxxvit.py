"""MaxViT and CoAtNet as hosts: their own tables and networks kept, windows and dilated grids, other sizes."""

import copy

import pytest
import timm
import torch

import visionpos as vp
from tests.small import needs_newer_timm, pictures, randomised

SIZE, OTHER = (64, 96), (96, 64)
MAXVIT = {
    "embed_dim": (24, 24),
    "depths": (1, 1),
    "block_type": ("M", "M"),
    "stem_width": 12,
    "transformer_dim_head": 12,
    "transformer_partition_ratio": 32,
}
COAT = {
    "embed_dim": (12, 24),
    "depths": (1, 2),
    "block_type": ("C", "T"),
    "stem_width": 12,
    "transformer_dim_head": 12,
}
KINDS = {  # what timm calls them; its own rounding: a table of three axes does not reach torch's fused attention there
    "TensorFlow's table": ("maxvit_tiny_tf_224", MAXVIT, "relative_table", 1e-5),
    "table": ("maxvit_tiny_rw_224", MAXVIT, "relative_table", 0),
    "network": ("maxvit_rmlp_pico_rw_256", MAXVIT, "RelPosMlp", 0),
    "maps of channels first": (
        "maxvit_tiny_rw_224",
        {**MAXVIT, "transformer_use_nchw_attn": True},
        "relative_table",
        0,
    ),
    "CoAtNet's table": ("coatnet_0_rw_224", {**COAT, "head_hidden_size": 24}, "relative_table", 0),
    "CoAtNet's network": ("coatnet_rmlp_nano_rw_224", {**COAT, "head_hidden_size": 24}, "RelPosMlp", 0),
}

pytestmark = needs_newer_timm


def plain_model(kind):
    name, options, *_ = KINDS[kind]
    torch.manual_seed(0)
    return randomised(timm.create_model(name, img_size=SIZE, num_classes=5, **options))


def close(a, b, tolerance):
    assert (a - b).abs().max() <= tolerance


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_converting_to_what_the_host_has_changes_nothing(kind):
    *_, name, rounding = KINDS[kind]
    plain, x = plain_model(kind), pictures(SIZE)
    model = copy.deepcopy(plain)
    assert {encoding.name for encoding in vp.get_encoding(model)} == {name}
    for _ in range(2):
        assert list(model.state_dict()) == list(plain.state_dict())
        assert [t.shape for t in model.state_dict().values()] == [t.shape for t in plain.state_dict().values()]
        close(model(x), plain(x), rounding)
        close(model.double()(x.double()), copy.deepcopy(plain).double()(x.double()), 1e-7)
        model.float().load_state_dict(plain.state_dict())
        if name == "relative_table":
            vp.set_encoding(model, "relative_table")
    for got, want in zip(model.forward_intermediates(x)[1], plain.forward_intermediates(x)[1], strict=True):
        close(got, want, rounding)
    assert (vp.set_encoding(model, "none")(x) - plain(x)).abs().max() > 1e-4
    assert not [key for key in model.state_dict() if "rel_pos" in key]


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_the_input_size_changes_as_in_timm(kind):
    plain = plain_model(kind)
    model = copy.deepcopy(plain)
    vp.get_encoding(model)
    for resized in (model, plain):
        resized.set_input_size(OTHER)
    assert [t.shape for t in model.state_dict().values()] == [t.shape for t in plain.state_dict().values()]
    close(model(pictures(OTHER)), plain(pictures(OTHER)), 1e-6)
    vp.set_encoding(model, "learned+relative_table")
    model.set_input_size(SIZE)
    assert model(pictures(SIZE)).isfinite().all()


@pytest.mark.parametrize("kind", ["TensorFlow's table", "CoAtNet's table"])
def test_a_table_that_stays_beside_others_keeps_its_name_layout_and_values(kind):
    plain, x = plain_model(kind), pictures(SIZE)
    model = vp.set_encoding(copy.deepcopy(plain), "relative_table+peg")
    assert {k: t.shape for k, t in plain.state_dict().items()}.items() <= {
        k: t.shape for k, t in model.state_dict().items()
    }.items()
    close(vp.set_encoding(model, "relative_table")(x), plain(x), 1e-6)


def test_a_dilated_grid_has_steps_of_its_own():
    """alibi2d sees distance 1 between neighbours of a group, which lie two patches apart on the map."""
    model = vp.set_encoding(plain_model("table"), {"name": "alibi2d", "layers": [0, 1]})
    windows, grids = (
        block.attn for block in (model.stages[0].blocks[0].attn_block, model.stages[0].blocks[0].attn_grid)
    )
    assert windows.encodings[0] is grids.encodings[0]
    bias = grids.encodings[0].bias(vp.Positions.grid((2, 3)))
    assert (bias[0, 0, 1] / bias[0, 0, 2]).item() == pytest.approx(0.5)


def test_a_layer_with_fewer_channels_inside_mixes_its_values():
    """The first attention of a CoAtNet widens its tokens by a projection, behind its values."""
    name, options, *_ = KINDS["CoAtNet's network"]
    model = vp.set_encoding(timm.create_model(name, img_size=SIZE, **options), "lepe").eval()
    assert [encoding.dim for encoding in vp.get_encoding(model)] == [12, 24]
    x = pictures(SIZE)
    before = model(x)
    with torch.no_grad():
        vp.get_encoding(model)[0].proj.weight.add_(1)
    assert (model(x) - before).abs().max() > 1e-4


def test_what_it_has_no_place_for_is_one_line():
    name, options, *_ = KINDS["CoAtNet's network"]
    model = timm.create_model(name, img_size=SIZE, **options)
    before = vp.get_encoding(model)
    with pytest.raises(ValueError, match="^lepe was built with dim=24, but the model has 12$"):
        vp.set_encoding(model, {"name": "lepe", "dim": 24})
    assert vp.get_encoding(model) == before
    parallel = timm.create_model("maxvit_tiny_pm_256", img_size=64, **{**MAXVIT, "block_type": ("PM", "PM")})
    with pytest.raises(ValueError, match="windows and grids in parallel takes no encodings"):
        vp.set_encoding(parallel, "none")
