"""Coordinate augmentation: DINOv3's formula, and every encoding under it."""

import math

import pytest
import timm
import torch

import visionpos as vp


def draw(augmentation, positions, seed):
    return augmentation(positions, torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("grid", [(3, 5), (1, 4), (6, 2), (7,), (2, 3, 4)])
def test_formula(grid, seed):
    positions = vp.Positions.grid(grid, num_prefix_tokens=1)
    got = draw(vp.CoordinateAugmentation(shift=0.3, jitter=1.5, rescale=2.0), positions, seed)
    axes = len(grid)
    u = (torch.rand(2 * axes + 1, generator=torch.Generator().manual_seed(seed)) * 2 - 1).tolist()
    for token, moved in zip(positions.coords.tolist(), got.coords.tolist(), strict=True):
        for axis in range(axes):
            box = (token[axis] + 0.5) / grid[axis] * 2 - 1
            box = (box + 0.3 * u[axis]) * 1.5 ** u[axes + axis] * 2 ** u[-1]
            assert moved[axis] == pytest.approx((box + 1) / 2 * grid[axis] - 0.5, abs=1e-5)
    assert (got.feat_shape, got.num_prefix_tokens, got.is_grid) == (grid, 1, False)


def test_ranges_and_axes():
    positions = vp.Positions.grid((4, 8))
    shifted = torch.stack([draw(vp.CoordinateAugmentation(shift=0.5), positions, i).coords[0] for i in range(300)])
    assert shifted.abs().amax(0).tolist() == pytest.approx([1.0, 2.0], rel=0.05)  # 0.5 of half the grid, each axis
    assert not torch.allclose(shifted[:, 0] * 2, shifted[:, 1])
    centre = torch.tensor([1.5, 3.5])
    for seed in range(50):
        ratio = (draw(vp.CoordinateAugmentation(rescale=2.0), positions, seed).coords[0] - centre) / -centre
        assert ratio[0].item() == pytest.approx(ratio[1].item(), rel=1e-5)  # the axes share it
        assert abs(math.log(ratio[0].item())) <= math.log(2) + 1e-6


def test_every_token_is_moved_by_a_draw_of_its_own():
    positions = vp.Positions.grid((3, 5), num_prefix_tokens=2)
    draws = [draw(vp.CoordinateAugmentation(token_jitter=0.5), positions, i).coords for i in range(400)]
    moves = torch.stack(draws) - positions.coords  # (400, 15, 2)
    assert moves.abs().amax((0, 1)).tolist() == pytest.approx([0.5, 0.5], rel=0.01)
    assert moves.mean(0).abs().max() < 4 * 0.5 / 3**0.5 / 400**0.5  # the clean coordinates, on average
    between = torch.corrcoef(moves.flatten(1).T) - torch.eye(30)
    assert between.abs().max() < 0.25  # of any two tokens, and of both axes

    both = vp.CoordinateAugmentation(shift=0.3, rescale=2.0, token_jitter=0.2)
    moved, frame = (draw(each, positions, 7) for each in (both, vp.CoordinateAugmentation(shift=0.3, rescale=2.0)))
    scale = (frame.coords[-1] - frame.coords[0]) / (positions.coords[-1] - positions.coords[0])
    own = (moved.coords - frame.coords) / scale
    assert 0.15 < own.abs().max() <= 0.2001  # in steps of the grid, before the frame moves
    assert moved.num_prefix_tokens == 2


def test_dropped_tokens_leave_the_others_their_draws():
    model = vp.create_model(
        "vit_tiny_patch16_224", "learned", img_size=(16, 24), patch_size=4, num_classes=3, embed_dim=48, depth=1
    ).train()
    model.coordinate_augmentation = vp.CoordinateAugmentation(token_jitter=0.5)
    x, index = torch.randn(2, 3, 16, 24, generator=torch.Generator().manual_seed(0)), torch.tensor([[5, 17], [0, 8]])
    torch.manual_seed(3)
    whole, _ = model.forward_stem(x)
    torch.manual_seed(3)
    kept, _ = model.forward_stem(x, index)
    assert torch.equal(kept[:, 1:], whole[torch.arange(2)[:, None], 1 + index])
    assert (kept - model.eval().forward_stem(x, index)[0]).abs().max() > 1e-3  # evaluation is untouched


def test_neutral_settings_move_nothing():
    positions = vp.Positions.grid((3, 5))
    assert (draw(vp.CoordinateAugmentation(), positions, 0).coords - positions.coords).abs().max() < 1e-6


@pytest.mark.parametrize("name", [n for n in vp.list_encodings() if vp.encoding_info(n)["place"] != "conditional"])
def test_every_encoding_in_a_model(name):
    torch.manual_seed(0)
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=(16, 24), patch_size=4, num_classes=3, embed_dim=48, depth=1, num_heads=3
    )
    vp.set_encoding(model, name)
    x = torch.randn(2, 3, 16, 24)
    want = model.eval()(x)
    model.coordinate_augmentation = vp.CoordinateAugmentation(shift=0.2, jitter=1.2, rescale=2.0)
    assert torch.equal(model(x), want)  # not while evaluating
    out = model.train()(x)
    assert out.isfinite().all()
    out.sum().backward()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"shift": -1.0}, "^shift must be 0 or more"),
        ({"rescale": 0.5}, "^rescale must be 1 or more"),
        ({"token_jitter": -0.1}, "^token_jitter must be 0 or more"),
        ({"jitter": math.nan}, "^jitter must be 1 or more, and finite, got nan"),
        ({"token_jitter": math.inf}, "^token_jitter must be 0 or more, and finite, got inf"),
    ],
)
def test_errors(options, words):
    with pytest.raises(ValueError, match=words):
        vp.CoordinateAugmentation(**options)


@pytest.mark.parametrize("name", ["swin_tiny_patch4_window7_224", "swinv2_tiny_window8_256", "hiera_tiny_224"])
def test_a_host_that_cannot_says_so(name):
    with torch.device("meta"):
        model = vp.set_encoding(timm.create_model(name), "none")
    model.coordinate_augmentation = None
    with pytest.raises(ValueError, match="coordinate_augmentation is for models whose layers see the whole grid"):
        model.coordinate_augmentation = vp.CoordinateAugmentation(rescale=2.0)
