"""The timm entry points `visionpos_*`: how they are made, and the pieces that timm's train.py uses."""

import argparse
import importlib

import pytest
import timm
import torch
from timm.data import resolve_data_config
from timm.optim import create_optimizer_v2
from timm.utils import ModelEmaV3, ParseKwargs

import visionpos as vp
from tests.small import pictures, randomised
from tests.tiny_timm_models import SMALL, SWIN, VIT, small

NAMES = [
    "visionpos_swin_tiny_patch4_window7_224",
    "visionpos_swin_xs_patch2_window4_32",
    "visionpos_vit_small_patch4_32",
    "visionpos_vit_tiny_patch16_224",
    "visionpos_vit_tiny_patch4_32",
    "visionpos_vit_xs_patch4_32",
]


def test_the_names():
    assert sorted(timm.list_models("visionpos_*")) == NAMES


@pytest.mark.parametrize(
    ("name", "millions"),
    [("vit_tiny_patch4_32", 5.36), ("vit_small_patch4_32", 2.70), ("vit_xs_patch4_32", 0.81)],
)
def test_models_for_cifar(name, millions):
    model = timm.create_model(f"visionpos_{name}").eval()
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.01)
    assert model(torch.randn(1, 3, 32, 32)).shape == (1, 10)
    config = resolve_data_config({}, model=model)
    assert config["input_size"] == (3, 32, 32)
    assert config["crop_pct"] == 1.0
    assert config["mean"] == (0.4914, 0.4822, 0.4465)
    assert config["std"] == (0.2470, 0.2435, 0.2616)


def test_wrappers_know_the_pretrained_weights_of_their_host():
    for name in ("vit_tiny_patch16_224", "swin_tiny_patch4_window7_224"):
        ours, theirs = (timm.models.get_pretrained_cfg(prefix + name) for prefix in ("visionpos_", ""))
        assert ours.hf_hub_id == theirs.hf_hub_id != ""
        assert (ours.mean, ours.input_size) == (theirs.mean, theirs.input_size)
    with pytest.raises(RuntimeError, match="No pretrained weights exist for visionpos_vit_xs_patch4_32"):
        small(pretrained=True)


@pytest.mark.parametrize(
    "spec",
    [
        "rope_axial",
        "learned+rope_mixed",
        {"name": "rope_axial", "temperature": 10.0},
        ["sincos2d", {"name": "alibi2d"}],
        "none",
    ],
    ids=str,
)
def test_every_kind_of_spec_equals_set_encoding(spec):
    model = small(encoding=spec)
    want = vp.set_encoding(small(), spec)
    assert [e.name for e in vp.get_encoding(model)] == [e.name for e in vp.get_encoding(want)]
    want.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(model(pictures()), want(pictures()))


def test_without_an_encoding_it_is_the_host():
    model = small()
    assert type(model) is timm.models.vision_transformer.VisionTransformer
    with pytest.raises(ValueError, match="unknown encoding 'rope_axal'; did you mean 'rope_axial'"):
        small(encoding="rope_axal")


@pytest.mark.parametrize(("name", "channels"), [(VIT, [48, 48]), (SWIN, [24, 48])])
def test_timm_options(name, channels):
    model = small(name, encoding="rope_axial", in_chans=1, num_classes=7)
    assert model(pictures(channels=1)).shape == (2, 7)
    model = small(name, encoding="rope_axial+learned", features_only=True, out_indices=(0, 1))
    features = model(pictures())
    assert model.feature_info.channels() == channels
    plain = small(name, features_only=True, out_indices=(0, 1))
    assert [f.shape for f in features] == [f.shape for f in plain(pictures())]
    assert not torch.equal(features[-1], plain(pictures())[-1])


def test_any_host_by_its_name():
    options = {"host": "vit_tiny_patch16_224", "img_size": 32, "patch_size": 8, "num_classes": 5}
    model = timm.create_model("visionpos", encoding="alibi2d", **options)
    assert model(pictures((32, 32))).shape == (2, 5)
    assert model.pretrained_cfg["hf_hub_id"] == timm.models.get_pretrained_cfg("vit_tiny_patch16_224").hf_hub_id
    with pytest.raises(ValueError, match=r"host: not given; .*older than 1.0.31 without model_args=.'host'"):
        timm.create_model("visionpos", encoding="alibi2d")
    with pytest.raises(ValueError, match="ResNet is not a supported host"):
        timm.create_model("visionpos", host="resnet18", encoding="alibi2d")


# --- timm's train.py --------------------------------------------------------------------------------------------------


