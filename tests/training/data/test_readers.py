"""Readers: every form gives the same tensors, and everything wrong ends in one line."""

import sys
import tarfile
from contextlib import suppress

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision.datasets import CIFAR10

from tests.training.data.tiny_data import (
    CLASSES,
    HEIGHT,
    WIDTH,
    assert_tiny,
    error_of,
    files,
    pack_cifar,
    png,
    write_cifar,
    write_folder,
    write_parquet,
    write_tar,
)
from visionpos.training.data.datasets import load_pictures
from visionpos.training.data.readers import CIFAR
from visionpos.training.errors import DataError

# Every form gives the same tensors.


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("test", ["test", "val"])
def test_class_folders(tmp_path, split, test):
    content = {**files(test), "train/.hidden/x.png": b"", "train/ant/.DS_Store": b"", "train/notes.txt": b"", "a": b""}
    assert_tiny(load_pictures(write_folder(tmp_path, content), split), split)


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("suffix", [".tar.xz", ".tar.gz", ".tgz", ".tar"])
@pytest.mark.parametrize("top", ["", "./", "things/"])
def test_archives(tmp_path, split, suffix, top):
    path = write_tar(tmp_path / f"things{suffix}", files(), top, name=f"{top}train", type=tarfile.DIRTYPE)
    assert_tiny(load_pictures(str(path), split), split)
    assert {entry.name for entry in tmp_path.iterdir()} <= {path.name, f".{path.name}-{split}.safetensors"}, (
        "not unpacked"
    )


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("columns", [("img", "label"), ("image", "labels"), ("img", "fine_label")])
def test_parquet(tmp_path, split, columns):
    assert_tiny(load_pictures(write_parquet(tmp_path / "x", CLASSES, *columns), split), split)
    assert_tiny(load_pictures(write_parquet(tmp_path / "y" / "data", CLASSES, *columns).parent, split), split)


def test_parquet_classes_are_sorted_names_or_numbers(tmp_path):
    pictures = load_pictures(write_parquet(tmp_path / "names", ("cow", "bee", "ant")), "test")
    assert pictures.classes == CLASSES
    assert pictures.labels.tolist() == [2, 2, 1, 1, 0, 0]
    many = load_pictures(write_parquet(tmp_path / "numbers", names=None, shift=9), "test")
    assert many.classes == tuple(map(str, range(12)))
    assert many.labels.tolist() == [9, 9, 10, 10, 11, 11]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("kind", CIFAR.values(), ids=CIFAR)
def test_torchvision_files(tmp_path, kind, packed, monkeypatch):
    root = tmp_path / "root"
    classes = write_cifar(root, kind, monkeypatch)
    if packed:
        root = pack_cifar(root, kind, tmp_path / "packed", monkeypatch)
    before = set(root.rglob("*"))
    first = np.random.default_rng(0).integers(0, 256, (2, 3, 32, 32), np.uint8)
    name = kind.__name__.lower()
    for split, number in (("train", len(kind.train_list)), ("test", 1)):
        for pictures in (load_pictures(name, split, root), load_pictures(root, split)):
            assert pictures.classes == classes
            assert pictures.labels.tolist() == [label for n in range(number) for label in (n, 9)]
            assert pictures.images.shape == (2 * number, 3, 32, 32)
            assert torch.equal(pictures.images[:2], torch.from_numpy(first))
    left = {path.name.rpartition("-")[2] for path in set(root.rglob("*")) - before}
    assert left == ({"train.safetensors", "test.safetensors"} if packed else set()), "nothing else is left behind"


def test_torchvision_files_damaged(tmp_path, monkeypatch):
    write_cifar(tmp_path, CIFAR10, monkeypatch)
    file = tmp_path / CIFAR10.base_folder / CIFAR10.test_list[0][0]
    file.write_bytes(file.read_bytes()[:-1])
    assert CIFAR10.tgz_md5 in error_of("cifar10", "test", tmp_path)
    (tmp_path / "packed").mkdir()
    (tmp_path / "packed" / CIFAR10.filename).write_bytes(b"<html>not found</html>")
    assert f"its md5 must be {CIFAR10.tgz_md5}" in error_of("cifar10", "train", tmp_path / "packed")


def test_formats_and_modes_become_rgb(tmp_path):
    pixels = np.full((16, 24, 3), 200, np.uint8)
    content = {f"train/a/{n}": png(pixels, kind) for n, kind in enumerate(["PNG", "JPEG", "WEBP", "BMP"])}
    content["train/a/grey"] = png(pixels[:, :, 0])
    content["train/a/rgba"] = png(np.concatenate([pixels, pixels[:, :, :1]], 2))
    pictures = load_pictures(write_folder(tmp_path, content), "train")
    assert pictures.images.shape == (6, 3, 16, 24)
    assert (pictures.images.int() - 200).abs().max() <= 1


