"""Random erasing, mixup and CutMix: against their definition and timm's; and the laws of the draws."""

import math

import numpy as np
import pytest
import torch
from timm.data import Mixup
from timm.data.random_erasing import RandomErasing

from visionpos.training.data.augment.box import Box
from visionpos.training.data.augment.erase import draw_erasing, erase
from visionpos.training.data.augment.mix import Mixing, draw_mixing, mix


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_the_box_of_each_picture_is_noise_and_the_rest_stays():
    images = torch.full((60, 3, 12, 20), 9.0)
    picture, box, noise = drawn = draw_erasing(images.shape, generator(), re_prob=0.5)
    results, expected = erase(images, drawn), images.clone()
    for index, target in enumerate(picture.tolist()):
        top, bottom, left, right = (each[index] for each in box)
        expected[target, :, top:bottom, left:right] = noise[index, :, top:bottom, left:right]
    assert torch.equal(results, expected)
    assert (images == 9).all()
    assert (results != 9).flatten(1).any(1).sum() == 30


def test_boxes_follow_timms_law():
    """Sides and positions beside timm's, by two-sample chi-squares over coarse cells."""
    count, shape = 3000, (3, 12, 20)
    timm_boxes = []
    random_erasing = RandomErasing(probability=1, mode="const", device="cpu")
    for image in torch.ones(count, *shape):
        rows, columns = (random_erasing(image)[0] == 0).nonzero(as_tuple=True)
        timm_boxes.append((rows.min(), rows.max() + 1, columns.min(), columns.max() + 1))
    theirs, ours = Box(*torch.tensor(timm_boxes).T), draw_erasing((count, *shape), generator(), re_prob=1).box
    for cell in (
        lambda box: (box.bottom - box.top) // 2 * 5 + (box.right - box.left) // 4,
        lambda box: box.top // 3 * 4 + box.left // 5,
        lambda box: box.area // 8,
    ):
        one, two = (torch.bincount(cell(box), minlength=40).double() for box in (ours, theirs))
        seen = one + two >= 20
        statistic = ((one - two) ** 2 / (one + two))[seen].sum()
        freedom = seen.sum() - 1
        assert statistic < freedom + 5 * (2 * freedom) ** 0.5
    assert ours.area.max() <= 12 * 20 / 3 + 12
    assert (ours.bottom - ours.top).max() < 12


@pytest.mark.parametrize(("batch_size", "probability"), [(9, 0.25), (8, 0.25), (1, 0.3), (7, 1.0), (5, 0.0)])
def test_each_picture_is_as_likely_to_be_erased(batch_size, probability):
    rng, rounds = generator(), 1000
    counts = torch.zeros(batch_size)
    for _ in range(rounds):
        picture, box, _ = draw_erasing((batch_size, 1, 12, 20), rng, probability)
        assert len(picture.unique()) == len(picture)
        counts[picture] += (box.area > 0).float()
    assert ((counts / rounds - probability).abs() <= 4 * math.sqrt(probability * (1 - probability) / rounds)).all()


def test_noise_is_standard_normal_and_differs_everywhere():
    noise = draw_erasing((40, 3, 12, 20), generator(), re_prob=0.9).noise
    assert abs(noise.mean()) < 0.03
    assert abs(noise.std() - 1) < 0.03
    assert len(noise.unique()) > 0.99 * noise.numel()


