"""timm's Eva as host: EVA-02, DINOv3, rope ViTs, Perception Encoder.

A converted rope is the same function as timm's, but not the same arithmetic (angles in float64, products in another
order), so outputs are compared to 2e-6 there; everything else is compared bit by bit.
"""

import copy
import inspect
import pickle

import pytest
import timm
import torch
from timm.models._manipulate import group_parameters
from timm.models.eva import Eva

import visionpos as vp
from tests.hosts import isotropic_checks as checks
from tests.hosts.isotropic_checks import ENCODINGS, OTHER, SIZE
from tests.small import in_turn, pictures


def eva(**options):
    missing = options.keys() - inspect.signature(Eva).parameters.keys()
    if missing:
        pytest.skip(f"this timm's Eva has no {', '.join(missing)}")
    return checks.build(Eva, **options)


ROPE = {"use_rot_pos_emb": True}
NO_TABLE = {**ROPE, "use_abs_pos_emb": False}
SAME_BITS = {
    "learned": {},
    "registers, not embedded": {"num_reg_tokens": 2, "no_embed_class": True},
    "no prefix tokens": {"class_token": False},
    "no position": {"use_abs_pos_emb": False},
    "no position, no prefix tokens": {"use_abs_pos_emb": False, "class_token": False},
    "separate projections": {"qkv_fused": False, "attn_type": "rope"},
}
ROPES = {
    "cat ij": (ROPE, ["learned", "rope_eva"]),
    "cat ij, reference": ({**ROPE, "ref_feat_shape": (5, 7), "qkv_fused": False}, ["learned", "rope_eva"]),
    "cat xy": ({**NO_TABLE, "rope_grid_indexing": "xy", "rope_temperature": 100.0}, ["rope_axial"]),
    "cat, shared keys": (
        {**NO_TABLE, "attn_type": "rope", "qkv_fused": False, "num_heads": 4, "num_kv_heads": 2},
        ["rope_eva"],
    ),
    "post norm": ({**ROPE, "use_post_norm": True, "scale_attn_inner": True}, ["learned", "rope_eva"]),
    "mixed xy": ({**NO_TABLE, "rope_type": "mixed", "rope_grid_indexing": "xy"}, ["rope_mixed"] * 2),
    "mixed ij": ({**NO_TABLE, "rope_type": "mixed"}, ["RotaryEmbeddingMixed"] * 2),
    "dinov3": (
        {**NO_TABLE, "rope_type": "dinov3", "rope_rotate_half": True, "num_reg_tokens": 4, "rope_temperature": 100.0},
        ["rope_dinov3"],
    ),
    "cat ij, offset": ({**NO_TABLE, "rope_grid_offset": 0.5}, ["RotaryEmbedding"]),
    "cat xy, reference": ({**NO_TABLE, "rope_grid_indexing": "xy", "ref_feat_shape": (5, 7)}, ["RotaryEmbedding"]),
    "cat xy, offset, reference": (
        {**ROPE, "rope_grid_indexing": "xy", "rope_grid_offset": 1.0, "ref_feat_shape": (5, 7)},
        ["learned", "RotaryEmbedding"],
    ),
    "dinov3 xy": (
        {**NO_TABLE, "rope_type": "dinov3", "rope_rotate_half": True, "rope_grid_indexing": "xy"},
        ["RotaryEmbedding"],
    ),
}
DYNAMIC = pytest.mark.parametrize("dynamic", [False, True], ids=["fixed", "dynamic"])


@DYNAMIC
@pytest.mark.parametrize("options", SAME_BITS.values(), ids=SAME_BITS)
def test_converting_to_what_the_host_has_changes_nothing(options, dynamic):
    plain = eva(**options, dynamic_img_size=dynamic)
    model = copy.deepcopy(plain)
    own = vp.get_encoding(model)
    vp.set_encoding(model, "learned" if own else "none")
    checks.check_same_names(model, plain)
    assert torch.equal(model(pictures()), plain(pictures()))
    checks.check_intermediates(model, plain)
    mask = torch.ones(plain.num_prefix_tokens + 96, plain.num_prefix_tokens + 96, dtype=torch.bool).tril(20)
    assert torch.equal(model(pictures(), attn_mask=mask), plain(pictures(), attn_mask=mask))


