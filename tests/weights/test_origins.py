"""Checkpoints that other libraries saved, and what these compute with them; `make_fixtures.py` made both."""

import copy
import json
import shutil

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

import visionpos as vp
from tests.small import randomised
from tests.weights.make_fixtures import FOLDER, images
from tests.weights.test_refused import refused

VIT = {"embed_dim": 16, "depth": 2, "num_heads": 2, "mlp_ratio": 2}
SWIN = {"embed_dim": 8, "depths": (1, 2), "num_heads": (2, 4), "mlp_ratio": 2}
HIERA = {"embed_dim": 4, "stages": (1, 2, 1, 1), "num_heads": 1, "mlp_ratio": 2}
CASES = {  # fixture -> timm's name, and what it is told besides the checkpoint
    "hf_vit": ("vit_tiny_patch16_224", VIT),
    "hf_deit": ("deit_tiny_distilled_patch16_224", VIT),
    "hf_dinov2": ("vit_small_patch14_dinov2", VIT),
    "hf_dinov2_registers": ("vit_small_patch14_reg4_dinov2", VIT),
    "hf_dinov2_giant": ("vit_giant_patch14_dinov2", {**VIT, "mlp_ratio": 3}),
    "hf_dinov3": ("vit_small_patch16_dinov3_qkvb", VIT),
    "hf_dinov3_gated": ("vit_small_plus_patch16_dinov3_qkvb", VIT),
    "hf_swin": ("swin_tiny_patch4_window7_224", SWIN),
    "hf_swinv2": ("swinv2_tiny_window8_256", SWIN),
    "hf_beit": ("beit_base_patch16_224", VIT),
    "hf_siglip": ("vit_base_patch16_siglip_224", VIT),
    "hf_ijepa": ("vit_huge_patch14_gap_224", VIT),
    "hf_hiera": ("hiera_tiny_224", HIERA),
    "torchvision_vit": ("vit_tiny_patch16_224", VIT),
    "torchvision_swin": ("swin_tiny_patch4_window7_224", {**SWIN, "img_size": (32, 64)}),  # the file has no size
    "torchvision_swin_v2": ("swinv2_tiny_window8_256", {**SWIN, "img_size": (32, 64), "window_size": 2}),
    "flax_vit": ("vit_tiny_patch16_224", {**VIT, "mlp_ratio": 4}),
}


def path(name):
    return FOLDER / name / "model.npz" if name == "flax_vit" else FOLDER / name


def output(model, name):
    expected = load_file(FOLDER / name / "expected.safetensors")
    x = images(expected["size"].tolist())
    model = model.eval().double()
    return (model.forward_features(x) if expected["output"].ndim == 3 else model(x)), expected["output"]


def build(name, **options):
    host, own = CASES[name]
    return vp.create_model(host, weights=path(name), **{**own, **options})


@pytest.mark.parametrize("name", CASES)
def test_a_model_of_a_checkpoint_computes_what_its_library_computes(name):
    """In float64, where a lost or a misplaced tensor shows and rounding does not."""
    model = build(name)
    ours, theirs = output(model, name)
    assert theirs.std() > 0.01
    assert (ours - theirs).abs().max() < 1e-6
    tensors = load_file(path(name) / "model.safetensors") if name != "flax_vit" else None
    if tensors:  # into a model that is there, from a file and from a state dict
        for weights in (path(name) / "model.safetensors", tensors):
            other = randomised(copy.deepcopy(model))
            assert vp.load_weights(other, weights).missing_keys == []
            assert torch.equal(output(other, name)[0], output(model, name)[0])


IN_MEMORY = sorted(file.parent.name for file in FOLDER.glob("*/state_dict.safetensors"))


@pytest.mark.parametrize("name", [name for name in IN_MEMORY if name != "hf_mae"])
def test_names_in_memory_are_those_of_the_file(name):
    host, own = CASES[name]
    config = json.loads((path(name) / "config.json").read_text())
    weights = load_file(path(name) / "state_dict.safetensors")  # without a configuration that tells the size
    model = vp.create_model(host, weights=weights, **{**own, "img_size": config["image_size"]})
    expected = build(name).state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in model.state_dict().items())


def test_dinov3_without_biases():
    """The distilled models have zeros, and timm has models without; others than zeros have no place there."""
    tensors = load_file(path("hf_dinov3") / "model.safetensors")
    zeros = {
        key: value * 0 if "q_proj.bias" in key or "v_proj.bias" in key else value for key, value in tensors.items()
    }
    model, same = (
        vp.create_model(name, weights=zeros, img_size=32, **VIT).eval()
        for name in ("vit_small_patch16_dinov3", "vit_small_patch16_dinov3_qkvb")
    )
    x = images((32, 48)).float()
    assert (model.forward_features(x) - same.forward_features(x)).abs().max() < 1e-5
    with pytest.raises(ValueError, match=r"of Hugging Face.*unknown to the model: blocks\.0\.attn"):
        vp.create_model("vit_small_patch16_dinov3", weights=tensors, img_size=32, **VIT)


