"""timm's ViT with relative position biases as host: tables and small networks, kept bit by bit under timm's names."""

import copy

import pytest
import timm
import torch
from timm.models.vision_transformer_relpos import ResPostRelPosBlock, VisionTransformerRelPos

import visionpos as vp
from tests.hosts import isotropic_checks as checks
from tests.hosts.isotropic_checks import ENCODINGS, OTHER, SIZE
from tests.small import in_turn, needs_newer_timm, pictures


def relpos(**options):
    return checks.build(VisionTransformerRelPos, **options)


TABLES, SHARED = {"rel_pos_type": "bias"}, {"rel_pos_type": "bias", "shared_rel_pos": True}
KINDS = {
    "tables": (TABLES, ["relative_table"] * 2),
    "tables, class token": ({**TABLES, "class_token": True, "qk_norm": True}, ["relative_table"] * 2),
    "shared table": ({**SHARED, "block_fn": ResPostRelPosBlock}, ["relative_table"]),
    "networks": ({}, ["RelPosMlp"] * 2),
    "networks of Swin V2": ({"rel_pos_type": "mlp-swin", "class_token": True}, ["RelPosMlp"] * 2),
    "shared network": ({"shared_rel_pos": True, "rel_pos_dim": 32}, ["RelPosMlp"]),
}


@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
@pytest.mark.parametrize(("options", "names"), KINDS.values(), ids=KINDS)
def test_converting_to_what_the_host_has_changes_nothing(options, names, fused):
    plain = relpos(**options)
    for block in plain.blocks:
        block.attn.fused_attn = fused
    model, untouched = copy.deepcopy(plain), copy.deepcopy(plain)
    assert [encoding.name for encoding in vp.get_encoding(model)] == names
    for _ in range(2):
        checks.check_same_names(model, plain)
        assert torch.equal(model(pictures()), untouched(pictures()))
        checks.check_intermediates(model, plain)
        if names[0] == "relative_table":
            vp.set_encoding(model, "relative_table")
    assert (vp.set_encoding(model, "none")(pictures()) - plain(pictures())).abs().max() > 1e-4
    assert not [n for n, _ in model.named_parameters() if "rel_pos" in n]


@needs_newer_timm
@pytest.mark.parametrize(("options", "names"), KINDS.values(), ids=KINDS)
def test_set_input_size_is_timms(options, names):
    """But for the values of resized tables: interpolated linearly here, by cubic splines in timm."""
    plain = relpos(**options)
    model = copy.deepcopy(plain)
    assert [encoding.name for encoding in vp.get_encoding(model)] == names
    for resized in (model, plain):
        resized.set_input_size(OTHER)
    assert {n: p.shape for n, p in model.named_parameters()} == {n: p.shape for n, p in plain.named_parameters()}
    checks.check_same_names(model, plain)  # with one's weights in the other
    assert (model(pictures(OTHER)) - plain(pictures(OTHER))).abs().max() < 1e-6


@pytest.mark.parametrize("options", [{}, {"shared_rel_pos": True}], ids=["networks", "shared network"])
def test_a_network_of_the_host_trains_with_timms_dropout(options):
    plain = relpos(**options).train()
    model = copy.deepcopy(plain)
    assert vp.get_encoding(model)[0].name == "RelPosMlp"
    results = []
    for trained in (plain, model):
        torch.manual_seed(5)
        results.append(trained(pictures()))
    assert torch.equal(*results)
    torch.manual_seed(6)
    assert not torch.equal(model(pictures()), results[1])
    checks.check_training(model)


@pytest.mark.parametrize("options", [KINDS["networks"][0], KINDS["networks of Swin V2"][0]], ids=["cr", "swin"])
def test_a_network_of_the_host_reads_any_coordinates(options):
    model = relpos(**options)
    network = vp.get_encoding(model)[0]
    grid = vp.Positions.grid((8, 12))
    order = torch.randperm(96, generator=torch.Generator().manual_seed(0))
    want = network.bias(grid)[:, order][:, :, order]
    assert (network.bias(grid.keep(order)) - want).abs().max() < 1e-5
    assert want.std() > 1e-3


@pytest.mark.parametrize("options", [TABLES, SHARED], ids=["tables", "shared table"])
def test_dropouts_are_timms(options):
    plain = relpos(**options, drop_rate=0.1, proj_drop_rate=0.1, attn_drop_rate=0.1, drop_path_rate=0.2)
    checks.check_dropouts(vp.set_encoding(copy.deepcopy(plain), "relative_table"), plain)


