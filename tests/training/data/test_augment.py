"""Augmentations: each picture against the definition, one at a time; and the law of the draws."""

import pytest
import torch
import torch.nn.functional as F

from visionpos.training.data.augment import CropFlip, Crops, draw_crop_flip, normalize


def random_images(*shape):
    return torch.randint(256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def crops_of(images, drawn, padding):
    """A crop of each picture."""
    return Crops(images, padding)(torch.arange(len(images), device=images.device), drawn)


def random_crops(images, generator, padding=4, flip=True):
    return crops_of(images, draw_crop_flip(len(images), generator, padding, flip), padding)


def one_by_one(images, drawn, padding):
    """The definition: reflect-pad a picture, cut at its offset, mirror."""
    height, width = images.shape[2:]
    results = []
    for image, top, left, flipped in zip(images, *(each.tolist() for each in drawn), strict=True):
        padded = F.pad(image[None].double(), (padding,) * 4, mode="reflect")[0].to(torch.uint8)
        crop = padded[:, top : top + height, left : left + width]
        results.append(crop.flip(2) if flipped else crop)
    return torch.stack(results)


@pytest.mark.parametrize("shape", [(64, 3, 32, 32), (64, 3, 12, 20), (32, 1, 9, 5), (16, 4, 5, 17)])
@pytest.mark.parametrize("padding", [1, 2, 4])
def test_each_picture_follows_the_definition(shape, padding):
    images = random_images(*shape)
    drawn = draw_crop_flip(len(images), torch.Generator().manual_seed(0), padding)
    result = crops_of(images, drawn, padding)
    assert result.dtype == torch.uint8
    assert torch.equal(result, one_by_one(images, drawn, padding))


def test_every_offset_and_flip_of_a_non_square_picture():
    padding = 3
    top, left, flipped = torch.cartesian_prod(torch.arange(7), torch.arange(7), torch.arange(2)).T
    drawn = CropFlip(top, left, flipped == 1)
    images = random_images(1, 2, 4, 6).expand(len(drawn.top), -1, -1, -1)
    assert torch.equal(crops_of(images, drawn, padding), one_by_one(images, drawn, padding))


@pytest.mark.parametrize("flip", [True, False])
def test_crops_of_resident_pictures_are_the_same_crops(flip):
    images = random_images(20, 3, 10, 14)
    rows = torch.tensor([19, 0, 7, 7, 3, 12])
    drawn = draw_crop_flip(6, torch.Generator().manual_seed(2), padding=4, flip=flip)
    crops = Crops(images, 4, flip)
    assert torch.equal(crops(rows, drawn), one_by_one(images[rows], drawn, 4))
    images.zero_()
    assert crops(rows, drawn).any()  # it has a copy of its own


def test_without_padding_and_flip_nothing_changes():
    images = random_images(8, 3, 10, 14)
    assert torch.equal(random_crops(images, torch.Generator(), padding=0, flip=False), images)


def test_equal_pictures_come_out_different():
    images = random_images(1, 3, 16, 24).expand(256, -1, -1, -1)
    distinct = len(random_crops(images, torch.Generator().manual_seed(0)).unique(dim=0))
    assert 100 <= distinct <= 162  # of 9 * 9 * 2; a draw per picture gives about 129


def test_same_seed_same_batch_and_the_state_moves_on():
    images = random_images(32, 3, 8, 12)
    one, two = torch.Generator().manual_seed(3), torch.Generator().manual_seed(3)
    first = random_crops(images, one)
    assert torch.equal(first, random_crops(images, two))
    assert not torch.equal(first, random_crops(images, one))


def test_draws_are_uniform_and_independent():
    count, padding = 81_000, 4
    top, left, flipped = draw_crop_flip(count, torch.Generator().manual_seed(0), padding)
    joint = torch.bincount(top * 9 + left, minlength=81).double()
    assert len(joint) == 81
    assert ((joint - 1000) ** 2 / 1000).sum() < 138  # chi-square with 80 degrees of freedom, p = 1e-4
    assert abs(flipped.double().mean() - 0.5) < 4 * 0.5 / count**0.5
    for offset in (top, left):
        assert abs(offset[flipped].double().mean() - offset[~flipped].double().mean()) < 0.08


def test_flip_is_optional_and_leaves_the_offsets():
    with_flip = draw_crop_flip(100, torch.Generator().manual_seed(0))
    without = draw_crop_flip(100, torch.Generator().manual_seed(0), flip=False)
    assert with_flip.flipped.any()
    assert not without.flipped.any()
    assert torch.equal(with_flip.top, without.top)
    assert torch.equal(with_flip.left, without.left)


@pytest.mark.parametrize("padding", [-1, 8, 20])
def test_padding_must_fit(padding):
    with pytest.raises(ValueError, match=f"padding {padding} .* 8x12 picture"):
        Crops(random_images(2, 3, 8, 12), padding)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_cuda_nothing_waits_for_the_device():
    images = random_images(64, 3, 12, 20)
    expected = normalize(random_crops(images, torch.Generator().manual_seed(0)), (0.5,) * 3, (0.2,) * 3)
    on_device, generator = images.cuda(), torch.Generator("cuda").manual_seed(0)
    torch.cuda.set_sync_debug_mode("error")
    try:
        random_crops(on_device, generator)
        result = normalize(random_crops(on_device, torch.Generator().manual_seed(0)), (0.5,) * 3, (0.2,) * 3)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(result.cpu(), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_normalize_rounds_once(dtype):
    images, mean, std = random_images(4, 3, 6, 10), (0.1, 0.5, 0.7), (0.2, 0.25, 0.3)
    exact = (images.double() / 255 - torch.tensor(mean).double().view(3, 1, 1)) / torch.tensor(std).double().view(
        3, 1, 1
    )
    result = normalize(images, mean, std, dtype)
    assert result.dtype == dtype
    torch.testing.assert_close(result.double(), exact, rtol=torch.finfo(dtype).eps, atol=1e-6)


def test_normalize_refuses_what_it_cannot_mean():
    with pytest.raises(ValueError, match="uint8"):
        normalize(torch.zeros(1, 3, 4, 6), (0.5,) * 3, (0.5,) * 3)
    with pytest.raises(ValueError, match="1 channels, but 3 means"):
        normalize(random_images(1, 1, 4, 6), (0.5,) * 3, (0.5,) * 3)
