"""timm's NaFlexViT as host: pictures, and batches of patches whose grids differ."""

import copy

import pytest
import timm
import torch
from timm.models import create_feature_extractor
from timm.models.vision_transformer import Block

import visionpos as vp
from tests.hosts import isotropic_checks as checks
from tests.hosts.isotropic_checks import ENCODINGS, OTHER, SIZE
from tests.hosts.ragged_batches import distance, double, ragged_batch
from tests.small import VIT, in_turn, needs_newer_timm, pictures, randomised

pytestmark = needs_newer_timm

GRIDS = [(5, 7), (3, 9), (8, 4), (5, 7), (2, 2)]
SMALL = {**{key: value for key, value in VIT.items() if key != "img_size"}, "pos_embed_grid_size": (5, 7)}
GAP = "naflexvit_base_patch16_gap"
SQUARE = {"pos_embed_grid_size": (6, 6)}
ROPES = {"rope_type": "axial", "pos_embed": "none"}
KINDS = {  # a model, options, and what it has
    "learned": (GAP, {}, ["learned2d"]),
    "learned, attention pooling": ("naflexvit_base_patch16_map", {}, ["learned2d"]),
    "learned, aspect kept": ("naflexvit_base_patch16_par_gap", {}, ["learned2d"]),
    "learned, bilinear": ("naflexvit_base_patch16_siglip", {}, ["learned2d"]),
    "learned, corners": ("naflexvit_base_patch16_radio_v3", SQUARE, ["learned2d"]),
    "learned, bilinear, no antialias": ("naflexvit_large_patch16_radio_v3", {}, ["learned2d"]),
    "learned, sampled": (
        "naflexvit_large_patch16_radio_v3",
        {"pos_embed_use_grid_sample": True, **SQUARE},
        ["learned2d"],
    ),
    "factorized": (GAP, {"pos_embed": "factorized"}, ["factorized"]),
    "factorized, aspect kept": ("naflexvit_base_patch16_parfac_gap", {}, ["factorized"]),
    "factorized, sampled": (GAP, {"pos_embed": "factorized", "pos_embed_use_grid_sample": True}, ["factorized"]),
    "axial": (GAP, ROPES, ["rope_eva"]),
    "axial, of a grid": (GAP, {**ROPES, "rope_ref_feat_shape": (6, 6), "rope_rotate_half": True}, ["rope_eva"]),
    "axial, a class token": (GAP, {**ROPES, "rope_grid_indexing": "xy", "class_token": True}, ["rope_axial"]),
    "mixed": (GAP, {"rope_type": "mixed"}, ["learned2d", "RotaryEmbeddingMixed", "RotaryEmbeddingMixed"]),
    "mixed, xy": (GAP, {"rope_type": "mixed", "rope_grid_indexing": "xy"}, ["learned2d", "rope_mixed", "rope_mixed"]),
    "dinov3": (GAP, {"rope_type": "dinov3", "rope_rotate_half": True}, ["learned2d", "rope_dinov3"]),
    "mrope": (GAP, {"rope_type": "mrope", "rope_mrope_section": (2, 3, 3)}, ["learned2d", "RotaryEmbedding"]),
    "shared keys": (GAP, {**ROPES, "num_kv_heads": 1, "qkv_fused": False}, ["rope_eva"]),
    "no positions": (GAP, {"pos_embed": "none", "use_key_only_attn_mask": True}, []),
    "differential": (GAP, {"attn_layer": "diff"}, ["learned2d"]),
}
EXACT = [  # on its own grid a table is read as it is, but where timm stretches or samples it there as well
    kind
    for kind in KINDS
    if kind.startswith(("learned", "factorized", "no pos", "differential"))
    and kind not in ("learned, sampled", "learned, corners", "factorized, aspect kept", "factorized, sampled")
]


def plain_model(kind="learned", **more):
    name, options, _ = KINDS[kind]
    torch.manual_seed(0)
    return randomised(timm.create_model(name, **{**SMALL, **options, **more}))


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_converting_to_what_the_host_has_changes_nothing_but_rounding(kind):
    plain = plain_model(kind)
    model, native = copy.deepcopy(plain), KINDS[kind][2]
    assert checks.names_of(model) == native
    checks.check_same_names(model, plain)
    batch, singles = ragged_batch(GRIDS, 40)
    for x in (batch, *singles):
        assert (model(x) - plain(x)).abs().max() < 1e-6
    if kind in EXACT:
        assert torch.equal(model(singles[0]), plain(singles[0]))
        own, _ = ragged_batch([(5, 7)] * 2, 40)
        assert torch.equal(model(own), plain(own))
    exact = copy.deepcopy(model).double()(double(batch)) - copy.deepcopy(plain).double()(double(batch))
    assert exact.abs().max() < 2e-6  # timm's tables and ropes are float32
    if native:
        assert (vp.set_encoding(model, "none")(batch) - plain(batch)).abs().max() > 1e-3
        assert not [key for key in model.state_dict() if "pos_embed" in key]


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_a_batch_of_grids_is_its_pictures_one_at_a_time(kind):
    model = plain_model(kind)
    vp.get_encoding(model)
    assert distance(model, *ragged_batch(GRIDS, 40)) < 1e-6