def test_models_of_timm():
    options = {"patch_size": 4, "embed_dim": 48, "depth": 1, "num_heads": 3, "img_size": SIZE}
    for name in ("vit_relpos_small_patch16_224", "vit_srelpos_small_patch16_224", "vit_relpos_medium_patch16_rpn_224"):
        plain = timm.create_model(name, **options).eval()
        model = copy.deepcopy(plain)
        assert len(vp.get_encoding(model)) == 1
        assert torch.equal(model(pictures()), plain(pictures()))


@pytest.mark.parametrize("name", in_turn(ENCODINGS, 2))
def test_every_encoding_trains(name):
    model = vp.set_encoding(relpos(class_token=len(name) % 2 == 0), name)
    checks.check_training(model)
    assert {encoding.name for encoding in vp.get_encoding(model)} == {name}


@pytest.mark.parametrize("options", [TABLES, SHARED], ids=["tables", "shared table"])
def test_tables_train(options):
    checks.check_training(vp.set_encoding(relpos(**options), "relative_table+learned"))


@pytest.mark.parametrize("name", [*in_turn(ENCODINGS, 1), "none"])
def test_patch_order_matters_only_with_an_encoding(name):
    difference = checks.order_matters(vp.set_encoding(relpos(class_token=True), name))
    assert difference < 1e-12 if name == "none" else difference > 1e-7


def test_tables_are_where_timm_has_them():
    model = relpos(**TABLES)
    table = model.blocks[1].attn.rel_pos.relative_position_bias_table
    vp.set_encoding(model, "sincos2d+relative_table")
    assert model.blocks[1].attn.rel_pos.relative_position_bias_table is table
    assert "blocks.1.attn.rel_pos.relative_position_bias_table" in model.no_weight_decay()
    vp.set_encoding(model, "rope_axial")
    assert model.blocks[1].attn.rel_pos is None
    vp.set_encoding(model, "relative_table")
    model.load_state_dict(relpos(**TABLES).state_dict(), strict=True)
    shared = vp.create_encoding("relative_table", num_heads=3, feat_shape=(8, 12))
    model = vp.set_encoding(relpos(), shared)
    model.load_state_dict(relpos(**SHARED).state_dict(), strict=True)


@pytest.mark.parametrize(("options", "names"), KINDS.values(), ids=KINDS)
def test_copies_are_independent_and_equal(options, names):
    model = relpos(**options)
    assert [encoding.name for encoding in vp.get_encoding(model)] == names
    checks.check_copies(model)


@pytest.mark.parametrize("spec", [None, "relative_table", "learned+rope_mixed+alibi2d", "sincos2d+peg"])
def test_gradient_checkpointing(spec):
    model = relpos(**SHARED)
    vp.get_encoding(model) if spec is None else vp.set_encoding(model, spec)
    checks.check_checkpointing(model, pictures(SIZE), pictures(SIZE))


@pytest.mark.parametrize("name", in_turn(ENCODINGS, 2))
def test_other_resolutions(name):
    model = vp.set_encoding(relpos(), name)
    model.set_input_size(OTHER)
    assert model(pictures(OTHER)).isfinite().all()
    (_, features) = model.forward_intermediates(pictures(OTHER))
    assert features[-1].shape == (2, 48, 10, 6)


def test_a_network_of_the_host_is_kept_by_its_name_and_cannot_be_built():
    plain = timm.create_model(
        "vit_relpos_small_patch16_224", img_size=(16, 24), patch_size=4, embed_dim=48, depth=2, num_heads=3
    )
    model = copy.deepcopy(plain)
    vp.set_encoding(model, "RelPosMlp+rope_axial")
    assert sorted(encoding.name for encoding in vp.get_encoding(model)) == ["RelPosMlp", "RelPosMlp", "rope_axial"]
    vp.set_encoding(model, "RelPosMlp")
    x = torch.randn(2, 3, 16, 24)
    assert torch.equal(model.eval()(x), plain.eval()(x))
    vp.set_encoding(model, "alibi2d")
    with pytest.raises(ValueError, match=r"^RelPosMlp needs host; a model fills in only dim, "):
        vp.set_encoding(model, "RelPosMlp")
