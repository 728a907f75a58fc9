"""timm's BEiT as host: a relative table in every layer, or one for all, kept bit by bit under timm's names."""

import copy

import pytest
import timm
import torch
from timm.models.beit import Beit

import visionpos as vp
from tests.hosts import isotropic_checks as checks
from tests.hosts.isotropic_checks import ENCODINGS, OTHER, SIZE
from tests.small import in_turn, needs_newer_timm, pictures


def beit(**options):
    return checks.build(Beit, **({"use_abs_pos_emb": False} | options))


TABLES, SHARED = {"use_rel_pos_bias": True}, {"use_shared_rel_pos_bias": True}
KINDS = {
    "tables": (TABLES, ["relative_table"] * 2),
    "shared table": ({**SHARED, "init_values": 0.1}, ["relative_table"]),
    "learned": ({"use_abs_pos_emb": True, "qkv_bias": False}, ["learned"]),
    "both": ({"use_abs_pos_emb": True, **TABLES, "swiglu_mlp": True}, ["learned", "relative_table", "relative_table"]),
    "none": ({"global_pool": "token"}, []),
}


@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
@pytest.mark.parametrize(("options", "names"), KINDS.values(), ids=KINDS)
def test_converting_to_what_the_host_has_changes_nothing(options, names, fused):
    plain = beit(**options)
    for block in plain.blocks:
        block.attn.fused_attn = fused
    model, untouched = copy.deepcopy(plain), copy.deepcopy(plain)
    assert [encoding.name for encoding in vp.get_encoding(model)] == names
    for _ in range(2):
        checks.check_same_names(model, plain)
        assert torch.equal(model(pictures()), untouched(pictures()))
        checks.check_intermediates(model, plain)
        vp.set_encoding(model, sorted(set(names)) or "none")
    if names:
        assert (vp.set_encoding(model, "none")(pictures()) - plain(pictures())).abs().max() > 1e-3


@needs_newer_timm
@pytest.mark.parametrize(("options", "names"), KINDS.values(), ids=KINDS)
def test_set_input_size_is_timms(options, names):
    """But for the values of resized tables: interpolated linearly here, by cubic splines in timm."""
    plain = beit(**options)
    model = copy.deepcopy(plain)
    assert [encoding.name for encoding in vp.get_encoding(model)] == names
    for resized in (model, plain):
        resized.set_input_size(OTHER)
    assert {n: p.shape for n, p in model.named_parameters()} == {n: p.shape for n, p in plain.named_parameters()}
    assert model(pictures(OTHER)).isfinite().all()
    checks.check_same_names(model, plain)  # with one's weights in the other
    assert (model(pictures(OTHER)) - plain(pictures(OTHER))).abs().max() < 1e-6


@pytest.mark.parametrize("options", [TABLES, SHARED], ids=["tables", "shared table"])
def test_dropouts_are_timms(options):
    plain = beit(
        **options, pos_drop_rate=0.2, drop_rate=0.1, proj_drop_rate=0.1, attn_drop_rate=0.1, drop_path_rate=0.2
    )
    checks.check_dropouts(vp.set_encoding(copy.deepcopy(plain), "relative_table"), plain)


def test_a_model_of_timm():
    options = {"patch_size": 4, "embed_dim": 48, "depth": 1, "num_heads": 3, "img_size": SIZE}
    plain = timm.create_model("beitv2_base_patch16_224", **options).eval()
    model = vp.set_encoding(copy.deepcopy(plain), "relative_table")
    assert torch.equal(model(pictures()), plain(pictures()))


@pytest.mark.parametrize("name", in_turn(ENCODINGS, 1))
def test_every_encoding_trains(name):
    model = vp.set_encoding(beit(**TABLES if name != "learned" else SHARED), name)
    checks.check_training(model)
    assert {encoding.name for encoding in vp.get_encoding(model)} == {name}


def test_a_shared_table_trains():
    model = vp.set_encoding(beit(**SHARED), "relative_table")
    checks.check_training(model)
    assert model.rel_pos_bias.relative_position_bias_table.grad.abs().sum() > 0


@pytest.mark.parametrize("name", [*in_turn(ENCODINGS, 0), "none"])
@pytest.mark.parametrize("options", [TABLES, SHARED], ids=["tables", "shared table"])
def test_patch_order_matters_only_with_an_encoding(name, options):
    difference = checks.order_matters(vp.set_encoding(beit(**options, use_abs_pos_emb=True), name))
    assert difference < 1e-12 if name == "none" else difference > 1e-7


def test_tables_are_where_timm_has_them():
    model = beit(**TABLES)
    table = model.blocks[1].attn.relative_position_bias_table
    vp.set_encoding(model, "rope_axial+relative_table")
    assert model.blocks[1].attn.relative_position_bias_table is table
    assert vp.get_encoding(model)[2].relative_position_bias_table is table
    vp.set_encoding(model, "rope_axial")
    assert model.blocks[1].attn.relative_position_bias_table is None
    assert not [n for n, _ in model.named_parameters() if "relative" in n]
    vp.set_encoding(model, {"name": "relative_table", "preset": "beit"})
    model.load_state_dict(beit(**TABLES).state_dict(), strict=True)
    shared = vp.set_encoding(beit(**SHARED), "none")
    assert shared.rel_pos_bias is None
    vp.set_encoding(shared, vp.create_encoding("relative_table", num_heads=3, feat_shape=(8, 12), preset="beit"))
    shared.load_state_dict(beit(**SHARED).state_dict(), strict=True)


@pytest.mark.parametrize("spec", ["relative_table", "learned+rope_mixed", "sincos2d+peg"])
@pytest.mark.parametrize("options", [TABLES, SHARED], ids=["tables", "shared table"])
def test_copies_are_independent_and_equal(spec, options):
    checks.check_copies(vp.set_encoding(beit(**options), spec))


@pytest.mark.parametrize("spec", ["relative_table", "learned+rope_mixed+alibi2d", "sincos2d+peg"])
@pytest.mark.parametrize("options", [TABLES, SHARED], ids=["tables", "shared table"])
def test_gradient_checkpointing(spec, options):
    checks.check_checkpointing(vp.set_encoding(beit(**options), spec), pictures(SIZE), pictures(SIZE))


@pytest.mark.parametrize("name", in_turn(ENCODINGS, 1))
def test_other_resolutions(name):
    model = vp.set_encoding(beit(**TABLES), name)
    model.set_input_size(OTHER)
    assert model(pictures(OTHER)).isfinite().all()
    (_, features) = model.forward_intermediates(pictures(OTHER))
    assert features[-1].shape == (2, 48, 10, 6)


def test_coordinates_can_be_augmented():
    model = vp.set_encoding(beit(**TABLES), "relative_table+learned")
    model.coordinate_augmentation = vp.CoordinateAugmentation(rescale=2.0)
    assert not torch.equal(model.train()(pictures()), model(pictures()))
    assert torch.equal(model.eval()(pictures()), model(pictures()))


def test_errors():
    with pytest.raises(ValueError, match="two tables in every layer"):
        vp.set_encoding(beit(**TABLES, **SHARED), "none")
    model = vp.set_encoding(beit(), "alibi2d")
    with pytest.raises(ValueError, match="output_fmt must be 'NCHW' or 'NLC', got 'NHWC'"):
        model.forward_intermediates(pictures(), output_fmt="NHWC")
    with pytest.raises(TypeError, match="img_sizes"):
        model.set_input_size(img_sizes=OTHER)
