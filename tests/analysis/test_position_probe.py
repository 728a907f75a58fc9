"""The probe for positions: known answers, any model, and the page of docs that tells how to use it."""

import re
from pathlib import Path

import pytest
import timm
import torch
from torch import nn

import visionpos as vp
from visionpos.analysis.position_probe import explained, position_probe

PAGE = Path(__file__).parents[2] / "docs" / "position_probe.md"
SMALL = {"img_size": (32, 48), "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2, "num_classes": 3}


def features(images, height, width, **at):
    """Noise (images, 6, H, W) with row or column in a channel."""
    x = torch.randn(images, 6, height, width, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    for name, channel in at.items():
        x[:, channel] = (rows if name == "row" else columns) * 3.0 + 5
    return x


def test_what_is_there_is_read_and_nothing_else():
    row, column = explained(features(40, 3, 5, row=2), 1e-3)
    assert row > 0.999
    assert abs(column) < 0.05
    row, column = explained(features(40, 3, 5, column=4), 1e-3)
    assert abs(row) < 0.05
    assert column > 0.999
    assert all(abs(value) < 0.05 for value in explained(features(200, 4, 3), 1e-3))


def test_noise_on_a_position_leaves_its_share():
    """Of y = row plus noise of the same variance, the best linear map explains a half."""
    x = features(4000, 4, 3, row=1)
    x[:, 1] = (x[:, 1] - 5) / 3
    noise = torch.randn(4000, 4, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    x[:, 1] += noise * 1.25**0.5  # the variance of 0, 1, 2, 3
    assert explained(x, 1e-6)[0] == pytest.approx(0.5, abs=0.02)


def test_an_axis_of_one_patch_has_none():
    row, column = explained(features(10, 1, 4, column=0), 1e-3)
    assert row != row  # NaN
    assert column > 0.99


@pytest.mark.parametrize("encoding", ["none", "learned"])
def test_a_model_has_the_positions_that_its_encoding_gives(encoding):
    torch.manual_seed(0)
    spec = {"name": "learned", "init_std": 10.0} if encoding == "learned" else encoding
    model = vp.create_model("vit_tiny_patch16_224", encoding=spec, **SMALL).train()
    model.blocks[0].eval()
    found = position_probe(model, torch.randn(64, 3, 32, 48))
    assert [each.layer for each in found] == [0, 1]
    for each in found:
        assert (each.row > 0.8, each.column > 0.8) == (encoding == "learned",) * 2
        assert encoding == "learned" or max(abs(each.row), abs(each.column)) < 0.2
    assert model.training
    assert not model.blocks[0].training


@pytest.mark.parametrize("name", ["swin_tiny_patch4_window7_224", "vit_tiny_patch16_224", "resnet18"])
def test_models_of_timm_as_they_are(name):
    model = timm.create_model(name, **({"img_size": 64, "window_size": 2} if "swin" in name else {}), num_classes=0)
    side = 64 if "vit" not in name else 224
    found = position_probe(model, torch.randn(2, 3, side, side))
    assert len(found) >= 4
    assert all(each.row <= 1 and each.column <= 1 for each in found)


def test_wrong_arguments_are_named():
    model = vp.create_model("vit_tiny_patch16_224", encoding="none", **SMALL)
    images = torch.randn(2, 3, 32, 48)
    with pytest.raises(ValueError, match="model: Linear given; accepted: a timm model"):
        position_probe(nn.Linear(2, 2), images)
    with pytest.raises(ValueError, match=r"images: shape \(1, 3, 32, 48\) given; accepted: .* two images or more"):
        position_probe(model, images[:1])
    with pytest.raises(ValueError, match=r"l2: 0 given; accepted: a number above 0"):
        position_probe(model, images, l2=0)


def test_the_page_runs(monkeypatch, capsys):
    real = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained: real(name, **SMALL))
    torch.manual_seed(0)
    names = {"images": torch.randn(24, 3, 32, 48), "labels": torch.randint(3, (24,)), "steps": 2}
    for block in re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.S):
        exec(compile(block, str(PAGE), "exec"), names)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == ["layer 0", "layer 1"]
    assert [encoding.name for encoding in vp.get_encoding(names["model"])] == ["alibi2d"]