@pytest.mark.parametrize("name", ["hf_vit", "torchvision_vit", "hf_dinov2_registers", "flax_vit"])
def test_only_the_encoding_is_new(name, caplog):
    model = build(name, encoding="rope_mixed+alibi2d")
    assert "new in this encoding: blocks.0.attn.encodings.0.freqs" in caplog.text
    assert "positions left out: pos_embed" in caplog.text
    kept = build(name)
    with torch.no_grad():
        for encoding in vp.get_encoding(model):
            if encoding.name == "rope_mixed":
                encoding.freqs.zero_()
    vp.set_encoding(model, "rope_mixed")
    vp.set_encoding(kept, "none")
    assert torch.allclose(output(model, name)[0], output(kept, name)[0], atol=1e-12)


@pytest.mark.parametrize(("name", "classes"), [("hf_swin", 5), ("torchvision_vit", 5), ("hf_dinov2", 0)])
def test_what_is_asked_for_goes_before_the_checkpoint(name, classes, caplog):
    assert build(name).num_classes == classes
    assert "the head for" not in caplog.text
    other = build(name, num_classes=3)
    assert other.num_classes == 3
    assert "the head for 3 classes is new" in caplog.text
    assert build(name, num_classes=0).num_classes == 0
    size = (48, 64) if name == "hf_swin" else (40, 64)
    larger = build(name, img_size=size)
    assert larger.eval()(torch.zeros(1, 3, *size)).shape[0] == 1
    if "pos_embed" in larger.state_dict():
        source = build(name)
        table = vp.resize_position_table(source.pos_embed, (5, 8), source.patch_embed.grid_size, 1)
        assert torch.equal(larger.pos_embed, table)


@pytest.mark.parametrize("name", ["hf_beit", "hf_dinov2", "hf_dinov2_registers", "torchvision_vit"])
def test_a_square_grid_is_read_off_the_tables(name):
    """Of a state dict, without a configuration beside it."""
    host, own = CASES[name]
    model = vp.create_model(host, weights=load_file(path(name) / "model.safetensors"), **own)
    assert tuple(model.patch_embed.img_size) == (32, 32)
    ours, theirs = output(model, name)
    assert (ours - theirs).abs().max() < 1e-6


def test_a_square_window_is_read_off_the_tables():
    host, own = CASES["hf_swin"]
    weights = load_file(path("hf_swin") / "model.safetensors")
    model = vp.create_model(host, weights=weights, img_size=(32, 64), **own)
    assert vp.get_encoding(model)[0].feat_shape == (2, 2)


def test_a_checkpoint_in_pieces(tmp_path):
    tensors = load_file(path("hf_vit") / "model.safetensors")
    shutil.copy(path("hf_vit") / "config.json", tmp_path)
    files = {key: f"model-0000{1 + index % 2}-of-00002.safetensors" for index, key in enumerate(tensors)}
    for file in set(files.values()):
        save_file({key: value for key, value in tensors.items() if files[key] == file}, tmp_path / file)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    model = vp.create_model("vit_tiny_patch16_224", weights=str(tmp_path), **VIT)
    ours, theirs = output(model, "hf_vit")
    assert (ours - theirs).abs().max() < 1e-6


@pytest.mark.parametrize("name", CASES)
def test_half_a_file_and_another_family_are_one_line(name):
    weights = vp.weights.read.read_weights(path(name))
    half = dict(list(weights.items())[: len(weights) // 2])
    model = build(name)
    origin = {"hf": "Hugging Face", "torchvision": "torchvision", "flax": "JAX"}[name.split("_")[0]]
    refused(model, half, f"of {origin}.*(missing in the weights|part of a layer)")
    family = "swin_tiny_patch4_window7_224" if "swin" not in name else "vit_tiny_patch16_224"
    other = timm.create_model(family, img_size=(32, 64), num_classes=5, **(SWIN if "swin" not in name else VIT))
    refused(other, weights, f"of {origin}")
    with pytest.raises(ValueError, match=f"of {origin}") as error:
        build(name, embed_dim=24, **({} if "hiera" in name or "swin" in name else {"num_heads": 3}))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("file", ["", "state_dict.safetensors"], ids=["directory", "in memory"])
def test_masked_autoencoder_of_hugging_face(file):
    expected = load_file(FOLDER / "hf_mae" / "expected.safetensors")
    options = {**VIT, "img_size": 32, "patch_size": 8, "num_classes": 0}
    encoder = vp.create_model("vit_tiny_patch16_224", encoding="sincos2d", **options)
    mae = vp.MaskedAutoencoder(encoder, decoder_dim=8, decoder_depth=1, decoder_num_heads=2)
    mae.decoder.blocks[0].mlp.__init__(8, 16, 8)  # the paper's ratio is 4
    mae.load_original_state_dict(FOLDER / "hf_mae" / file)
    order = expected["noise"].argsort(dim=1)
    keep, restore = order[:, :4], order.argsort(dim=1)
    mask = type(mae.draw_mask(images((32, 32))))(keep, restore, expected["hidden"].bool())
    result = mae.double()(images((32, 32)), mask)
    assert (result.prediction - expected["output"]).abs().max() < 1e-6
    assert (result.loss - expected["loss"]).abs() < 1e-6
    fine = vp.create_model("vit_tiny_patch16_224", "sincos2d", weights=FOLDER / "hf_mae", **VIT)
    assert torch.equal(fine.blocks[1].mlp.fc1.weight.double(), mae.encoder.blocks[1].mlp.fc1.weight)
