"""Pictures of an archive are decoded once: what is kept is used only where it is the archive's, and whole."""

import pytest
import torch

from tests.training.data.tiny_data import files, write_folder, write_tar
from visionpos.training.data import decoded, readers
from visionpos.training.data.datasets import load_pictures


@pytest.fixture
def archive(tmp_path):
    write_tar(tmp_path / "tiny.tar.xz", files())
    return tmp_path / "tiny.tar.xz"


def same(a, b):
    return torch.equal(a.images, b.images) and torch.equal(a.labels, b.labels) and a.classes == b.classes


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("size", [None, (4, 9)])
def test_the_second_time_nothing_is_decoded(archive, split, size, monkeypatch):
    first = load_pictures(archive, split, size=size)
    monkeypatch.setattr(readers, "_read_archive", lambda *_: pytest.fail("the archive was read again"))
    assert same(load_pictures(archive, split, size=size), first)


def test_each_split_and_size_is_kept_apart(archive):
    shapes = {
        load_pictures(archive, split, size=size).images.shape for split in ("train", "test") for size in (None, (4, 9))
    }
    assert shapes == {(12, 3, 5, 7), (12, 3, 4, 9), (6, 3, 5, 7), (6, 3, 4, 9)}
    assert len(list(archive.parent.glob(".tiny.tar.xz-*"))) == 4


def test_another_archive_of_the_same_name_is_decoded(archive):
    old = load_pictures(archive, "train")
    content = {name: files()[name] for name in sorted(files()) if not name.endswith("0003.png")}
    write_tar(archive, content)
    new = load_pictures(archive, "train")
    assert (len(old), len(new)) == (12, 11)
    assert same(load_pictures(archive, "train"), new)


def test_a_damaged_file_is_not_used_and_written_anew(archive):
    whole = load_pictures(archive, "train")
    kept = next(archive.parent.glob(".tiny.tar.xz-train*"))
    good = kept.read_bytes()
    for position in (3, 40, len(good) // 2, len(good) - 1):
        kept.write_bytes(good[:position] + bytes([good[position] ^ 1]) + good[position + 1 :])
        assert same(load_pictures(archive, "train"), whole), position
        assert decoded.load(archive, "train", "") is not None, position
    for length in (0, 5, 300, len(good) - 1):
        kept.write_bytes(good[:length])
        assert same(load_pictures(archive, "train"), whole), length


def test_where_nothing_can_be_written_nothing_is_kept(archive, monkeypatch):
    def full(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr(decoded, "save_file", full)
    assert len(load_pictures(archive, "train")) == 12
    assert [path.name for path in archive.parent.iterdir()] == ["tiny.tar.xz"]


def test_folders_are_read_every_time(tmp_path):
    folder = write_folder(tmp_path / "tiny", files())
    load_pictures(folder, "train")
    assert sorted(path.name for path in folder.iterdir()) == ["test", "train"]
