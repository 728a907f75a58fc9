"""Pictures: where they are looked for, what a missing file says, and how they are divided."""

from functools import partial
from http.server import HTTPServer, SimpleHTTPRequestHandler
from threading import Thread

import numpy as np
import pytest
import torch
from torchvision.datasets import CIFAR10, CIFAR100

from tests.training.data.tiny_data import error_of, pack_cifar, png, write_cifar, write_folder, write_tar
from visionpos.training.data.datasets import Pictures, load_pictures
from visionpos.training.data.subsets import holdout, subset
from visionpos.training.errors import DataError


@pytest.mark.parametrize("place", ["cifar10", "cifar10.tar.xz", "cifar10.tar.gz", "cifar10.tar", "."])
def test_named_data_are_found_under_the_root(tmp_path, place):
    pixels = np.zeros((4, 6, 3), np.uint8)
    content = {f"{split}/class {n}/0.png": png(pixels + n) for split in ("train", "test") for n in range(10)}
    write_tar(tmp_path / place, content, "cifar10/") if ".tar" in place else write_folder(tmp_path / place, content)
    pictures = load_pictures("cifar10", "train", root=tmp_path)
    assert pictures.images[:, 0, 0, 0].tolist() == pictures.labels.tolist() == list(range(10))


def test_resizing(tmp_path):
    content = {
        "train/a/0.png": png(np.full((8, 12, 3), 9, np.uint8)),
        "train/a/1.png": png(np.zeros((9, 5, 3), np.uint8)),
    }
    path = write_folder(tmp_path, content)
    pictures = load_pictures(path, "train", size=(4, 6))
    assert pictures.images.shape == (2, 3, 4, 6)
    assert pictures.images[0].unique().tolist() == [9]
    assert "9 x 5 but the first one 8 x 12" in error_of(path, "train")
    assert "picture 1" in error_of(path, "train")
    assert "size must be (height, width)" in error_of(path, "train", size=(0, 4))


@pytest.mark.parametrize(("kind", "name"), [(CIFAR10, "cifar10"), (CIFAR100, "cifar100")])
def test_missing_data_say_where_to_put_what(tmp_path, kind, name):
    line = error_of(name, "train", root=tmp_path / "nowhere")
    for part in (
        name,
        str(tmp_path / "nowhere"),
        kind.filename,
        kind.tgz_md5,
        kind.url,
        "position tasks",
        "no download",
    ):
        assert part in line
    assert "neither cifar10 nor cifar100" in error_of(tmp_path / "nothing", "train")
    assert "unknown split 'valid'" in error_of(name, "valid")


def test_a_failed_download_ends_in_the_same_line(tmp_path, monkeypatch):
    monkeypatch.setattr(CIFAR10, "url", "http://127.0.0.1:9/cifar-10-python.tar.gz")
    line = error_of("cifar10", "train", root=tmp_path / "new", download=True)
    assert line.startswith("download of http://127.0.0.1:9/cifar-10-python.tar.gz failed")
    assert CIFAR10.tgz_md5 in line
    assert "position tasks" in line
    assert "data.download" not in line, "it was tried"
    assert list((tmp_path / "new").iterdir()) == [], "nothing half done is left"


def test_a_download_is_loaded(tmp_path, monkeypatch):
    kind, host = CIFAR10, tmp_path / "host"
    classes = write_cifar(tmp_path, kind, monkeypatch)
    pack_cifar(tmp_path, kind, host, monkeypatch)
    with HTTPServer(("127.0.0.1", 0), partial(SimpleHTTPRequestHandler, directory=host)) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr(kind, "url", f"http://127.0.0.1:{server.server_port}/{kind.filename}")
        pictures = load_pictures("cifar10", "test", root=tmp_path / "new", download=True)
        server.shutdown()
    assert pictures.classes == classes
    assert {entry.name for entry in (tmp_path / "new").glob("[!.]*")} == {kind.filename}


def random_pictures(counts, seed=0):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    labels = labels[torch.randperm(len(labels), generator=generator)]
    images = torch.randint(256, (len(labels), 3, 4, 6), dtype=torch.uint8, generator=generator)
    return Pictures(images, labels, tuple(map(str, range(len(counts)))))


def test_mean_and_std_are_exact():
    pictures = random_pictures([50, 70])
    pictures.images[:, 1] = 255
    mean, std = pictures.mean_std()
    exact = pictures.images.double() / 255
    torch.testing.assert_close(torch.tensor(mean).double(), exact.mean((0, 2, 3)), rtol=1e-6, atol=0)
    assert mean == pytest.approx(exact.mean((0, 2, 3)).tolist(), rel=1e-13)
    assert std == pytest.approx(exact.std((0, 2, 3), correction=0).tolist(), rel=1e-12)
    assert (mean[1], std[1]) == (1.0, 0.0)


def test_to_moves_all():
    moved = random_pictures([2, 3]).to("meta")
    assert moved.images.device.type == moved.labels.device.type == "meta"
    assert moved.classes == ("0", "1")


def test_subset_is_balanced_nested_and_repeatable():
    pictures = random_pictures([30, 20, 25])
    small, large = subset(pictures, 5, seed=1), subset(pictures, 15, seed=1)
    assert torch.bincount(small.labels).tolist() == [5] * 3
    assert torch.bincount(large.labels).tolist() == [15] * 3
    rows = [{tuple(image.flatten().tolist()) for image in each.images} for each in (small, large, pictures)]
    assert rows[0] < rows[1] < rows[2]
    assert torch.equal(subset(pictures, 5, seed=1).images, small.images)
    assert not torch.equal(subset(pictures, 5, seed=2).images, small.images)
    for wrong in (0, 21):
        with pytest.raises(DataError, match=f"per_class must be in 1 .. 20, .* got {wrong}"):
            subset(pictures, wrong, seed=0)


@pytest.mark.parametrize(("counts", "count"), [([50] * 4, 20), ([30, 20, 25], 10), ([7, 100, 1], 33), ([5, 5], 9)])
def test_holdout_is_stratified_and_loses_nothing(counts, count):
    pictures = random_pictures(counts)
    rest, held = holdout(pictures, count, seed=3)
    assert len(held) == count
    assert len(rest) == sum(counts) - count
    share = torch.bincount(held.labels, minlength=len(counts)) - torch.tensor(counts) * count / sum(counts)
    assert share.abs().max() < 1
    both = torch.cat([rest.images, held.images]).flatten(1)
    assert torch.equal(both.unique(dim=0), pictures.images.flatten(1).unique(dim=0))
    assert torch.equal(holdout(pictures, count, seed=3)[1].images, held.images)
    assert not torch.equal(holdout(pictures, count, seed=4)[0].images, rest.images)


def test_holdout_leaves_something_on_both_sides():
    for wrong in (0, 10, 11):
        with pytest.raises(DataError, match=f"cannot hold out {wrong} of 10"):
            holdout(random_pictures([5, 5]), wrong, seed=0)
