"""The vision tower of Gemma 4 as host: alone and in a classifier, on pictures and on batches of other grids."""

import copy

import pytest
import timm
import torch

import visionpos as vp
from tests.hosts import isotropic_checks as checks
from tests.hosts.ragged_batches import distance, double, ragged_batch
from tests.small import VIT, pictures, randomised

pytest.importorskip("timm.models.gemma4_vit", reason="this timm is older than these models")
SIZE, OTHER = (24, 36), (36, 24)  # grids of 6 x 9 and 9 x 6, which its pooling by threes needs
GRIDS = [(6, 9), (3, 12), (9, 3), (6, 9)]
SMALL = {**VIT, "img_size": SIZE, "head_dim": 12, "intermediate_size": 64, "position_embedding_size": 20}
ENCODER = {key: value for key, value in SMALL.items() if key != "num_classes"}
KINDS = {
    "classes": ("gemma4_vit_167m", SMALL),
    "classes of pooled tokens": ("gemma4_vit_167m", {**SMALL, "encoder_pool": "soft"}),
    "clamped, wider heads, shared keys": (
        "gemma4_vit_167m",
        {**SMALL, "use_clipped_linears": True, "head_dim": 16, "num_kv_heads": 1},
    ),
    "pooled tokens": ("gemma4_vit_570m_enc", {**ENCODER, "standardize": True}),
    "tokens": ("gemma4_vit_167m_enc", {**ENCODER, "global_pool": ""}),
    "mean": ("gemma4_vit_167m_enc", {**ENCODER, "global_pool": "avg"}),
}
NATIVE = ["factorized", "rope_axial"]


def plain_model(kind, **more):
    name, options = KINDS[kind]
    torch.manual_seed(0)
    return randomised(timm.create_model(name, **{**options, **more}))


def encoder_of(model):
    return getattr(model, "encoder", model)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_converting_to_what_the_host_has_changes_nothing_but_rounding(kind):
    plain = plain_model(kind)
    model = copy.deepcopy(plain)
    assert checks.names_of(model) == NATIVE
    batch, singles = ragged_batch(GRIDS, 54)
    for _ in range(2):
        checks.check_same_names(model, plain)
        for x in (batch, *singles, pictures(SIZE), pictures(OTHER)):
            got, want = model(x), plain(x)
            if kind == "tokens" and x is batch:  # timm's padding sees, and is seen by nothing
                got, want = got[batch["patch_valid"]], want[batch["patch_valid"]]
            assert got.shape == want.shape
            assert (got - want).abs().max() < 2e-6 * want.abs().max().clamp(min=1)
        x = pictures(SIZE).double()
        exact = copy.deepcopy(model).double()(x) - copy.deepcopy(plain).double()(x)
        assert exact.abs().max() < 1e-5  # timm's rope is float32
        vp.set_encoding(model, "+".join(NATIVE))
    assert (vp.set_encoding(model, "none")(pictures(SIZE)) - plain(pictures(SIZE))).abs().max() > 1e-3
    assert not [key for key in model.state_dict() if "position" in key or "pos_embed" in key]


