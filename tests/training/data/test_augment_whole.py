"""The whole augmentation: its parts in order, its options, and what a batch depends on."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from visionpos.training.data.augment import Augment, Augmentation, Crops, normalize
from visionpos.training.data.augment.erase import erase
from visionpos.training.data.augment.mix import mix

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
FULL = Augmentation(
    crop_padding=3,
    flip=True,
    auto_augment="trivial",
    re_prob=0.5,
    mixup_alpha=0.8,
    cutmix_alpha=1.0,
    label_smoothing=0.1,
)
IMAGES = torch.randint(256, (40, 3, 12, 20), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
LABELS = torch.arange(40) % 7
ROWS = torch.tensor([3, 39, 0, 17, 3, 25, 8, 9])


def augment_of(options, images=IMAGES, device="cpu"):
    return Augment(images.to(device), LABELS.to(device), 7, MEAN, STD, options)


def seeded(seed=0, device="cpu"):
    return torch.Generator(device).manual_seed(seed)


def test_by_default_pictures_are_normalised_and_that_is_all():
    images, targets = augment_of(Augmentation())(ROWS, seeded())
    assert torch.equal(images, normalize(IMAGES[ROWS], MEAN, STD))
    assert torch.equal(targets, F.one_hot(LABELS[ROWS], 7).float())


def test_the_parts_in_their_order():
    augment = augment_of(FULL)
    drawn = augment.draw(len(ROWS), seeded())
    pictures = augment.policy(Crops(IMAGES, padding=3)(ROWS, drawn.crop), drawn.operations)
    expected = mix(erase(normalize(pictures, MEAN, STD), drawn.erasing), drawn.mixing)
    images, targets = augment(ROWS, seeded())
    assert images.shape == (8, 3, 12, 20)
    assert images.is_contiguous()
    assert torch.equal(images, expected)
    smooth = F.one_hot(LABELS[ROWS], 7) * 0.9 + 0.1 / 7
    torch.testing.assert_close(targets, drawn.mixing.lam * smooth + (1 - drawn.mixing.lam) * smooth.flip(0))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_without_mixing_the_loss_is_that_of_hard_labels(smoothing):
    logits = torch.randn(8, 7, generator=seeded())
    _, targets = augment_of(Augmentation(label_smoothing=smoothing))(ROWS, seeded())
    expected = F.cross_entropy(logits, LABELS[ROWS], label_smoothing=smoothing)
    torch.testing.assert_close(F.cross_entropy(logits, targets), expected)


def test_mixing_can_be_left_away_and_the_rest_is_the_same():
    augment = augment_of(FULL)
    plain = augment_of(dataclasses.replace(FULL, mixup_alpha=0.0, cutmix_alpha=0.0))
    for ours, expected in zip(augment(ROWS, seeded(), mixing=False), plain(ROWS, seeded()), strict=True):
        assert torch.equal(ours, expected)
    assert not torch.equal(augment(ROWS, seeded())[1], plain(ROWS, seeded())[1])


def test_a_batch_is_a_function_of_rows_and_generator():
    first, second = augment_of(FULL), augment_of(FULL)
    torch.manual_seed(0)
    state = torch.get_rng_state()
    one = first(ROWS, seeded(3))
    second(ROWS, seeded(8))
    two = second(ROWS, seeded(3))
    assert all(torch.equal(*pair) for pair in zip(one, two, strict=True))
    assert not torch.equal(one[0], first(ROWS, seeded(4))[0])
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first.labels, LABELS)


def test_equal_pictures_come_out_different():
    augment = augment_of(dataclasses.replace(FULL, mixup_alpha=0.0, cutmix_alpha=0.0))
    images, _ = augment(torch.zeros(200, dtype=torch.int64), seeded())
    assert len(images.unique(dim=0)) > 180


def test_one_channel_and_another_size():
    images = IMAGES[:, :1, :9, :7]
    augment = Augment(images, LABELS, 7, MEAN[:1], STD[:1], FULL)
    result, _ = augment(ROWS, seeded())
    assert result.shape == (8, 1, 9, 7)
    assert result.isfinite().all()


def test_the_draws_of_crops_do_not_depend_on_what_follows():
    plain = augment_of(Augmentation(crop_padding=3, flip=True)).draw(8, seeded()).crop
    assert all(torch.equal(*pair) for pair in zip(plain, augment_of(FULL).draw(8, seeded()).crop, strict=True))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"crop_padding": -1}, "crop_padding: -1 given; accepted: a number from 0"),
        ({"auto_augment": "trivail"}, "auto_augment: 'trivail' given; accepted: null, 'trivial', or"),
        ({"re_prob": 1.5}, "re_prob: 1.5 given; accepted: a number from 0 to 1"),
        ({"mixup_alpha": -0.1}, "mixup_alpha: -0.1 given; accepted: a number from 0"),
        ({"cutmix_alpha": float("nan")}, "cutmix_alpha: nan given; accepted: a number from 0"),
        ({"mix_prob": -0.2}, "mix_prob: -0.2 given"),
        ({"switch_prob": 2}, "switch_prob: 2 given"),
        ({"label_smoothing": 1.0}, "label_smoothing: 1.0 given; accepted: a number from 0 to below 1"),
    ],
)
def test_a_value_outside_its_range_is_one_clear_error(options, message):
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        Augmentation(**options)


def test_padding_must_fit_the_pictures():
    with pytest.raises(ValueError, match="padding 12 .* 12x20 picture"):
        augment_of(Augmentation(crop_padding=12))


@pytest.mark.unhooked
def test_compiled_without_a_break_it_does_the_same():
    augment = augment_of(FULL)
    drawn = augment.draw(len(ROWS), seeded())
    compiled = torch.compile(augment.apply, fullgraph=True, backend="aot_eager")
    for ours, expected in zip(compiled(ROWS, drawn), augment.apply(ROWS, drawn), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=0.04)  # a grey level is 0.02


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_cuda_nothing_waits_for_the_device():
    augment, rows, generator = augment_of(FULL, device="cuda"), ROWS.cuda(), seeded(device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        augment(rows, generator)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_cuda_gives_what_the_cpu_gives():
    drawn = augment_of(FULL).draw(len(ROWS), seeded())
    images, targets = augment_of(FULL).apply(ROWS, drawn)
    on_device = augment_of(FULL, device="cuda").apply(ROWS.cuda(), drawn)
    torch.testing.assert_close(on_device[1].cpu(), targets)
    wrong = (on_device[0].cpu() - images).abs() > 0.04
    assert wrong.float().mean() < 0.02  # a pixel that lies exactly between two may fall either way
