"""Own pictures: a flat folder of mixed sizes, sets larger than memory, answers by name; end to end."""

import csv
import io
import json

import numpy as np
import pytest
import torch
from PIL import Image

from tests.training.tiny_run import config
from train.evaluate import command as evaluate_command
from train.predict import command as predict_command
from visionpos.training.config.command_line import parse
from visionpos.training.data.folders import Listed, is_flat, list_folder, split_files
from visionpos.training.errors import ConfigError, DataError, run_command
from visionpos.training.run.classification import train
from visionpos.training.run.distributed import Distributed
from visionpos.training.run.evaluation import by_class, confusion_matrix, evaluate
from visionpos.training.run.listed import listed_pictures, resident_bytes
from visionpos.training.run.loader import LoaderSource
from visionpos.training.run.source import PictureSource, open_source

CPU = torch.device("cpu")
RUN = """
model: {name: vit_tiny_patch16_224, options: {patch_size: 4, embed_dim: 16, depth: 2, num_heads: 2}}
data: {name: FOLDER, size: [8, 12], workers: 0}
recipe: {epochs: 2, batch_size: 8, ema_decay: 0.9, lr: 5e-3, flip: true}
encoding: learned
device: cpu
"""
CLASSES = ("blue", "green", "red")


def write_photos(folder, count=10, classes=CLASSES):
    """A flat folder: pictures of one colour each and of many sizes, wide and high."""
    rng = np.random.default_rng(0)
    for label, name in enumerate(classes):
        (folder / name).mkdir(parents=True)
        for index in range(count):
            pixels = rng.integers(0, 60, (int(rng.integers(9, 40)), int(rng.integers(9, 40)), 3)).astype(np.uint8)
            pixels[..., 2 - label % 3] += 150
            Image.fromarray(pixels).save(folder / name / f"{index}.png")
    (folder / ".hidden").mkdir()
    (folder / "readme.txt").write_text("not a picture")
    return folder


def photo_config(folder, *flags, count=10):
    if not (folder / "photos").exists():
        write_photos(folder / "photos", count)
    return config(folder, RUN.replace("FOLDER", str(folder / "photos")), *flags)


def open_photos(folder, *flags):
    made = photo_config(folder, *flags)
    return open_source(made.data, made.recipe, made.seed, Distributed(CPU))


@pytest.mark.parametrize("way", [[], ["--data.memory", "0"], ["--recipe.crop_scale", "[0.5, 1]"]], ids=str)
def test_a_flat_folder_of_mixed_sizes_is_learned_evaluated_and_its_split_recorded(way, tmp_path, capsys):
    flags = ["--data.test_fraction", "0.3", "--data.crop_pct", "0.9", "--recipe.epochs", "8", *way]
    result = train(photo_config(tmp_path, *flags))
    assert result["data"]["classes"] == list(CLASSES)
    assert (result["data"]["train_size"], result["data"]["test_size"]) == (21, 9)
    assert result["data"]["resident"] == (not way)
    assert result["final"]["test"] > 0.8
    split = json.loads((tmp_path / "run" / "split.json").read_text())
    assert len(split["train"]) == 21
    assert {name.split("/")[0] for name in split["test"]} == set(CLASSES)
    assert not set(split["train"]) & set(split["test"])
    report = evaluate(tmp_path / "run", [(16, 12)])
    assert report["rows"][0]["accuracy"] == result["final"]["test"]
    assert report["classes"] == list(CLASSES)
    assert [sum(row) for row in report["confusion"]] == [3, 3, 3]
    next((tmp_path / "photos" / "red").iterdir()).unlink()
    with pytest.raises(ConfigError, match=r"pictures have come or gone since the run began, see .*split.json"):
        evaluate(tmp_path / "run", [])
    capsys.readouterr()


def test_the_split_is_by_class_seed_and_fraction_and_not_by_place():
    files = [f"{n}.png" for n in range(20)]

    def listed(folder):
        from pathlib import Path

        return Listed(("a", "b"), [Path(folder) / name for name in files * 2], [0] * 20 + [1] * 20)

    first, moved = split_files(listed("here"), 0.25, 3), split_files(listed("there"), 0.25, 3)
    assert [file.name for file in first["test"].files] == [file.name for file in moved["test"].files]
    assert first["test"].labels == [0] * 5 + [1] * 5
    assert len(first["train"].files) == 30
    assert split_files(listed("here"), 0.25, 4)["test"].files != first["test"].files
    assert split_files(listed("here"), 0.01, 3)["test"].labels == [0, 1], "at least one of each class"
    with pytest.raises(DataError, match="class 'a' has 1 pictures"):
        split_files(listed("here").take([0, 20, 21]), 0.5, 0)