def model_kwargs(*words):
    parser = argparse.ArgumentParser()
    parser.add_argument("--model-kwargs", nargs="*", default={}, action=ParseKwargs)
    return parser.parse_args(["--model-kwargs", *words]).model_kwargs


@pytest.mark.parametrize(
    ("words", "names"),
    [
        (["encoding=rope_axial"], ["rope_axial"]),
        (["encoding=learned+alibi2d"], ["learned", "alibi2d"]),
        (["encoding={'name': 'rope_axial', 'temperature': 10.0}"], ["rope_axial"]),
        (["encoding=['sincos2d', 'alibi']"], ["sincos2d", "alibi"]),
    ],
)
def test_one_step_of_stock_training(words, names):
    importlib.import_module("visionpos")  # --device-modules visionpos
    model = small(**model_kwargs(*words), num_classes=10, pretrained=False, in_chans=3, drop_rate=0.0).train()
    assert [e.name for e in vp.get_encoding(model)] == names
    optimizer = create_optimizer_v2(model, opt="adamw", lr=1e-2, weight_decay=0.05)
    ema = ModelEmaV3(model, decay=0.5)
    before = model(pictures()).detach()
    torch.nn.functional.cross_entropy(model(pictures()), torch.tensor([1, 3])).backward()
    optimizer.step()
    ema.update(model, step=2)
    trained, averaged = model(pictures()), ema.module(pictures())
    assert not torch.equal(trained, before)
    assert not torch.equal(averaged, trained)
    assert not torch.equal(averaged, before)


def groups_of(model, **options):
    """Name of every parameter -> its optimiser group."""
    optimizer = create_optimizer_v2(model, opt="adamw", lr=1e-3, weight_decay=0.05, **options)
    found = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    return {name: found[id(p)] for name, p in model.named_parameters()}


@pytest.mark.parametrize(("name", "block"), [(VIT, "blocks.{}"), (SWIN, "layers.1.blocks.{}")])
def test_weight_decay_and_layer_decay(name, block):
    model = small(name, encoding="learned+rope_mixed+relative_table")
    table = "pos_embed" if name == VIT else "pos_embed_input.0.pos_embed"
    encodings = [n for n, _ in model.named_parameters() if "encodings" in n or "relative" in n or "pos_embed" in n]
    assert len(encodings) == 1 + 2 * len(vp.get_encoding(model)[1:]) // 2
    groups = groups_of(model)
    assert all(groups[n]["weight_decay"] == 0 for n in encodings)
    assert groups[f"{block.format(0)}.attn.qkv.weight"]["weight_decay"] == 0.05
    groups = groups_of(model, layer_decay=0.75)
    for index in (0, 1):
        stem = block.format(index)
        ours = [n for n in encodings if n.startswith(stem)]
        assert len(ours) == 2
        assert {groups[n]["lr_scale"] for n in ours} == {groups[f"{stem}.attn.qkv.weight"]["lr_scale"]}
        assert all(groups[n]["weight_decay"] == 0 for n in ours)
    assert groups[table]["lr_scale"] == groups["patch_embed.proj.weight"]["lr_scale"]
    assert groups[table]["lr_scale"] < groups[f"{block.format(0)}.attn.qkv.weight"]["lr_scale"]


def test_checkpoints_of_training_load_in_the_order_that_was_asked_for(tmp_path):
    """`checkpoint_path` is read by timm: before `set_encoding` in vp.create_model, after it in an entry point."""
    plain = randomised(small())
    torch.save({"state_dict": plain.state_dict()}, tmp_path / "plain.pth")
    model = vp.create_model(VIT, encoding="learned+rope_mixed", checkpoint_path=tmp_path / "plain.pth", **SMALL)
    assert torch.equal(model.pos_embed, plain.pos_embed)
    assert torch.equal(model.blocks[1].mlp.fc2.weight, plain.blocks[1].mlp.fc2.weight)
    source = {"file": str(tmp_path / "plain.pth")}  # as pretrained weights: after the conversion, and told what is new
    model = small(encoding="rope_mixed", pretrained=True, pretrained_cfg_overlay=source)
    assert torch.equal(model.blocks[1].mlp.fc2.weight, plain.blocks[1].mlp.fc2.weight)
    torch.save({"state_dict": model.state_dict()}, tmp_path / "converted.pth")
    again = small(encoding="rope_mixed", checkpoint_path=tmp_path / "converted.pth")
    assert torch.equal(again(pictures()), model.eval()(pictures()))