def test_files_that_are_no_pictures_are_passed_over(tmp_path):
    """What Windows and people leave in folders; a suffix in capitals is still one of a picture."""
    others = {f"{split}/{name}/{file}": b"x" for split in ("train", "test") for name in CLASSES for file in OTHER_FILES}
    content = {name.replace(".png", ".PNG"): data for name, data in files().items()}
    for path in (
        write_folder(tmp_path / "folder", {**content, **others}),
        write_tar(tmp_path / "x.tar", {**content, **others}),
    ):
        for split in ("train", "test"):
            assert_tiny(load_pictures(path, split), split)


OTHER_FILES = ("Thumbs.db", "desktop.ini", "README.txt", "labels.csv")


def test_class_folders_may_be_links(tmp_path):
    path = write_folder(tmp_path / "here", files())
    (tmp_path / "elsewhere").mkdir()
    for split in ("train", "test"):
        (path / split / "bee").rename(tmp_path / "elsewhere" / split)
        (path / split / "bee").symlink_to(tmp_path / "elsewhere" / split)
        (path / split / "ant" / "again").symlink_to(path / split, target_is_directory=True)  # a circle
        assert_tiny(load_pictures(path, split), split)


@pytest.mark.parametrize(("orientation", "turned"), [(1, 0), (3, 180), (6, 270), (8, 90)])
def test_pictures_are_upright_as_their_exif_says(tmp_path, orientation, turned):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 24, 3), np.uint8))
    (tmp_path / "train" / "a").mkdir(parents=True)
    exif = Image.Exif()
    exif[0x0112] = orientation
    image.save(tmp_path / "train" / "a" / "0.png", exif=exif)
    expected = torch.from_numpy(np.asarray(image.rotate(turned, expand=True)).copy()).permute(2, 0, 1)
    assert torch.equal(load_pictures(tmp_path, "train").images[0], expected)


def test_a_parquet_label_beyond_all_classes_is_one_line(tmp_path):
    path = write_parquet(tmp_path, names=None, shift=2**40)
    assert "is not below 1048576" in error_of(path, "train")


# Everything wrong ends in one line.


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "not one of PNG, JPEG, WEBP, BMP"),
        (b"<html>", "not one of PNG, JPEG, WEBP, BMP"),
        (png(np.zeros((40, 40, 3), np.uint8), "GIF"), "not one of PNG, JPEG, WEBP, BMP"),
        (png(np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8))[:900], "truncated"),
        (png(np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8), "JPEG")[:900], "truncated"),
        (png(np.zeros((4, 4), np.uint16)), "more than 8 bits"),
    ],
)
def test_unreadable_pictures_are_named(tmp_path, data, message):
    content = {**files(), "train/bee/0004.png": data}
    for path in (write_folder(tmp_path / "folder", content), write_tar(tmp_path / "x.tar.xz", content)):
        line = error_of(path, "train")
        assert "train/bee/0004.png (picture 4)" in line
        assert message in line
        assert_tiny(load_pictures(path, "test"), "test")


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_oversized_pictures_are_refused(tmp_path, monkeypatch):
    path = write_folder(tmp_path, files())
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", HEIGHT * WIDTH)
    assert_tiny(load_pictures(path, "train"), "train")
    for limit in (HEIGHT * WIDTH - 1, 4):
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        assert "train/ant/0000.png (picture 0)" in error_of(path, "train")


@pytest.mark.parametrize(
    ("member", "message"),
    [
        ({"name": "train/ant/l.png", "type": tarfile.SYMTYPE, "linkname": "/etc/passwd"}, "link or device"),
        ({"name": "train/ant/l.png", "type": tarfile.LNKTYPE, "linkname": "train/ant/0000.png"}, "link or device"),
        ({"name": "train/ant/pipe", "type": tarfile.FIFOTYPE}, "link or device"),
        ({"name": "/train/ant/x.png"}, "leads out of the archive"),
        ({"name": "train/../../x.png"}, "leads out of the archive"),
        ({"name": "other/train/ant/x.png"}, "more than one data set: ., other"),
    ],
)
def test_hostile_archives_are_refused(tmp_path, member, message):
    assert message in error_of(write_tar(tmp_path / "x.tar.gz", files(), **member), "train")