@pytest.mark.parametrize("spec", [None, "sincos2d+rope_mixed+alibi2d+peg", "learned+relative_table+lepe"])
@pytest.mark.parametrize("kind", ["classes", "clamped, wider heads, shared keys", "mean"])
@torch.no_grad()
def test_a_batch_of_grids_is_its_pictures_one_at_a_time(kind, spec):
    model = plain_model(kind).double()
    vp.get_encoding(model) if spec is None else vp.set_encoding(model, spec)
    batch, singles = ragged_batch(GRIDS, 54)
    singles = [picture.double() for picture in singles]
    assert distance(model, double(batch), singles) < 1e-10
    marked = {name: part for name, part in double(batch).items() if name != "patch_valid"}
    marked["patch_coord"] = batch["patch_coord"].masked_fill(~batch["patch_valid"].unsqueeze(-1), -1)
    assert (model(marked) - model(double(batch))).abs().max() < 1e-12  # timm's other way to mark padding


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_intermediates_are_timms(kind):
    plain = plain_model(kind)
    model = copy.deepcopy(plain)
    vp.get_encoding(model)
    for options in ({}, {"output_fmt": "NLC", "indices": [0], "stop_early": True}, {"intermediates_only": True}):
        got, want = (each.forward_intermediates(pictures(SIZE), **options) for each in (model, plain))
        got, want = (each if options.get("intermediates_only") else [each[0], *each[1]] for each in (got, want))
        assert all(a.shape == b.shape and (a - b).abs().max() < 1e-5 for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("name", ["alibi2d", "rope_axial", "sincos2d", "peg", "lepe", "decomposed", "none"])
def test_patch_order_matters_only_with_an_encoding(name):
    model = vp.set_encoding(plain_model("classes"), name).double()
    with torch.no_grad():
        for encoding in vp.get_encoding(model):  # tables that begin at zero
            for parameter in encoding.parameters():
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
        x = pictures(SIZE).double()
        difference = (model(checks.moved(x)) - model(x)).abs().max()
    assert difference < 1e-12 if name == "none" else difference > 1e-7


@pytest.mark.parametrize("spec", [None, "factorized+rope_mixed+peg", "learned+alibi2d"])
@pytest.mark.parametrize("kind", ["tokens", "mean"])
def test_training_copies_checkpointing_and_kept_patches(kind, spec):
    model = plain_model(kind)
    vp.get_encoding(model) if spec is None else vp.set_encoding(model, spec)
    batch, _ = ragged_batch(GRIDS, 54)
    want = model(batch)
    assert torch.equal(copy.deepcopy(model)(batch), want)
    checks.check_checkpointing(model, batch, pictures(OTHER), bound=1e-5)
    checks.check_groups(model.eval())
    if spec is None:
        keep = torch.stack([torch.randperm(54, generator=torch.Generator().manual_seed(i)) for i in (0, 1)])
        with torch.no_grad():
            got, whole = model.forward_kept(pictures(SIZE), keep), model.forward_features(pictures(SIZE))
        assert (got - whole.gather(1, keep.unsqueeze(-1).expand(-1, -1, 48))).abs().max() < 1e-5


def test_timms_tables_stay_one_parameter_until_they_are_replaced():
    model = plain_model("tokens")
    want = model.patch_embed.position_embedding_table.clone()
    vp.get_encoding(model)
    model.patch_embed.position_embedding_table.requires_grad_(False)
    vp.set_encoding(model, "peg+factorized")
    table = model.patch_embed.position_embedding_table
    assert torch.equal(table, want)
    assert not table.requires_grad
    assert "patch_embed.position_embedding_table" in model.no_weight_decay()
    (peg, own) = sorted(vp.get_encoding(model), key=lambda each: each.name != "peg")
    assert peg.name == "peg"
    assert torch.equal(own.pos_embed_y, table[1:])
    assert torch.equal(own.pos_embed_x, table[:1])
    vp.set_encoding(model, {"name": "factorized", "feat_shape": (7, 7)})
    assert model.patch_embed.position_embedding_table.shape == (2, 7, 48)
    vp.set_encoding(model, {"name": "factorized", "feat_shape": (5, 7)})
    assert model.patch_embed.position_embedding_table is None
    vp.set_encoding(model, "learned")
    assert model.pos_embed.shape == (1, 54, 48)
    model.init_weights()
    model.set_input_size(OTHER)
    assert vp.set_encoding(model, "rope_axial")(pictures(OTHER)).isfinite().all()
    assert vp.get_encoding(model)[0].reference_shape == (9, 6)


def test_augmentation_features_and_a_place_out_of_the_tables():
    model = vp.set_encoding(plain_model("classes"), "rope_axial")
    model.coordinate_augmentation = vp.CoordinateAugmentation(rescale=2.0)
    batch, _ = ragged_batch(GRIDS, 54)
    for x in (batch, pictures(SIZE)):
        assert not torch.equal(model.train()(x), model(x))
        assert torch.equal(model.eval()(x), model(x))
    features = vp.create_model(KINDS["classes"][0], "alibi2d", features_only=True, out_indices=(0, 1), **SMALL).eval()
    assert [feature.shape for feature in features(pictures(SIZE))] == [(2, 48, 6, 9)] * 2
    plain = plain_model("tokens", position_embedding_size=8)
    vp.get_encoding(plain)
    with pytest.raises(ValueError, match=r"tables for \(8, 8\), got a grid \(6, 9\)"):
        plain(pictures(SIZE))