def test_what_is_flat_and_what_has_splits_of_its_own(tmp_path):
    write_photos(tmp_path / "photos", count=2)
    assert is_flat(tmp_path / "photos")
    (tmp_path / "split").mkdir()
    for name in ("train", "val"):
        write_photos(tmp_path / "split" / name, count=2)
    assert not is_flat(tmp_path / "split")
    assert not is_flat(tmp_path)
    both = list_folder(tmp_path / "split", None, 0)
    assert len(both["train"].files) == len(both["test"].files) == 6
    made = photo_config(tmp_path, "--data.name", str(tmp_path / "split"), "--data.test_fraction", "0.5")
    with pytest.raises(DataError, match="nothing to split off"):
        open_source(made.data, made.recipe, 0, Distributed(CPU))


def test_the_limit_of_memory_is_measured_and_switches_by_itself(tmp_path):
    made = photo_config(tmp_path, "--recipe.crop_padding", "2")
    source = open_source(made.data, made.recipe, 0, Distributed(CPU))
    held = source.augment.crops.stretches.untyped_storage().nbytes() + source.test.images.nbytes
    assert resident_bytes(made.data, made.recipe, listed_pictures(made.data)) == held
    for limit, kind in ((held, PictureSource), (held - 1, LoaderSource)):
        assert type(open_photos(tmp_path, "--recipe.crop_padding", "2", "--data.memory", str(limit / 2**30))) is kind


def test_a_loader_gives_the_pictures_that_memory_would(tmp_path):
    """The same pictures in every step, as they are when all are resident; evaluation is the same, too."""
    plain = ["--recipe.flip", "false", "--data.mean", "[0.5, 0.4, 0.3]", "--data.std", "[0.2, 0.3, 0.4]"]
    resident, lazy = open_photos(tmp_path, *plain), open_photos(tmp_path, *plain, "--data.memory", "0")
    assert lazy.steps_per_epoch == resident.steps_per_epoch == 3
    (ours, labels), (theirs, wanted) = (next(iter(source.evaluation("test"))) for source in (lazy, resident))
    assert torch.equal(labels, wanted)
    assert (ours - theirs).abs().max() < 1.5 / 255 / 0.2
    for step in (4, 1):
        (ours, labels), (theirs, wanted) = lazy.batch(step), resident.batch(step)
        assert torch.equal(labels, wanted)
        assert (ours - theirs).abs().max() < 1.5 / 255 / 0.2
    seen = torch.cat([lazy.batch(step)[0] for step in range(3)])
    known, _ = resident.augment(torch.arange(24), resident.generator)
    nearest = torch.cdist(seen.flatten(1), known.flatten(1)).argmin(1)
    assert sorted(nearest.tolist()) == list(range(24))


@pytest.mark.parametrize("workers", ["0", "2"])
def test_a_batch_of_a_loader_is_a_function_of_seed_and_step(workers, tmp_path):
    flags = ["--data.memory", "0", "--data.workers", workers, "--recipe.crop_scale", "[0.3, 1]"]
    first = open_photos(tmp_path, *flags)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    batches = [first.batch(step)[0] for step in range(5)]
    assert torch.equal(torch.get_rng_state(), before)
    again = open_photos(tmp_path, *flags)
    assert torch.equal(again.batch(4)[0], batches[4]), "in the middle of the second epoch"
    alone = open_photos(tmp_path, *flags, "--data.workers", "1")
    assert torch.equal(alone.batch(4)[0], batches[4]), "whatever the number of workers"
    assert not torch.equal(batches[0], batches[3]), "a new order in every epoch"
    assert not torch.equal(open_photos(tmp_path, *flags, "--seed", "1").batch(0)[0], batches[0])


