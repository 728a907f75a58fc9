"""The vision towers of Qwen3-VL and DeepSeek-V4 as hosts: alone, with their projectors, and inside classifiers."""

import copy

import pytest
import timm
import torch
from timm.layers import create_feature_extractor
from timm.models._manipulate import group_parameters

import visionpos as vp
from tests.hosts import isotropic_checks as checks
from tests.hosts.isotropic_checks import OTHER, SIZE
from tests.small import VIT, pictures, randomised

pytest.importorskip("timm.models.qwen3_vit", reason="this timm is older than these models")
SMALL = {key: value for key, value in VIT.items() if key != "num_classes"}
QWEN, DEEPSEEK = {**SMALL, "pos_embed_grid_size": 5}, SMALL
NATIVE = {"qwen3_vit": ["learned2d", "rope_axial"], "deepseek_vit": ["rope_axial"]}
KINDS = {
    "Qwen, classes": ("qwen3_vit_88m", QWEN),
    "Qwen, classes of merged tokens": ("qwen3_vit_88m_merge", {**QWEN, "out_features": 20}),
    "Qwen, projected": ("qwen3_vit_88m_enc", {**QWEN, "out_features": 20}),
    "Qwen, tokens": ("qwen3_vit_88m_enc", {**QWEN, "global_pool": "", "out_features": 0}),
    "Qwen, a table of the grid's side": ("qwen3_vit_88m", {**SMALL, "img_size": 32, "pos_embed_grid_size": 8}),
    "DeepSeek, classes": ("deepseek_vit_412m", DEEPSEEK),
    "DeepSeek, classes of aligned tokens": ("deepseek_vit_412m_align", {**DEEPSEEK, "out_features": 20}),
    "DeepSeek, projected": ("deepseek_vit_412m_enc", {**DEEPSEEK, "out_features": 20}),
    "DeepSeek, tokens": ("deepseek_vit_412m_enc", {**DEEPSEEK, "global_pool": "", "out_features": 20}),
}
CLASSIFIERS = [kind for kind in KINDS if "classes" in kind]
ENCODERS = ["Qwen, tokens", "DeepSeek, tokens"]


def plain_model(kind):
    name, options = KINDS[kind]
    torch.manual_seed(0)
    return randomised(timm.create_model(name, **options, **({"num_classes": 5} if "classes" in kind else {})))


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_converting_to_what_the_host_has_changes_nothing_but_rounding(kind):
    plain = plain_model(kind)
    model, native = copy.deepcopy(plain), NATIVE[KINDS[kind][0][: KINDS[kind][0].index("_vit") + 4]]
    assert checks.names_of(model) == native
    for _ in range(2):
        checks.check_same_names(model, plain)
        for size in (SIZE, OTHER, (4 * 8, 4 * 8)):
            x = pictures(size)
            assert (model(x) - plain(x)).abs().max() < 2e-5
            twice = copy.deepcopy(model).double()(x.double()) - copy.deepcopy(plain).double()(x.double())
            assert twice.abs().max() < 2e-6  # timm's rope, and DeepSeek's norms, are float32
        vp.set_encoding(model, "+".join(native))
    assert (vp.set_encoding(model, "none")(pictures()) - plain(pictures())).abs().max() > 1e-3
    assert not [key for key in model.state_dict() if "pos_embed" in key]


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_intermediates_are_timms(kind):
    plain = plain_model(kind)
    model = copy.deepcopy(plain)
    vp.get_encoding(model)
    checks.check_intermediates(model, plain, 1e-5)
    got, want = (m.forward_intermediates(pictures(), output_dict=True) for m in (model, plain))
    assert got.keys() == want.keys()
    assert (got["image_features"] - want["image_features"]).abs().max() < 1e-5


@pytest.mark.parametrize("spec", [None, "sincos2d+rope_mixed+alibi2d+peg", "learned+learned2d+relative_table"])
@pytest.mark.parametrize("kind", [*CLASSIFIERS, *ENCODERS])
def test_it_trains_and_every_parameter_has_its_group(kind, spec):
    model = plain_model(kind)
    vp.get_encoding(model) if spec is None else vp.set_encoding(model, spec)
    model.train()(pictures()).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    if kind in ENCODERS:
        checks.check_groups(model)
    else:
        groups = group_parameters(model, model.group_matcher(), reverse=True)
        assert {groups[name] for name, _ in model.named_parameters() if "encoder.pos_embed" in name} <= {0}


