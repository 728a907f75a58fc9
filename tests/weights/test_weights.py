"""`load_weights`: other grids and windows, missing and unknown tensors, files."""

import pytest
import safetensors.torch
import timm
import torch

import visionpos as vp
from tests.small import pictures, vit
from tests.weights.tiny_weights import GRID, HEAD, PLAIN, TABLE, checkpoint, swin


def test_another_grid():
    source = vit(img_size=(48, 40))
    model = vp.set_encoding(vit(), "learned+rope_axial")
    shapes = r"pos_embed is \(1, 121, 48\) in the weights and \(1, 97, 48\) in the model"
    with pytest.raises(ValueError, match=f"{shapes}; resize=True .* resize=\\(h, w\\) .*resize_position_table"):
        vp.load_weights(model, source.state_dict())
    with pytest.raises(ValueError, match="120 rows is not that of a square grid"):
        vp.load_weights(model, source.state_dict(), resize=True)
    vp.load_weights(model, source.state_dict(), resize=(12, 10))
    assert torch.equal(model.pos_embed, vp.resize_position_table(source.pos_embed, GRID, (12, 10), 1))
    vp.load_weights(model, vit(img_size=24).state_dict(), resize=True)
    assert torch.equal(model.pos_embed, vp.resize_position_table(vit(img_size=24).pos_embed, GRID, (6, 6), 1))


def test_another_window():
    source, model = swin(depths=(1, 2), window_size=(4, 8)), vp.set_encoding(swin(depths=(1, 2)), "relative_table")
    name = "layers.1.blocks.1.attn.relative_position_bias_table"
    with pytest.raises(ValueError, match=r"\(105, 2\) in the weights and \(21, 2\) .*resize_relative_table"):
        vp.load_weights(model, source.state_dict())
    vp.load_weights(model, source.state_dict(), resize=(4, 8))
    want = vp.resize_relative_table(source.state_dict()[name], (4, 2), (4, 8))
    assert torch.equal(model.state_dict()[name], want)


def test_another_grid_with_as_many_tokens():
    """A wrong guess would pass unnoticed: the shapes are equal."""
    source, model = vit(img_size=(48, 32)), vp.set_encoding(vit(), "learned")
    vp.load_weights(model, source.state_dict(), resize=(12, 8))
    assert torch.equal(model.pos_embed, vp.resize_position_table(source.pos_embed, GRID, (12, 8), 1))
    turned = vp.set_encoding(swin(depths=(1, 2), window_size=(2, 4)), "relative_table")
    vp.load_weights(turned, swin(depths=(1, 2)).state_dict(), resize=(4, 2))
    name = "layers.1.blocks.1.attn.relative_position_bias_table"
    want = vp.resize_relative_table(swin(depths=(1, 2)).state_dict()[name], (2, 4), (4, 2))
    assert torch.equal(turned.state_dict()[name], want)


def test_other_shapes_name_the_option():
    model = vp.set_encoding(vit(), "learned")
    before = model.pos_embed.clone()
    with pytest.raises(ValueError, match=r"head\.weight is \(7, 48\) .* create the model with num_classes=7"):
        vp.load_weights(model, vit(num_classes=7).state_dict())
    with pytest.raises(ValueError, match=r"create the model with patch_size=\(8, 8\) and in_chans=1"):
        vp.load_weights(model, vit(patch_size=8, img_size=(64, 96), in_chans=1).state_dict())
    assert torch.equal(model.pos_embed, before)


def test_strict_and_not(caplog):
    weights = checkpoint(PLAIN, **TABLE, **HEAD)
    del weights["norm.bias"]
    model = vp.set_encoding(vit(), "rope_axial+relative_table")
    names = (
        r"new in this encoding: blocks\.0\.attn\.encodings\.0\.relative_position_bias_table, blocks\.1.*; "
        r"missing in the weights: norm\.bias; unknown to the model: pos_embed"
    )
    before = model.norm.weight.clone()
    with pytest.raises(ValueError, match=rf"do not fit EncodedVisionTransformer: {names}; strict=False loads the rest"):
        vp.load_weights(model, weights)
    assert torch.equal(model.norm.weight, before)
    result = vp.load_weights(model, weights, strict=False)
    assert len(caplog.records) == 1
    assert "unknown to the model: pos_embed" in caplog.text
    assert result.unexpected_keys == ["pos_embed"]
    assert len(result.missing_keys) == 3
    assert torch.equal(model.norm.weight, weights["norm.weight"])


def test_files(tmp_path):
    source = vp.set_encoding(vit(), "learned+rope_mixed")
    safetensors.torch.save_file(source.state_dict(), tmp_path / "model.safetensors")
    model = vp.set_encoding(vit(), "learned+rope_mixed")
    torch.nn.init.zeros_(model.norm.weight)
    vp.load_weights(model, tmp_path / "model.safetensors")
    assert torch.equal(model(pictures()), source(pictures()))
    for name in ("model.pth", "model.pt", "pytorch_model.bin"):
        torch.save(source.state_dict(), tmp_path / name)
        with pytest.raises(
            ValueError, match=rf"only \.safetensors and \.npz files and directories are loaded, got '.*{name}'"
        ):
            vp.load_weights(model, str(tmp_path / name))
    with pytest.raises(ValueError, match="ResNet is not a supported host"):
        vp.load_weights(timm.create_model("resnet18"), {})


@pytest.mark.parametrize("name", vp.list_encodings())
def test_the_own_state_dict_of_every_encoding(name):
    source, model = (vp.set_encoding(vit(), name) for _ in range(2))
    with torch.no_grad():
        for parameter in source.parameters():
            parameter.add_(0.1)
    vp.load_weights(model, source.state_dict())
    assert torch.equal(model(pictures()), source(pictures()))