@DYNAMIC
@pytest.mark.parametrize(("options", "names"), ROPES.values(), ids=ROPES)
def test_timms_own_rope_is_the_encoding(options, names, dynamic):
    plain = eva(**options, dynamic_img_size=dynamic)
    model = copy.deepcopy(plain)
    assert [encoding.name for encoding in vp.get_encoding(model)] == names
    checks.check_same_names(model, plain)
    checks.check_intermediates(model, plain, 2e-5)  # features are about ten times as large as logits
    mask = torch.ones(plain.num_prefix_tokens + 96, plain.num_prefix_tokens + 96, dtype=torch.bool).tril(20)
    for kwargs in ({}, {"attn_mask": mask}, {"is_causal": True}):
        assert (model(pictures(), **kwargs) - plain(pictures(), **kwargs)).abs().max() < 2e-6
    assert (vp.set_encoding(copy.deepcopy(model), "none")(pictures()) - plain(pictures())).abs().max() > 1e-3
    if set(names) <= set(vp.list_encodings()):
        vp.set_encoding(model, sorted(set(names)))  # asked for by name, they stay
        checks.check_same_names(model, plain)
    for resized in (model, plain):
        resized.set_input_size(OTHER)
    assert (model(pictures(OTHER)) - plain(pictures(OTHER))).abs().max() < 2e-6


@pytest.mark.parametrize(
    ("name", "rope"),
    {
        "eva02_tiny_patch14_224": "rope_eva",
        "vit_small_patch16_rope_224": "rope_axial",
        "vit_small_patch16_rope_mixed_224": "rope_mixed",
        "vit_small_patch16_dinov3": "rope_dinov3",
        "vit_pe_core_tiny_patch16_384": "RotaryEmbedding",
    }.items(),
)
def test_models_of_timm(name, rope):
    options = {"patch_size": 4, "embed_dim": 48, "depth": 1, "num_heads": 3, "img_size": SIZE}
    plain = timm.create_model(name, **options).eval()
    model = copy.deepcopy(plain)
    assert vp.get_encoding(model)[-1].name == rope
    assert (model(pictures()) - plain(pictures())).abs().max() < 2e-6


@pytest.mark.parametrize("name", in_turn(ENCODINGS, 1))
def test_every_encoding_trains(name):
    model = vp.set_encoding(eva(**ROPE, num_reg_tokens=2), name)
    assert not [path for path, _ in model.named_parameters() if "rope" in path and path != "rope.freqs"]
    checks.check_training(model)
    assert {encoding.name for encoding in vp.get_encoding(model)} == {name}


@pytest.mark.parametrize("options", [ROPE, {**ROPE, "rope_type": "mixed"}], ids=["cat", "mixed"])
def test_a_host_that_keeps_its_own_trains(options):
    model = eva(**options)
    vp.get_encoding(model)
    checks.check_training(model)


@pytest.mark.parametrize("name", [*in_turn(ENCODINGS, 2), "none"])
def test_patch_order_matters_only_with_an_encoding(name):
    difference = checks.order_matters(vp.set_encoding(eva(**ROPE), name))
    assert difference < 1e-12 if name == "none" else difference > 1e-7


def test_none_keeps_prefix_tokens():
    model = vp.set_encoding(eva(**ROPE, num_reg_tokens=2), "none")
    assert model.forward_features(pictures()).shape == (2, 3 + 96, 48)
    assert vp.get_encoding(model) == []
    assert not [path for path, _ in model.named_parameters() if "pos_embed" in path or "freqs" in path]


def test_frequencies_live_where_timm_has_them():
    options = {**NO_TABLE, "rope_type": "mixed", "rope_grid_indexing": "xy"}
    model = eva(**options)
    freqs = model.rope.freqs
    first, second = vp.get_encoding(model)
    assert model.rope.freqs is freqs
    assert torch.equal(second.freqs, freqs[:, 1])
    vp.set_encoding(model, "rope_mixed+learned")
    assert torch.equal(model.rope.freqs, freqs)
    assert vp.get_encoding(model)[1] is first
    vp.set_encoding(model, {"name": "rope_mixed", "temperature": 50.0})
    assert not torch.equal(model.rope.freqs, freqs)
    model.load_state_dict(eva(**options).state_dict(), strict=True)
    assert torch.equal(vp.get_encoding(model)[1].freqs, freqs[:, 1])
    with torch.no_grad():
        vp.get_encoding(model)[1].reset_parameters()
    assert not torch.equal(model.rope.freqs[:, 1], freqs[:, 1])
    assert torch.equal(model.rope.freqs[:, 0], freqs[:, 0])
    assert "rope.freqs" in model.no_weight_decay()
    assert group_parameters(model, model.group_matcher(), reverse=True)["rope.freqs"] == 0
    vp.set_encoding(model, vp.create_encoding("rope_mixed", num_heads=3, head_dim=16))
    assert [n for n, _ in model.named_parameters() if "freqs" in n] == ["pos_embed_shared.0.freqs"]


@pytest.mark.parametrize("options", [{"pos_drop_rate": 0.2}, {"attn_drop_rate": 0.2}, {"patch_drop_rate": 0.2}])
def test_dropouts_are_timms(options):
    plain = eva(**options, drop_rate=0.1, proj_drop_rate=0.1, drop_path_rate=0.2)
    checks.check_dropouts(vp.set_encoding(copy.deepcopy(plain), "learned"), plain)


