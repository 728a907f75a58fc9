"""Masked autoencoders: what the paper's equations say, and what cannot be done without position."""

import math

import pytest
import torch

from tests.masked import mae_reference
from tests.masked.tiny_mae import SIZE, autoencoder, drawn, vit
from tests.small import pictures


@pytest.mark.parametrize("norm_pix_loss", [True, False])
@pytest.mark.parametrize("size", [(16, 16), (16, 24)], ids=str)
def test_it_computes_what_the_paper_says(size, norm_pix_loss):
    mae = autoencoder(vit(img_size=size), decoder_depth=2, norm_pix_loss=norm_pix_loss).double()
    with torch.no_grad():
        for i, parameter in enumerate(mae.parameters()):
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i)))
        images = pictures(size, batch=3).double()
        result = mae(images, drawn(mae, images))
        weights = mae.original_state_dict()
    keep = result.mask.keep
    assert keep.shape[1] == size[0] * size[1] // 64
    want = [
        mae_reference.mae(weights, image, index, 4, 3, 2, norm_pix_loss)
        for image, index in zip(images, keep, strict=True)
    ]
    assert (result.prediction - torch.stack([prediction for prediction, _ in want])).abs().max() < 1e-10
    assert (result.loss - torch.stack([loss for _, loss in want]).mean()).abs() < 1e-10


def test_hidden_pixels_are_the_target_and_nothing_else():
    mae, images = autoencoder(norm_pix_loss=False).eval(), pictures(SIZE)
    mask = drawn(mae, images)
    result, other = mae(images, mask), mae(images + (images - mae.visible(images, mask)), mask)  # hidden ones doubled
    assert torch.equal(result.prediction, other.prediction)
    assert (result.loss - other.loss).abs() > 0.1
    moved = mae(images + 0.5 * mae.visible(images, mask), mask)
    assert (result.prediction - moved.prediction).abs().max() > 1e-3
    assert torch.equal(mae(images, generator=torch.Generator().manual_seed(2)).prediction, result.prediction)


def test_nothing_hidden():
    mae = autoencoder(mask_ratio=0.0)
    result = mae(pictures(SIZE))
    assert result.loss == 0
    assert not result.mask.hidden.any()
    assert result.prediction.shape == (2, 24, 48)


# --- what no position can do ------------------------------------------------------------------------------------------


def scenes(batch):
    """One scene, light or dark: what a patch shows depends on where it is."""
    y, x = torch.meshgrid(torch.arange(16.0), torch.arange(24.0), indexing="ij")
    scene = torch.stack([(x / 4).sin() + y / 8 - 1, (y / 3).cos() * x / 12, (x / 5 - y / 3).sin()])
    contrast = torch.linspace(-1.5, 1.5, batch)
    return contrast[:, None, None, None] * scene


def floor(mae, images, hidden):
    """The least loss of one prediction for all hidden patches of a picture: their variance around their mean."""
    patches = images.unflatten(3, (6, 4)).unflatten(2, (4, 4)).permute(0, 2, 4, 3, 5, 1).flatten(1, 2).flatten(2)
    rows = [p[h] - p[h].mean(0) for p, h in zip(patches.double(), hidden, strict=True)]
    return torch.stack([row.square().mean() for row in rows]).mean().item()


def train(spec, steps):
    """The loss over the floor of every step."""
    mae = autoencoder(vit(spec, depth=1), spec, norm_pix_loss=False)
    optimizer = torch.optim.AdamW(mae.parameters(), lr=4e-3)
    images, generator, ratios = scenes(16), torch.Generator().manual_seed(0), []
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 4e-3 * min(1, (step + 1) / 20) * (1 + math.cos(math.pi * step / steps)) / 2
        loss, prediction, mask = mae(images, generator=generator)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        ratios.append(loss.item() / floor(mae, images, mask.hidden))
        if spec == "none":
            hidden = prediction.detach()[mask.hidden].unflatten(0, (16, -1))
            assert (hidden - hidden[:, :1]).abs().max() < 1e-5  # all mask tokens of a picture get the same
    return ratios


def test_without_position_the_mean_patch_is_the_best_prediction():
    ratios = train("none", 150)
    assert min(ratios) > 1 - 1e-5  # on every batch
    assert sum(ratios[-10:]) / 10 < 1.05


@pytest.mark.parametrize("spec", ["sincos2d", "rope_axial"])
def test_with_position_it_is_not(spec):
    ratios = train(spec, 150)
    assert ratios[0] > 1
    assert sum(ratios[-10:]) / 10 < 0.75
