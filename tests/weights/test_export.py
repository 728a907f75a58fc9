"""Weights go back to timm and to Hugging Face under the names that their own models save."""

import pytest
import timm
import torch
from safetensors.torch import load_file

import visionpos as vp
from tests.small import pictures, randomised, swin, vit
from tests.weights.test_origins import build, path


@pytest.mark.parametrize("name", ["hf_vit", "hf_swin", "hf_dinov3", "hf_dinov3_gated"])
def test_hugging_face_gets_its_own_file_back(name):
    original, model = load_file(path(name) / "model.safetensors"), build(name)
    weights = vp.export_state_dict(model, "huggingface")
    assert sorted(weights) == sorted(original)
    different = [key for key in weights if not torch.equal(weights[key], original[key])]
    assert different == (["embeddings.mask_token"] if "dinov3" in name else [])  # of use in pretraining only


def test_without_a_classifier_there_is_no_prefix():
    weights = vp.export_state_dict(build("hf_swin", num_classes=0), "huggingface")
    assert "embeddings.norm.weight" in weights
    assert not any(key.startswith(("swin.", "classifier.")) for key in weights)


@pytest.mark.parametrize("encoding", ["learned", "sincos2d"])
@pytest.mark.parametrize("options", [{}, {"class_token": False, "global_pool": "avg", "fc_norm": False}], ids=str)
def test_timm_gets_a_vit(encoding, options):
    model = randomised(vit(encoding, **options))
    plain = vit(**options)
    plain.load_state_dict(vp.export_state_dict(model, "timm"), strict=True)
    assert (plain(pictures()) - model(pictures())).abs().max() < 1e-5
    theirs = vp.export_state_dict(model, "huggingface")
    back = vit(encoding, **options)
    vp.load_weights(back, theirs)
    assert torch.equal(back(pictures()), model(pictures()))


def test_timm_gets_a_swin():
    model, plain = randomised(swin("relative_table")), swin()
    plain.load_state_dict(vp.export_state_dict(model, "timm"), strict=True)
    assert torch.equal(plain(pictures((64, 96))), model(pictures((64, 96))))


WRONG = [
    (lambda: (vit("rope_axial"), "timm"), "a place for learned or sincos2d, once; this model has: rope_axial"),
    (lambda: (vit("learned+alibi2d"), "timm"), "this model has: learned, alibi2d"),
    (lambda: (vit("none"), "huggingface"), "this model has: none"),
    (lambda: (swin("none"), "timm"), "a place for relative_table, once; this model has: none"),
    (lambda: (vp.set_encoding(swin(), {"name": "relative_table", "layers": [0, 2]}), "timm"), "once; this model"),
    (lambda: (vit(init_values=0.1), "huggingface"), "has no place for blocks.0.ls1.gamma"),
    (lambda: (timm.create_model("cait_xxs24_224"), "timm"), "exported are ViT, Swin and DINOv3, not"),
]


@pytest.mark.unhooked
def test_another_format_is_one_line():
    with pytest.raises(ValueError, match="format must be 'timm' or 'huggingface', got 'jax'"):
        vp.export_state_dict(vit(), "jax")


@pytest.mark.parametrize(("make", "line"), WRONG, ids=[line[:40] for _, line in WRONG])
def test_what_has_no_place_is_one_line(make, line):
    with pytest.raises(ValueError, match=line) as error:
        vp.export_state_dict(*make())
    assert "\n" not in str(error.value)