def test_a_named_set_of_timm(tmp_path, capsys):
    for split in ("train", "validation"):
        write_photos(tmp_path / "root" / split, count=6)
        (tmp_path / "root" / split / ".hidden").rmdir()
        (tmp_path / "root" / split / "readme.txt").unlink()
    flags = ["--data.name", "torch/image_folder", "--data.root", str(tmp_path / "root"), "--recipe.epochs", "1"]
    result = train(photo_config(tmp_path, *flags))
    assert (result["data"]["train_size"], result["data"]["test_size"]) == (18, 18)
    assert result["data"]["classes"] == list(CLASSES)
    assert evaluate(tmp_path / "run", [])["rows"][0]["accuracy"] == result["final"]["test"]
    capsys.readouterr()
    missing = photo_config(tmp_path, "--data.name", "torch/image_folder", "--data.root", str(tmp_path / "nowhere"))
    assert run_command(lambda: train(missing)) == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (["--data.test_fraction", "1"], "data.test_fraction: 1.0 given; accepted: a number above 0, below 1"),
        (["--recipe.crop_scale", "[0.5, 0.2]"], "recipe.crop_scale: (0.5, 0.2) given; accepted: two numbers"),
        (["--data.splits", "[a, b]"], "data.splits: ('a', 'b') given for '.*photos'; accepted for timm's names alone"),
        (
            ["--data.name", "torch/cifar10", "--data.memory", "1"],
            "data.memory: 1.0 given for 'torch/cifar10'; accepted",
        ),
        (["--data.mean", "[0.5, 0.5, 2]"], "data.mean: (0.5, 0.5, 2.0) given; accepted: three numbers from 0 to 1"),
    ],
)
def test_a_mistake_is_one_line(flags, line, tmp_path):
    import re

    with pytest.raises(ConfigError, match=re.escape(line).replace("\\.\\*", ".*")):
        photo_config(tmp_path, *flags)


def test_predictions_have_names_and_probabilities_as_json_and_csv(tmp_path, capsys):
    train(photo_config(tmp_path, "--data.crop_pct", "0.9", "--recipe.epochs", "10"))
    run = str(tmp_path / "run")
    Image.new("RGB", (50, 31), (0, 200, 30)).save(tmp_path / "new.jpg")
    Image.new("RGB", (13, 70), (210, 30, 0)).save(tmp_path / "other one.png")
    files = [str(tmp_path / "new.jpg"), str(tmp_path / "other one.png")]
    capsys.readouterr()
    predict_command([run, *files, "--top", "2"])
    found = json.loads(capsys.readouterr().out)
    assert [(each["file"], each["class"]) for each in found] == list(zip(files, ["green", "red"], strict=True))
    assert all(len(each["probabilities"]) == 2 for each in found)
    predict_command([run, *files, "--format", "csv"])
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert [row["class"] for row in rows] == ["green", "red"]
    for row, each in zip(rows, found, strict=True):
        assert sum(float(row[name]) for name in CLASSES) == pytest.approx(1)
        assert float(row["probability"]) == pytest.approx(each["probability"])
    (tmp_path / "text.jpg").write_text("no picture")
    for argv in ([run, str(tmp_path / "text.jpg")], [run, str(tmp_path / "gone.jpg")], ["nowhere", files[0]]):
        assert run_command(lambda argv=argv: predict_command(argv)) == 2
        assert capsys.readouterr().err.count("\n") == 1


def test_predictions_are_those_of_the_evaluation(tmp_path, capsys):
    train(photo_config(tmp_path, "--recipe.epochs", "1"))
    split = json.loads((tmp_path / "run" / "split.json").read_text())["test"]
    report = evaluate(tmp_path / "run", [])
    capsys.readouterr()
    predict_command([str(tmp_path / "run"), *(str(tmp_path / "photos" / name) for name in split)])
    found = [each["class"] for each in json.loads(capsys.readouterr().out)]
    right = sum(name.split("/")[0] == each for name, each in zip(split, found, strict=True)) / len(split)
    assert right == pytest.approx(report["rows"][0]["accuracy"])


def test_a_report_of_classes(tmp_path, capsys):
    labels, given = torch.tensor([0, 0, 0, 1, 1, 3]), torch.tensor([0, 1, 1, 1, 1, 0])
    matrix = confusion_matrix(given, labels, 4)
    assert matrix.tolist() == [[1, 2, 0, 0], [0, 2, 0, 0], [0, 0, 0, 0], [1, 0, 0, 0]]
    assert by_class(matrix, None) == {
        "classes": ["0", "1", "2", "3"],
        "class_accuracy": [1 / 3, 1.0, None, 0.0],
        "confusion": matrix.tolist(),
    }
    write_photos(tmp_path / "photos", 4, classes=("a", "b", "c", "d", "e", "f"))
    train(photo_config(tmp_path, "--recipe.epochs", "1"))
    report = evaluate(tmp_path / "run", [])
    assert report["rows"][0]["accuracy"] <= report["rows"][0]["top5"] <= 1
    capsys.readouterr()
    evaluate_command([str(tmp_path / "run")])
    printed = capsys.readouterr().out
    assert "(top 5 " in printed
    assert "| class | pictures | accuracy | most often taken for |" in printed


def test_the_command_line_of_a_first_try(tmp_path):
    write_photos(tmp_path / "photos", count=4)
    made = parse(["--config", "configs/run/finetune_pretrained.yaml", "--data.name", str(tmp_path / "photos")])
    assert made.data.is_named is False
    assert made.init == "vit_tiny_patch16_224.augreg_in21k_ft_in1k"