@pytest.mark.parametrize("spec", [None, "learned+rope_mixed+alibi2d"])
@pytest.mark.parametrize("kind", ENCODERS)
def test_copies_and_checkpointing(kind, spec):
    model = plain_model(kind)
    vp.get_encoding(model) if spec is None else vp.set_encoding(model, spec)
    checks.check_copies(model)
    checks.check_checkpointing(model, pictures(SIZE), pictures(OTHER))


@pytest.mark.parametrize("name", ["rope_axial", "relative_table", "learned2d"])
@pytest.mark.parametrize("kind", ENCODERS)
def test_kept_patches_and_a_masked_autoencoder(kind, name):
    model = vp.set_encoding(plain_model(kind), name)
    keep = torch.stack([torch.randperm(96, generator=torch.Generator().manual_seed(i)) for i in (0, 1)])
    with torch.no_grad():
        got = model.forward_kept(pictures(), keep)  # all of them, in another order
        want = model.forward_features(pictures()).flatten(1, 2)
    assert (got - want.gather(1, keep.unsqueeze(-1).expand(-1, -1, 48))).abs().max() < 1e-5
    mae = vp.MaskedAutoencoder(model, 32, 1, 2).train()
    mae(pictures(), generator=torch.Generator().manual_seed(0)).loss.backward()
    assert all(p.grad is not None and p.grad.any() for n, p in mae.named_parameters() if "pos_embed" in n)


def test_qwens_table_keeps_its_name_layout_values_and_whether_it_is_trained():
    model = plain_model("Qwen, tokens")
    want = model.pos_embed.clone()
    vp.get_encoding(model)
    model.pos_embed.requires_grad_(False)
    vp.set_encoding(model, "peg+learned2d")
    assert torch.equal(model.pos_embed, want)
    assert not model.pos_embed.requires_grad
    assert "pos_embed" in model.no_weight_decay()
    vp.set_encoding(model, "none")
    model.init_weights()
    vp.set_encoding(model, {"name": "learned2d", "grid_size": (3, 4)})
    assert model.pos_embed.shape == (1, 12, 48)
    vp.set_encoding(model, "learned")
    assert model.pos_embed.shape == (1, 96, 48)
    model.set_input_size(OTHER)
    assert model.pos_embed.shape == (1, 60, 48)
    assert model(pictures(OTHER)).isfinite().all()


@pytest.mark.parametrize("kind", CLASSIFIERS)
def test_a_classifier_hands_the_augmentation_of_coordinates_to_its_encoder(kind):
    model = vp.set_encoding(plain_model(kind), "rope_axial+learned2d")
    model.coordinate_augmentation = vp.CoordinateAugmentation(rescale=2.0)
    assert model.coordinate_augmentation is model.encoder.coordinate_augmentation is not None
    assert not torch.equal(model.train()(pictures()), model(pictures()))
    assert torch.equal(model.eval()(pictures()), model(pictures()))


@pytest.mark.slow
@pytest.mark.unhooked
@pytest.mark.parametrize("spec", [None, "learned+rope_axial+relative_table"])
@pytest.mark.parametrize("kind", ["Qwen, classes", "DeepSeek, classes"])
def test_graphs(kind, spec):
    model = plain_model(kind)
    vp.get_encoding(model) if spec is None else vp.set_encoding(model, spec)
    (want,) = model.forward_intermediates(pictures(), indices=[1], output_fmt="NLC", intermediates_only=True)
    extractor = create_feature_extractor(model, ["encoder.blocks.1"])
    assert torch.equal(extractor(pictures())["encoder.blocks.1"], want)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert (compiled(pictures()) - model(pictures())).abs().max() < 1e-5


@pytest.mark.parametrize("kind", ["Qwen, classes", "DeepSeek, classes"])
def test_features_and_models_of_timm(kind):
    name, options = KINDS[kind]
    features = vp.create_model(name, "alibi2d", features_only=True, out_indices=(0, 1), **options).eval()
    assert [feature.shape for feature in features(pictures())] == [(2, 48, 8, 12)] * 2
    model = vp.create_model(name, "rope_axial", num_classes=5, **options)
    assert checks.names_of(model) == ["rope_axial"]
    assert model(pictures()).shape == (2, 5)


def test_what_is_no_block_of_timms_is_one_line():
    model = plain_model("DeepSeek, classes")
    model.encoder.blocks[1].attn = torch.nn.Identity()
    with pytest.raises(ValueError, match="only timm's DeepseekVitBlock with AttentionRope takes encodings"):
        vp.set_encoding(model, "none")
    assert type(model).__module__.startswith("timm.")