def test_a_huge_member_is_refused_unread(tmp_path):
    member = tarfile.TarInfo("train/ant/x.png")
    member.size = 2**40
    (tmp_path / "x.tar").write_bytes(member.tobuf())
    assert "1099511627776 bytes" in error_of(tmp_path / "x.tar", "train")


@pytest.mark.parametrize("suffix", [".tar.xz", ".tar.gz", ".tar"])
def test_truncated_archives_end_in_one_line(tmp_path, suffix):
    whole = write_tar(tmp_path / f"whole{suffix}", files()).read_bytes()
    cut = tmp_path / f"cut{suffix}"
    end = len(whole) if suffix != ".tar" else len(whole.rstrip(b"\0")) + 512  # zeros after the last picture are padding
    lengths = {0, 1, 511, 512, 513, 1024, end - 1, end - 600, *range(0, end, 97), *range(0, end, 512)}
    for length in sorted(length for length in lengths if length < end - 512 or suffix != ".tar"):
        cut.write_bytes(whole[:length])
        assert "is damaged, incomplete or no archive" in error_of(cut, "train")


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    return write_tar(tmp_path_factory.mktemp("packed") / "x.tar.xz", files()).read_bytes()


@settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(where=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
@example(where=0.999999, bit=0)
def test_a_flipped_bit_is_never_silent(packed, tmp_path, where, bit):
    damaged = bytearray(packed)
    damaged[int(where * len(packed))] ^= 1 << bit
    (tmp_path / "x.tar.xz").write_bytes(damaged)
    with suppress(DataError):
        assert_tiny(load_pictures(tmp_path / "x.tar.xz", "train"), "train")


def test_unknown_archives(tmp_path):
    (tmp_path / "x.zip").write_bytes(b"PK")
    assert "not an archive of a known kind: .tar, .xz, .gz, .tgz" in error_of(tmp_path / "x.zip", "train")
    (tmp_path / "page.tar.gz").write_bytes(b"<html>404</html>")
    assert "damaged, incomplete or no archive" in error_of(tmp_path / "page.tar.gz", "train")


@pytest.mark.parametrize("split", ["train", "test"])
def test_splits_must_have_the_same_classes(tmp_path, split):
    content = {name.replace("test/cow", "test/dog"): data for name, data in files().items()}
    for path in (write_folder(tmp_path / "folder", content), write_tar(tmp_path / "x.tar", content)):
        assert "different classes, only one has cow, dog" in error_of(path, split)
    write_parquet(tmp_path / "table", CLASSES, splits=["train"])
    write_parquet(tmp_path / "table", ("ant", "bee", "dog"), splits=["test"])
    assert "different classes, only one has cow, dog" in error_of(tmp_path / "table", split)


def test_missing_splits_and_wrong_numbers_of_classes(tmp_path):
    path = write_folder(tmp_path / "cifar10", {name: data for name, data in files().items() if "train" in name})
    assert_tiny(load_pictures(path, "train"), "train")
    assert "has no test or val pictures" in error_of(path, "test")
    assert "holds 3 classes, but cifar10 has 10" in error_of("cifar10", "train", root=tmp_path)
    write_parquet(path)
    assert "both parquet files and class folders" in error_of(path, "train")


def test_bad_parquet_files(tmp_path, monkeypatch):
    file = write_parquet(tmp_path / "cut") / "train-00001-of-00002.parquet"
    file.write_bytes(file.read_bytes()[:-7])
    assert str(file) in error_of(tmp_path / "cut", "train")
    assert "needs a column img or image, but has picture" in error_of(
        write_parquet(tmp_path / "p", image="picture"), "train"
    )
    assert "needs a column label or" in error_of(write_parquet(tmp_path / "l", label="kind"), "train")
    path = write_parquet(tmp_path / "s", shift=1)
    assert "train-00001-of-00002.parquet (row 2): label 3 is not in 0 .. 2" in error_of(path, "train")
    path = write_parquet(tmp_path / "fraction", shift=0.5)
    assert "(row 0) is not a picture and a class number" in error_of(path, "test")
    path = write_parquet(tmp_path / "name", picture="a.png")
    assert "(row 0) is not a picture and a class number" in error_of(path, "test")
    path = write_parquet(tmp_path / "empty", picture={"bytes": b"", "path": "a.png"})
    assert "(row 0): not one of PNG" in error_of(path, "test")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    assert "pip install pyarrow" in error_of(path, "train")


def test_names_cannot_break_the_line(tmp_path):
    path = write_folder(tmp_path, {"train/a/x\ny\x1b[31m.png": b""})
    assert "train/a/x y [31m.png" in error_of(path, "train")