@pytest.mark.parametrize("name", [*in_turn(ENCODINGS, 0), "none"])
@torch.no_grad()
def test_so_it_is_with_every_encoding_and_in_any_order(name):
    model = randomised(vp.set_encoding(plain_model(class_token=True), name), seed=2).double()
    batch, singles = ragged_batch(GRIDS, 40)
    singles = [picture.double() for picture in singles]
    assert distance(model, double(batch), singles) < 1e-10
    draw = torch.Generator().manual_seed(3)
    shuffled, _ = ragged_batch(GRIDS, 40, order=lambda count: torch.randperm(count, generator=draw))
    if name != "sinusoidal":
        assert distance(model, double(shuffled), singles) < 1e-10
    moved = {**batch, "patch_coord": batch["patch_coord"].flip(1)}  # valid patches have other places
    moved["patch_coord"][~batch["patch_valid"]] = 0
    difference = (model(double(moved)) - model(double(batch))).abs().max()
    assert difference < 1e-12 if name == "none" else difference > 1e-7


@torch.no_grad()
def test_packed_sizes_and_patches_that_are_left_out():
    """Without padding, without `patch_valid`, with padding in the middle, and with a part of a picture's patches."""
    model = vp.set_encoding(plain_model(), "learned2d+rope_axial+alibi2d")
    batch, singles = ragged_batch([(4, 6), (8, 3), (2, 12)], 24)
    coord, patches = batch["patch_coord"], batch["patches"]
    want = torch.cat([model(picture) for picture in singles])
    assert (model(batch) - want).abs().max() < 1e-6
    whole = torch.ones_like(batch["patch_valid"])
    assert (model(patches, coord, whole) - want).abs().max() < 1e-6
    features = model.forward_features(patches, coord)
    assert features["patch_valid"] is None
    assert (features["patches"][0] - model.forward_features(singles[0])[0]).abs().max() < 1e-5
    holes = {name: torch.cat([part[:, :5], part[:, :3], part[:, 5:]], dim=1) for name, part in batch.items()}
    holes["patch_valid"][:, 5:8] = False
    assert (model(holes) - want).abs().max() < 1e-6
    keep = torch.tensor([[0, 5, 7, 23]])
    part = {name: part[:1].index_select(1, keep[0]) for name, part in batch.items()}
    kept = model.forward_kept(singles[0], keep)
    assert (model.forward_features(**part)["patches"] - kept).abs().max() < 1e-5


@torch.no_grad()
def test_a_picture_that_is_all_padding_and_an_empty_batch():
    model = vp.set_encoding(plain_model(), "learned2d+rope_axial")
    batch, _ = ragged_batch(GRIDS, 40)
    want = model(batch)
    batch["patch_valid"][1] = False
    assert (model(batch) - want).abs().amax(dim=1).gt(1e-6).tolist() == [False, True, False, False, False]
    assert model({name: part[:0] for name, part in batch.items()}).shape == (0, 5)


@pytest.mark.parametrize("spec", [None, "learned2d+rope_axial+alibi2d"])
@torch.no_grad()
def test_a_mask_of_the_callers(spec):
    """In place of that of the padding, boolean or additive: what it hides is as good as not there."""
    model = plain_model(class_token=True)  # two kinds of prefix tokens
    vp.get_encoding(model) if spec is None else vp.set_encoding(model, spec)
    batch, _ = ragged_batch([(5, 7), (3, 9)], 40)
    prefix = model.num_prefix_tokens
    part = {name: part.clone() for name, part in batch.items()}
    part["patch_valid"][0, 30:] = False  # of a grid of 4.3 rows
    seen = torch.cat([torch.ones(2, prefix, dtype=torch.bool), part["patch_valid"]], dim=1)
    wide = seen[:, None, None, :].expand(-1, 1, prefix + 40, -1)
    got = model.forward_features(**batch, attn_mask=wide)["patches"]
    additive = torch.zeros(wide.shape).masked_fill(~wide, -torch.inf)
    assert torch.equal(got, model.forward_features(**batch, attn_mask=additive)["patches"])
    tall = model.forward_features(**batch, attn_mask=wide[:, :, :1])["patches"]
    assert (got - tall).abs().max() < 1e-6
    assert (got - model.forward_features(**batch)["patches"])[0, :prefix].abs().max() > 1e-4
    assert (got - model.forward_features(**batch)["patches"])[1, :prefix].abs().max() < 1e-6