def box_by_definition(lam, row, column, height=12, width=20):
    """timm's box, from 1.0.31 on; before that a side of odd length lost a pixel."""
    tall, wide = int(height * (1 - lam) ** 0.5), int(width * (1 - lam) ** 0.5)
    top, bottom = max(row - tall // 2, 0), min(row + (tall + 1) // 2, height)
    return top, bottom, max(column - wide // 2, 0), min(column + (wide + 1) // 2, width)


@pytest.mark.parametrize("seed", range(6))
def test_cutmix_exchanges_a_box(seed):
    images = torch.randn(6, 3, 12, 20, generator=generator(seed))
    drawn = draw_mixing((12, 20), generator(seed), cutmix_alpha=1.0)
    uniform = torch.rand(4, generator=generator(seed))
    centre = int(uniform[2] * 12), int(uniform[3] * 20)
    box = tuple(each.item() for each in drawn.box)
    assert box in [box_by_definition(lam, *centre) for lam in np.linspace(0, 1, 2001)]
    top, bottom, left, right = box
    expected = images.clone()
    expected[:, :, top:bottom, left:right] = images.flip(0)[:, :, top:bottom, left:right]
    assert torch.equal(mix(images, drawn), expected)


@pytest.mark.parametrize("seed", range(6))
def test_mixup_is_timms(seed, monkeypatch):
    images, labels = torch.randn(6, 3, 12, 20, generator=generator(seed)), torch.tensor([0, 1, 2, 3, 4, 0])
    drawn = draw_mixing((12, 20), generator(seed), mixup_alpha=0.8)
    mixup = Mixup(mixup_alpha=0.8, label_smoothing=0.1, num_classes=5)
    monkeypatch.setattr(mixup, "_params_per_batch", lambda: (drawn.lam.item(), False))
    torch.testing.assert_close(mix(images, drawn), mixup(images.clone(), labels)[0])


@pytest.mark.parametrize("alpha", [0.2, 0.8, 1.0])
def test_lambda_is_beta_distributed(alpha):
    rng = generator()
    drawn = [draw_mixing((12, 20), rng, mixup_alpha=alpha) for _ in range(1500)]
    assert not any(each.cutmix for each in drawn)
    lams = np.sort([each.lam.item() for each in drawn])
    expected = np.sort(np.random.default_rng(0).beta(alpha, alpha, 200_000))
    distance = np.abs(np.searchsorted(expected, lams) / len(expected) - (np.arange(1500) + 0.5) / 1500).max()
    assert distance < 2.2 / 1500**0.5  # Kolmogorov-Smirnov, p = 1e-4


def test_lambda_of_cutmix_is_the_share_that_stays():
    rng = generator()
    drawn = [draw_mixing((12, 20), rng, cutmix_alpha=1.0) for _ in range(400)]
    assert all(each.cutmix for each in drawn)
    for each in drawn:
        stays = 1 - each.box.mask(12, 20, torch.device("cpu")).float().mean()
        torch.testing.assert_close(each.lam, stays)
    lams = torch.stack([each.lam for each in drawn])
    assert lams.min() < 0.2
    assert lams.max() > 0.99
    tops = torch.stack([each.box.top for each in drawn])
    assert len(tops.unique()) >= 10


def test_shares_of_mixed_batches_and_of_cutmix():
    rng = generator()
    drawn = [draw_mixing((12, 20), rng, 0.8, 1.0, mix_prob=0.6, switch_prob=0.3) for _ in range(1500)]
    cutmix = np.mean([each.cutmix.item() for each in drawn])
    mixed = np.mean([each.lam.item() < 1 for each in drawn if not each.cutmix])
    assert abs(cutmix - 0.3) < 4 * math.sqrt(0.21 / 1500)
    assert abs(mixed - 0.6) < 4 * math.sqrt(0.24 / 1050)
    images = torch.randn(5, 3, 12, 20, generator=rng)
    whole = next(each for each in drawn if each.lam == 1)
    assert torch.equal(mix(images, whole), images)


def test_a_batch_of_odd_size_keeps_its_middle():
    images = torch.randn(5, 3, 12, 20, generator=generator())
    empty = Box(*torch.zeros(4, dtype=torch.int64))
    results = mix(images, Mixing(torch.tensor(0.3), torch.tensor(False), empty))
    torch.testing.assert_close(results[2], images[2])
    torch.testing.assert_close(results[0], 0.3 * images[0] + 0.7 * images[4])


def test_drawing_is_repeatable_and_applying_draws_nothing():
    before = torch.get_rng_state()
    first, second = (draw_erasing((7, 3, 12, 20), generator(4), 0.5) for _ in range(2))
    assert all(torch.equal(*pair) for pair in zip(first.box, second.box, strict=True))
    assert torch.equal(first.picture, second.picture)
    assert torch.equal(first.noise, second.noise)
    one, two = (draw_mixing((12, 20), generator(4), 0.8, 1.0) for _ in range(2))
    assert torch.equal(one.lam, two.lam)
    images = torch.randn(7, 3, 12, 20, generator=generator())
    mix(erase(images, first), one)
    assert torch.equal(torch.get_rng_state(), before)
