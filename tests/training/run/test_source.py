"""Batches: a function of (seed, step) alone."""

import weakref

import pytest
import torch

from tests.training.tiny_run import picture_config, task_config
from visionpos.training.config.schema import Data
from visionpos.training.data.datasets import Pictures
from visionpos.training.errors import ConfigError
from visionpos.training.run.distributed import Distributed
from visionpos.training.run.source import (
    PictureSource,
    copies_note,
    open_source,
    picture_batches,
    stream,
    training_pictures,
)

CPU = torch.device("cpu")


def source_of(config):
    return open_source(config.data, config.recipe, config.seed, Distributed(CPU))


@pytest.mark.parametrize("make", [task_config, picture_config])
def test_a_batch_is_a_function_of_seed_and_step(make, tmp_path):
    first, again = source_of(make(tmp_path)), source_of(make(tmp_path))
    batches = [first.batch(step) for step in range(7)]
    torch.manual_seed(99)
    for step in (6, 2, 5, 2):
        images, labels = again.batch(step)
        assert torch.equal(images, batches[step][0])
        assert torch.equal(labels, batches[step][1])
    other = source_of(make(tmp_path, "--seed", "1")).batch(2)
    assert not torch.equal(other[0], batches[2][0])


@pytest.mark.parametrize("make", [task_config, picture_config])
def test_batches_leave_the_global_generator_alone(make, tmp_path):
    source = source_of(make(tmp_path))
    torch.manual_seed(0)
    before = torch.get_rng_state()
    source.batch(0)
    list(source.evaluation(source.splits[0]))
    assert torch.equal(torch.get_rng_state(), before)


def test_an_epoch_shows_every_picture_at_most_once_in_an_order_of_its_own(tmp_path):
    source = source_of(picture_config(tmp_path, "--recipe.crop_padding", "0", "--recipe.flip", "false"))
    assert source.steps_per_epoch == 30 // 8
    epochs = []
    for epoch in range(2):
        images = torch.cat([source.batch(epoch * 3 + index)[0] for index in range(3)])
        assert len(torch.unique(images.flatten(1), dim=0)) == 24
        epochs.append(images)
    assert not torch.equal(*epochs)


def test_every_step_draws_crops_and_flips_of_its_own(tmp_path):
    source = source_of(picture_config(tmp_path))
    seeds = []
    for step in range(4):
        source.batch(step)
        seeds.append(source.generator.initial_seed())
    assert len(set(seeds)) == 4


def test_pictures_are_normalised_by_the_training_pictures_and_labels_stay_with_them(tmp_path):
    source = source_of(picture_config(tmp_path))
    images, targets = source.batch(0)
    labels = targets.argmax(1)
    assert images.shape == (8, 3, 8, 12)
    assert torch.allclose(targets.sum(1), torch.ones(8))
    assert torch.allclose(targets.amax(1), torch.full((8,), 0.9 + 0.1 / 3))  # smoothed
    assert images.dtype == torch.float32
    brightness = images.mean((1, 2, 3))
    assert brightness[labels == 0].max() < brightness[labels == 1].min() < brightness[labels == 2].min()
    ((tested, answers),) = source.evaluation("test")
    assert tested.shape == (9, 3, 8, 12)
    assert answers.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]


def test_parts_of_a_task(tmp_path):
    source = source_of(task_config(tmp_path))
    assert source.splits == ("inside", "outside", "whole")
    assert source_of(task_config(tmp_path, "--data.holdout", "none")).splits == ("inside",)
    images, _ = next(iter(source.evaluation("outside")))
    marks = images[:, :2].amax((1, 2)) > 0.99  # columns with a mark, about
    assert marks[:, 8:].float().mean() > 2 * marks[:, :8].float().mean()
    twice = [torch.cat([labels for _, labels in source.evaluation("whole")]) for _ in range(2)]
    assert len(twice[0]) == source.metadata["test_size"]
    assert torch.equal(*twice)


def test_validation_pictures_come_from_the_training_pictures(tmp_path):
    plain = "--recipe.crop_padding", "0", "--recipe.flip", "false"
    source = source_of(picture_config(tmp_path, "--data.validation", "6", "--data.per_class", "7", *plain))
    assert source.splits == ("validation",)
    assert source.metadata["train_size"] == 21
    assert source.metadata["test_size"] == 6
    trained, _ = source.augment(torch.arange(21), source.generator)
    ((held, _),) = source.evaluation("validation")
    trained, held = ({image.numpy().tobytes() for image in images} for images in (trained, held))
    assert (len(trained), len(held)) == (21, 6)
    assert not held & trained


def test_training_pictures_are_in_memory_once(tmp_path):
    config = picture_config(tmp_path)
    pictures, others = training_pictures(config.data)
    original = weakref.ref(pictures.images)
    source = PictureSource(pictures, others, "test", config.recipe, 0, CPU)
    del pictures
    assert original() is None
    assert source.batch(0)[0].shape == (8, 3, 8, 12)


def test_mistakes_that_only_the_data_show(tmp_path):
    with pytest.raises(ConfigError, match=r"recipe.batch_size: 31 given; accepted: at most the 30 pictures"):
        source_of(picture_config(tmp_path, "--recipe.batch_size", "31"))
    with pytest.raises(ConfigError, match="data: .*grid"):
        source_of(task_config(tmp_path, "--data.grid", "[6, 2]"))


def test_streams_differ():
    keys = [("order", 0, 0), ("order", 0, 1), ("order", 1, 0), ("augmentation", 0, 0), ("order", 0, 10), ("order", 1)]
    assert len({stream(*key) for key in keys}) == len(keys)
    assert stream("order", 3, 4) == 56013430869802107  # alike on every machine, in every process


@pytest.mark.parametrize(("count", "sizes"), [(5000, {500}), (512, {512}), (513, {257, 256}), (30, {30}), (1, {1})])
def test_evaluation_batches_are_of_one_size_and_in_order(count, sizes):
    images = torch.arange(count, dtype=torch.uint8).view(-1, 1, 1, 1)
    pictures = Pictures(images, torch.arange(count), ("a",))
    batches = [labels for _, labels in picture_batches(pictures, [0.5], [0.25])]
    assert {len(labels) for labels in batches} == sizes
    assert torch.equal(torch.cat(batches), pictures.labels)


def test_only_cifar_without_its_original_files_is_said_to_be_a_copy(tmp_path):
    assert "copies" in copies_note(Data("cifar10", root=str(tmp_path)))
    assert "archives of cifar100 " in copies_note(Data("cifar100", root=str(tmp_path)))
    assert copies_note(Data("photographs", root=str(tmp_path))) == ""
    (tmp_path / "cifar10" / "cifar-10-batches-py").mkdir(parents=True)
    assert copies_note(Data("cifar10", root=str(tmp_path))) == ""
    (tmp_path / "cifar-100-python.tar.gz").touch()
    assert copies_note(Data("cifar100", root=str(tmp_path))) == ""