@pytest.mark.parametrize("kind", ["learned", "dinov3", "axial, a class token"])  # timm's mixed one never stops early
def test_intermediates_are_timms(kind):
    plain = plain_model(kind)
    model = copy.deepcopy(plain)
    vp.get_encoding(model)
    checks.check_intermediates(model, plain, 1e-5)
    batch, _ = ragged_batch(GRIDS, 40)
    valid = batch["patch_valid"]
    for options in ({"output_fmt": "NLC"}, {"output_fmt": "NLC", "indices": [0], "stop_early": True, "norm": True}):
        for dictionary in (False, True):
            got, want = (m.forward_intermediates(batch, output_dict=dictionary, **options) for m in (model, plain))
            if dictionary:
                assert got.keys() == want.keys()
                assert torch.equal(got["patch_valid"], want["patch_valid"])
                got, want = ([each["image_features"], each["image_intermediates"]] for each in (got, want))
            assert all((a - b)[valid].abs().max() < 1e-5 for a, b in zip(got[1], want[1], strict=True))
            prefix = plain.num_prefix_tokens
            assert (got[0] - want[0])[:, prefix:][valid].abs().max() < 1e-5
    with pytest.raises(ValueError, match="output_fmt must be 'NLC', or 'NCHW' of pictures"):
        model.forward_intermediates(batch)


@pytest.mark.parametrize("spec", [None, "learned+rope_mixed+relative_table+peg", "factorized+alibi2d+lepe"])
def test_training_checkpointing_and_copies(spec):
    model = plain_model()
    vp.get_encoding(model) if spec is None else vp.set_encoding(model, spec)
    checks.check_copies(model)
    checks.check_training(model)
    batch, _ = ragged_batch(GRIDS, 40)
    checks.check_checkpointing(model, batch, pictures(OTHER))


@pytest.mark.parametrize("kind", ["learned", "factorized"])
def test_dropouts_are_timms(kind):
    rates = {"pos_drop_rate": 0.2, "patch_drop_rate": 0.4, "proj_drop_rate": 0.1, "drop_path_rate": 0.1}
    plain = plain_model(kind, **rates)
    model = copy.deepcopy(plain)
    vp.get_encoding(model)
    batch, _ = ragged_batch([(5, 7)] * 3, 40)
    for x in (batch, pictures((20, 28))):
        results = []
        for trained in (model.train(), plain.train()):
            torch.manual_seed(2)
            results.append(trained(x))
        assert torch.equal(*results)


def test_dropped_patches_keep_their_places():
    model = vp.set_encoding(plain_model(patch_drop_rate=0.5), "learned2d+rope_axial+alibi2d").train()
    batch, _ = ragged_batch(GRIDS, 40)
    torch.manual_seed(2)
    dropped = model.forward_features(**batch)
    torch.manual_seed(2)
    _, keep = model.patch_drop(torch.zeros(len(GRIDS), model.num_prefix_tokens + 40, 1))
    part = {name: part[torch.arange(len(part))[:, None], keep] for name, part in batch.items()}
    assert torch.equal(part["patch_valid"], dropped["patch_valid"])
    for index, (height, width) in enumerate(GRIDS[:4]):  # the last row or column may be gone; the grid is not
        left = part["patch_valid"][index].nonzero()[:, 0]
        flat = part["patch_coord"][index, left] @ torch.tensor([width, 1])
        _, singles = ragged_batch(GRIDS, 40)
        want = model.eval().forward_kept(singles[index], flat[None])[:, model.num_prefix_tokens :]
        got = dropped["patches"][index, model.num_prefix_tokens + left]
        assert (got - want[0]).abs().max() < 1e-5, (height, width)


