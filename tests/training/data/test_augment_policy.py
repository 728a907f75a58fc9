"""TrivialAugment and RandAugment: each picture against torchvision, one at a time; and the law of the draws."""

import math

import pytest
import torch
import torchvision.transforms as v1
from torchvision.transforms import v2
from torchvision.transforms.functional import _get_inverse_affine_matrix
from torchvision.transforms.v2 import functional as TF

from visionpos.training.data.augment.policy import BLENDS, MOVES, OPERATIONS, Operations, Policy

NAMES = ["trivial", "rand(1, 9)"]
SHAPES = [(3, 12, 20), (3, 17, 9), (1, 12, 20)]


def random_images(*shape):
    return torch.randint(256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def space(name, shape):
    """torchvision's own magnitudes: operation to (magnitudes, whether it has a sign)."""
    if name == "trivial":
        return v1.TrivialAugmentWide()._augmentation_space(31)
    return v1.RandAugment()._augmentation_space(31, shape[1:])


def strength(name, shape, operation, level):
    """The number that torchvision would hand to the operation."""
    magnitudes, signed = space(name, shape)[operation]
    magnitude = magnitudes[level % 31].item() if magnitudes.ndim else 0.0
    return -magnitude if signed and level >= 31 else magnitude


def by_torchvision(image, operation, magnitude):
    """torchvision's operations for tensors, with the magnitudes of its first transforms (255 levels in solarize)."""
    if operation == "Solarize":
        return TF.solarize(image, magnitude)
    return v2.TrivialAugmentWide()._apply_image_or_video_transform(
        image, operation, magnitude, interpolation=v2.InterpolationMode.NEAREST, fill={}
    )


def undecided(operation, magnitude, shape):
    """(H, W) bool: where the source of a moved pixel lies on the line between two pixels, and rounding decides."""
    height, width = shape[1:]
    if operation not in MOVES:
        return torch.zeros(height, width, dtype=torch.bool)
    slope = math.degrees(math.atan(magnitude))
    shear = {"ShearX": [slope, 0.0], "ShearY": [0.0, slope]}.get(operation, [0.0, 0.0])
    shift = {"TranslateX": [int(magnitude), 0], "TranslateY": [0, int(magnitude)]}.get(operation, [0, 0])
    angle = -magnitude if operation == "Rotate" else 0.0
    centre = [-width / 2, -height / 2] if operation.startswith("Shear") else [0.0, 0.0]
    matrix = torch.tensor(_get_inverse_affine_matrix(centre, angle, shift, 1.0, shear), dtype=torch.float64).view(2, 3)
    rows, columns = torch.arange(height) - height / 2 + 0.5, torch.arange(width) - width / 2 + 0.5
    y, x = torch.meshgrid(rows.double(), columns.double(), indexing="ij")
    source = torch.stack([x, y, torch.ones_like(x)], -1) @ matrix.T + torch.tensor([width / 2, height / 2])
    return ((source - source.round()).abs() < 1e-4).any(-1)


def all_levels(policy, images):
    """Each picture through each of the 14 operations at each of the 62 levels: (62, 14, N, C, H, W)."""
    count = len(images)
    slot = torch.arange(len(OPERATIONS) * count)
    every = images.repeat(len(OPERATIONS), 1, 1, 1)
    results = [policy(every, Operations(slot[None], torch.full_like(slot, level)[None])) for level in range(62)]
    return torch.stack(results).unflatten(1, (len(OPERATIONS), count))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", NAMES)
def test_every_operation_at_every_level_is_torchvisions(name, shape):
    images = random_images(2, *shape)
    images[1] = images[1] // 3 + 40  # of low contrast
    results = all_levels(Policy(name, shape), images)
    for level in range(62):
        for operation, result in zip(OPERATIONS, results[level], strict=True):
            magnitude = strength(name, shape, operation, level)
            wrong = (result != by_torchvision(images, operation, magnitude)).any(0).any(0)
            assert not (wrong & ~undecided(operation, magnitude, shape)).any(), (operation, level)
            assert wrong.float().mean() < 0.1, (operation, level)


@pytest.mark.parametrize("name", NAMES)
def test_one_picture_at_a_time_and_as_a_pil_image(name):
    """PIL rounds where tensors are cut off: a grey level apart in blends and autocontrast, elsewhere nothing."""
    shape = (3, 12, 20)
    image = random_images(1, *shape)
    results = all_levels(Policy(name, shape), image)
    for level in (0, 4, 11, 30, 35, 61):
        for operation, result in zip(OPERATIONS, results[level], strict=True):
            magnitude = strength(name, shape, operation, level)
            alone = by_torchvision(image[0], operation, magnitude)
            pil = TF.pil_to_tensor(by_torchvision(TF.to_pil_image(image[0]), operation, magnitude))
            if operation not in MOVES:
                assert torch.equal(result[0], alone), (operation, level)
            difference = (result[0].int() - pil.int()).abs().amax(0)
            difference[undecided(operation, magnitude, shape)] = 0
            assert difference.max() <= (1 if operation in (*BLENDS, "AutoContrast") else 0), (operation, level)


def test_chunks_give_each_picture_what_was_drawn_for_it():
    """A batch that 14 does not divide, against the same operations one picture at a time."""
    shape, count = (3, 12, 20), 45
    images, policy = random_images(count, *shape), Policy("trivial", shape)
    drawn = policy.draw(count, torch.Generator().manual_seed(0))
    results = policy(images, drawn)
    assert results.dtype == torch.uint8
    for image, result, slot, level in zip(images, results, drawn.slot[0], drawn.level[0], strict=True):
        operation = OPERATIONS[slot // 4]  # 45 pictures in 14 chunks of 4
        magnitude = strength("trivial", shape, operation, level.item())
        wrong = (result != by_torchvision(image, operation, magnitude)).any(0)
        assert not (wrong & ~undecided(operation, magnitude, shape)).any(), operation


def test_randaugment_goes_through_its_operations_one_after_the_other():
    shape = (3, 12, 20)
    images, twice, once = random_images(30, *shape), Policy("rand(2, 9)", shape), Policy("rand(1, 9)", shape)
    drawn = twice.draw(30, torch.Generator().manual_seed(0))
    assert not torch.equal(drawn.slot[0], drawn.slot[1])
    first = once(images, Operations(drawn.slot[:1], drawn.level[:1]))
    assert torch.equal(twice(images, drawn), once(first, Operations(drawn.slot[1:], drawn.level[1:])))


@pytest.mark.parametrize("batch_size", [1, 5, 14, 45])
def test_operations_magnitudes_and_signs_are_uniform(batch_size):
    policy, generator = Policy("trivial", (3, 12, 20)), torch.Generator().manual_seed(0)
    rounds = 14_000 // batch_size
    chunk = -(-batch_size // 14)
    slots, levels = zip(*(policy.draw(batch_size, generator) for _ in range(rounds)), strict=True)
    assert all(len(slot.unique()) == batch_size for slot in slots)
    first, last = (torch.stack([slot[0, place] for slot in slots]) // chunk for place in (0, -1))
    for operation in (first, last, torch.cat(slots, 1)[0] // chunk):
        counts = torch.bincount(operation, minlength=14).double()
        expected = len(operation) / 14
        assert len(counts) == 14
        assert ((counts - expected) ** 2 / expected).sum() < 45  # chi-square, 13 degrees of freedom, p = 2e-5
    counts = torch.bincount(torch.cat(levels, 1)[0], minlength=62).double()
    expected = batch_size * rounds / 62
    assert len(counts) == 62
    assert ((counts - expected) ** 2 / expected).sum() < 115  # 61 degrees of freedom, p = 3e-5


def test_randaugment_draws_signs_alone():
    slot, level = Policy("rand(3, 7)", (3, 12, 20)).draw(200, torch.Generator().manual_seed(0))
    assert slot.shape == level.shape == (3, 200)
    assert level.unique().tolist() == [7, 38]


def test_equal_pictures_come_out_different():
    """A call that draws once for the whole batch would give one or two."""
    images = random_images(1, 3, 16, 24).expand(256, -1, -1, -1)
    policy = Policy("trivial", (3, 16, 24))
    results = policy(images, policy.draw(256, torch.Generator().manual_seed(0)))
    assert len(results.unique(dim=0)) > 130


@pytest.mark.parametrize("name", ["trivail", "rand", "rand(0, 9)", "rand(2, 31)", "rand(2)", "rand-m9-n2"])
def test_an_unknown_policy_is_one_clear_error(name):
    with pytest.raises(ValueError, match=r"auto_augment: '.*' given; accepted: null, 'trivial', or 'rand\(n, m\)'"):
        Policy(name, (3, 8, 12))


def test_only_grey_and_rgb_pictures():
    with pytest.raises(ValueError, match="1 or 3 channels, got 4"):
        Policy("trivial", (4, 8, 12))