@pytest.mark.parametrize("spec", [None, "learned+relative_table", "rope_mixed+peg", "liere"])
def test_copies_are_independent_and_equal(spec):
    model = eva(**ROPE, rope_type="mixed", rope_grid_indexing="xy")
    vp.get_encoding(model) if spec is None else vp.set_encoding(model, spec)
    checks.check_copies(model)


@pytest.mark.parametrize("spec", [None, "learned+rope_axial", "rope_mixed+peg", "relative_table+alibi2d"])
def test_gradient_checkpointing_with_three_sizes_in_one_backward(spec):
    model = eva(**ROPE, rope_type="mixed", rope_grid_indexing="xy", dynamic_img_size=True)
    vp.get_encoding(model) if spec is None else vp.set_encoding(model, spec)
    checks.check_checkpointing(model, *map(pictures, (SIZE, OTHER, (24, 40))))


@pytest.mark.parametrize("spec", [None, "learned", "rope_axial+relative_table", "rope_mixed", "sincos2d+alibi2d"])
def test_patch_dropout_equals_the_full_model_with_dropped_tokens_masked_out(spec):
    model = eva(**ROPE, rope_grid_indexing="xy", rope_grid_offset=1.0, patch_drop_rate=0.5, num_reg_tokens=1)
    vp.get_encoding(model) if spec is None else vp.set_encoding(model, spec)
    torch.manual_seed(3)
    dropped = model.train().forward_features(pictures())
    torch.manual_seed(3)
    index = torch.argsort(torch.randn(2, 96), dim=-1)[:, :48]
    model.eval()
    full = []
    for sample in range(2):
        kept = torch.cat([torch.arange(2), 2 + index[sample]])
        seen = torch.zeros(98, dtype=torch.bool).index_fill(0, kept, True)
        features = model.forward_features(pictures()[sample : sample + 1], attn_mask=seen.expand(98, 98))
        full.append(features[0, kept])
    assert (torch.stack(full) - dropped).abs().max() < 1e-4
    assert (torch.stack(full) - model.forward_features(pictures())[:, :50]).abs().max() > 1e-2


@pytest.mark.parametrize("name", in_turn(ENCODINGS, 1))
def test_other_resolutions(name):
    """A forward pass of another size, and set_input_size, agree; shapes are not square."""
    model = vp.set_encoding(eva(dynamic_img_size=True), name)
    want = model(pictures(OTHER))
    resized = copy.deepcopy(model)
    resized.set_input_size(OTHER)
    assert (resized(pictures(OTHER)) - want).abs().max() < 2e-5
    (_, features) = model.forward_intermediates(pictures(OTHER))
    assert features[-1].shape == (2, 48, 10, 6)


def test_timms_augmentation_of_coordinates_becomes_ours():
    options = {**NO_TABLE, "rope_type": "dinov3", "rope_rotate_half": True}
    model = eva(**options, rope_rescale_coords=2.0)
    assert vp.get_encoding(model)[0].name == "rope_dinov3"
    assert model.coordinate_augmentation == vp.CoordinateAugmentation(rescale=2.0)
    x = pictures()
    assert not torch.equal(model.train()(x), model(x))
    assert torch.equal(model.eval()(x), model(x))
    kept = eva(**NO_TABLE, rope_shift_coords=0.5)  # in another unit than ours: timm's own module does it
    assert vp.get_encoding(kept)[0].name == "RotaryEmbedding"
    assert not torch.equal(kept.train()(x), kept(x))
    assert torch.equal(kept.eval()(x), kept(x))
    with pytest.raises(ValueError, match="a mixed rope with rope_shift_coords.* cannot be converted"):
        vp.set_encoding(eva(**ROPE, rope_type="mixed", rope_jitter_coords=1.1), "none")


@pytest.mark.parametrize("spec", ["rope_dinov3", "sincos2d+rope_axial", "alibi2d"])
def test_a_layer_called_alone_asks_for_the_positions_that_all_layers_share(spec):
    model, tokens = vp.set_encoding(eva(), spec), torch.randn(2, 97, 48)
    for each in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        for call in (each.blocks[1], each.blocks[1].attn):
            with pytest.raises(RuntimeError, match="this attention layer needs positions"):
                call(tokens)
        vp.set_encoding(each, "sincos2d")  # which is in the tokens by then
        assert each.blocks[1](tokens).shape == tokens.shape


def test_a_layer_called_alone_asks_for_positions():
    model = vp.set_encoding(eva(), "relative_table+peg")
    tokens = torch.randn(2, 97, 48)
    with pytest.raises(RuntimeError, match="this attention layer needs positions"):
        model.blocks[0].attn(tokens)
    model = vp.set_encoding(eva(), "peg")
    with pytest.raises(RuntimeError, match="this block needs positions"):
        model.blocks[0](tokens)