def test_augmented_coordinates():
    """timm's own random shift is taken over; a draw serves the input and the blocks, and evaluation has none."""
    options = {"rope_type": "dinov3", "rope_rotate_half": True, "rope_rescale_coords": 2.0, "pos_embed": "none"}
    model = plain_model(**options)
    assert checks.names_of(model) == ["rope_dinov3"]
    assert model.coordinate_augmentation == vp.CoordinateAugmentation(rescale=2.0)
    batch, _ = ragged_batch(GRIDS, 40)
    for x in (batch, pictures()):
        assert not torch.equal(model.train()(x), model(x))
        assert torch.equal(model.eval()(x), model(x))
    vp.set_encoding(model, "sincos2d")
    model.coordinate_augmentation = vp.CoordinateAugmentation(shift=0.5)
    torch.manual_seed(0)
    want = model.train()(batch)
    torch.manual_seed(0)
    assert torch.equal(model(batch), want)


@torch.no_grad()
def test_what_timm_makes_of_other_families():
    """`use_naflex=True` gives the same function of pictures of the model's size, and takes batches as well."""
    options = {**VIT, "img_size": SIZE}
    for name, native in (("vit_tiny_patch16_224", "learned2d"), ("vit_small_patch16_rope_mixed_224", "rope_mixed")):
        torch.manual_seed(0)
        plain = randomised(timm.create_model(name, use_naflex=True, **options))
        model = vp.create_model(name, native, use_naflex=True, **options).eval()
        model.load_state_dict(plain.state_dict())
        assert isinstance(model, timm.models.naflexvit.NaFlexVit)
        assert set(checks.names_of(model)) == {native}
        assert (model(pictures()) - plain(pictures())).abs().max() < 1e-6
        assert distance(model, *ragged_batch(GRIDS, 40)) < 1e-6


def test_saved_and_loaded(tmp_path):
    for spec in (None, "factorized+rope_axial+relative_table"):
        model = vp.create_model(GAP, spec or "learned2d", **SMALL).eval()
        timm.models.save_for_hf(model, tmp_path / str(spec))
        loaded = timm.create_model(f"local-dir:{tmp_path / str(spec)}", pretrained=True).eval()
        batch, _ = ragged_batch(GRIDS, 40)
        assert torch.equal(loaded(batch), model(batch))
        assert checks.names_of(loaded) == checks.names_of(model)


def test_another_size_of_its_own():
    model = vp.set_encoding(plain_model(), "learned+learned2d")
    model.set_input_size((24, 40))
    assert model.pos_embed.shape == (1, 60, 48)
    assert model.embeds.pos_embed.shape == (1, 5, 7, 48)
    assert vp.set_encoding(model, "rope_axial")(pictures((24, 40))).isfinite().all()
    assert vp.get_encoding(model)[0].reference_shape == (6, 10)


SAMPLED = {"pos_embed_use_grid_sample": True, "pos_embed_interp_mode": "bilinear", "pos_embed_antialias": False}


class OtherBlock(Block):
    """A block of one's own, which may do with positions what it likes."""


def test_what_cannot_act_is_one_line_and_changes_nothing():
    for options, message in (
        (
            {"pos_embed_align_corners": True, "pos_embed_antialias": False},
            "converted: give a square table",
        ),
        ({"pos_embed_use_grid_sample": True}, "pos_embed_use_grid_sample=True cannot be converted"),
        ({**SAMPLED, "pos_embed_ar_preserving": True}, "pos_embed_use_grid_sample=True cannot be converted"),
        ({"rope_type": "mixed", "rope_shift_coords": 0.5}, "set model.coordinate_augmentation"),
        ({"block_fn": OtherBlock}, "blocks.0 is a OtherBlock with Attention; only timm's"),
    ):
        model = plain_model(**options)
        want, (batch, _) = model(pictures((20, 28))), ragged_batch(GRIDS, 40)
        with pytest.raises(ValueError, match=message):
            vp.set_encoding(model, "rope_axial")
        assert type(model) is timm.models.naflexvit.NaFlexVit
        assert torch.equal(model(pictures((20, 28))), want)
        assert model(batch).isfinite().all()
    with pytest.raises(ValueError, match="NaFlexEmbeds"):
        vp.MaskedAutoencoder(vp.set_encoding(plain_model(), "rope_axial"), 32, 1, 2)


@pytest.mark.unhooked
@torch.no_grad()
def test_a_graph_of_torch_fx_is_of_pictures_and_refuses_patches():
    model = vp.set_encoding(plain_model("mixed"), "learned+alibi2d").eval()
    graph = create_feature_extractor(model, ["head"])
    for size in (SIZE, OTHER):
        assert torch.equal(graph(pictures(size))["head"], model(pictures(size)))
    batch, _ = ragged_batch(GRIDS, 40)
    with pytest.raises(ValueError, match="is of pictures, without patch_coord; give patches to the model itself"):
        graph(batch["patches"], batch["patch_coord"], batch["patch_valid"])
