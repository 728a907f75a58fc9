"""Position tasks: labels against a reading of noise-free pictures, balance, hold-out, and what symmetry demands."""

import pytest
import torch
from einops import rearrange

from visionpos.training.data import tasks
from visionpos.training.data.tasks import TASKS, PositionTask

GRIDS = [(6, 6), (4, 7), (5, 4), (3, 8)]


def batch(task, size=256, seed=0, split="train"):
    return task.sample(size, torch.Generator().manual_seed(seed), split)


def marked_cells(task, picture):
    """(channel, row, column) of each mark in a noise-free picture, which must hold nothing else."""
    cells = picture.unflatten(1, (task.grid[0], task.cell)).unflatten(3, (task.grid[1], task.cell))
    assert torch.equal(cells, cells[:, :, :1, :, :1].expand_as(cells)), "a mark fills whole cells"
    values = cells[:, :, 0, :, 0]
    assert set(values.unique().tolist()) <= {0.0, 1.0}
    return [tuple(mark) for mark in values.nonzero().tolist()]


def read_locate(task, marks):
    [(channel, y, x)] = marks
    assert channel == 0
    rows, columns = task.grid
    assert rows != 2 * y + 1, "the middle row is in no quadrant"
    assert columns != 2 * x + 1, "the middle column is in no quadrant"
    return ("bottom " if 2 * y >= rows else "top ") + ("right" if 2 * x >= columns else "left")


def read_direction(task, marks):
    (red, red_y, red_x), (green, green_y, green_x) = marks
    assert (red, green) == (0, 1)
    down, right = green_y - red_y, green_x - red_x
    assert abs(down) != abs(right), "a diagonal tie"
    if abs(right) > abs(down):
        return "right" if right > 0 else "left"
    return "down" if down > 0 else "up"


def read_leftmost(task, marks):
    assert [channel for channel, _, _ in marks] == [0, 1, 2]
    assert len({x for _, _, x in marks}) == 3, "distinct columns"
    return ("red", "green", "blue")[min(marks, key=lambda mark: mark[2])[0]]


def read_count(task, marks):
    assert all(channel == 0 for channel, _, _ in marks)
    return str(len(marks))


READERS = {"locate": read_locate, "direction": read_direction, "leftmost": read_leftmost, "count": read_count}


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("name", READERS)
def test_labels_agree_with_the_picture(name, grid):
    task = PositionTask(name, grid=grid, cell=2, noise=0.0)
    pictures, labels = batch(task)
    for picture, label in zip(pictures, labels.tolist(), strict=True):
        assert READERS[name](task, marked_cells(task, picture)) == task.classes[label]


@pytest.mark.parametrize("grid", GRIDS)
def test_jigsaw_is_smooth_exactly_when_intact(grid):
    task = PositionTask("jigsaw", grid=grid, noise=0.0)
    pictures, labels = batch(task)

    def seams(axis):
        """Mean step across a border between cells, over the mean step within cells."""
        steps = pictures.diff(dim=axis).square().transpose(axis, -1)
        border = torch.arange(steps.shape[-1]) % task.cell == task.cell - 1
        return steps[..., border].flatten(1).mean(1) / steps[..., ~border].flatten(1).mean(1)

    rough = torch.maximum(seams(2), seams(3))
    assert rough[labels == 0].max() < 3 < rough[labels == 1].median()
    assert (rough[labels == 1] > 3).double().mean() > 0.98


def intact_and_shuffled(monkeypatch, grid):
    """The same 256 fields with label 0 and with label 1, as cells (256, cells, values)."""
    task = PositionTask("jigsaw", grid=grid, noise=0.0)
    for label in (0, 1):
        monkeypatch.setattr(
            tasks, "_integers", lambda below, count, generator, label=label: torch.full((count,), label)
        )
        yield rearrange(batch(task)[0], "b c (h p) (w q) -> b (h w) (c p q)", p=task.cell, q=task.cell)


def test_shuffling_a_jigsaw_moves_its_cells_and_changes_none(monkeypatch):
    intact, shuffled = intact_and_shuffled(monkeypatch, (4, 6))
    same = (intact[:, :, None] == shuffled[:, None]).all(3)  # (256, cells, cells): who went where
    assert (same.sum(1) == 1).all()
    assert (same.sum(2) == 1).all()
    assert len(same.unique(dim=0)) == 256, "each picture has an order of its own"


def test_jigsaw_never_passes_an_intact_picture_off_as_shuffled(monkeypatch):
    intact, shuffled = intact_and_shuffled(monkeypatch, (2, 2))  # one order in 24 changes nothing
    assert (intact != shuffled).flatten(1).any(1).all()


@pytest.mark.parametrize("name", TASKS)
def test_classes_are_balanced(name):
    task, count = PositionTask(name, grid=(4, 6), cell=1), 20_000
    _, labels = batch(task, count)
    share = torch.bincount(labels, minlength=task.num_classes).double() / count
    assert len(share) == task.num_classes == len(task.classes)
    limit = 4.5 * (task.chance * (1 - task.chance) / count) ** 0.5
    assert (share - task.chance).abs().max() < limit


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("grid", GRIDS)
def test_shapes_and_types(name, grid):
    task = PositionTask(name, grid=grid, cell=3)
    pictures, labels = batch(task, 5)
    assert task.image_size == (grid[0] * 3, grid[1] * 3)
    assert pictures.shape == (5, 3, *task.image_size)
    assert pictures.dtype == torch.float32
    assert labels.shape == (5,)
    assert labels.dtype == torch.int64
    assert task.sample(0, torch.Generator())[0].shape == (0, 3, *task.image_size)


@pytest.mark.parametrize("name", TASKS)
def test_same_seed_same_batch_and_the_state_moves_on(name):
    task = PositionTask(name)
    before = torch.random.get_rng_state()
    generator = torch.Generator().manual_seed(7)
    first = task.sample(16, generator)
    again = batch(task, 16, seed=7)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], task.sample(16, generator)[0])
    assert torch.equal(before, torch.random.get_rng_state()), "the global generator is left alone"


@pytest.mark.parametrize("name", TASKS)
def test_noise_is_gaussian_of_the_stated_size(name):
    noisy, _ = batch(PositionTask(name))
    clean, _ = batch(PositionTask(name, noise=0.0))
    noise = noisy - clean
    assert abs(noise.std() - (0.1 if name == "jigsaw" else 0.3)) < 0.002
    assert abs(noise.mean()) < 0.002


@pytest.mark.parametrize("grid", [(6, 6), (4, 9), (5, 4)])
def test_holdout_confines_both_marks(grid):
    task = PositionTask("direction", grid=grid, cell=1, holdout="left", noise=0.0)
    used = {
        split: batch(task, 4000, split=split)[0].amax((0, 1, 2)).nonzero().flatten().tolist() for split in tasks.SPLITS
    }
    half = grid[1] // 2
    assert used["train"] == list(range(half))
    assert used["outside"] == list(range(grid[1] - half, grid[1]))
    assert used["whole"] == list(range(grid[1]))
    pictures, labels = batch(task, split="outside")
    for picture, label in zip(pictures, labels.tolist(), strict=True):
        assert read_direction(task, marked_cells(task, picture)) == task.classes[label]


def test_outside_is_the_training_law_moved_to_the_right():
    task = PositionTask("direction", grid=(4, 7), holdout="left", noise=0.0)
    (inside, labels), (outside, same) = batch(task), batch(task, split="outside")
    assert torch.equal(labels, same)
    assert torch.equal(inside.roll(4 * task.cell, 3), outside)


# The sampling law. A group that acts on the cells and transitively on the labels is what makes a model provably blind.


def pair_counts(grid, count=120_000):
    """How often each label comes with red in cell i and green in cell j: (4, cells, cells)."""
    task = PositionTask("direction", grid=grid, cell=1, noise=0.0)
    pictures, labels = batch(task, count)
    red, green = pictures[:, 0].flatten(1).argmax(1), pictures[:, 1].flatten(1).argmax(1)
    cells = grid[0] * grid[1]
    return torch.bincount((labels * cells + red) * cells + green, minlength=4 * cells**2).view(4, cells, cells)


def test_direction_draws_every_pair_of_a_label_alike():
    grid = (3, 4)
    y, x = torch.arange(12) // 4, torch.arange(12) % 4
    dy, dx = y[None] - y[:, None], x[None] - x[:, None]
    horizontal, vertical = dx.abs() > dy.abs(), dy.abs() > dx.abs()
    allowed = torch.stack([horizontal & (dx < 0), horizontal & (dx > 0), vertical & (dy < 0), vertical & (dy > 0)])
    for counts, pairs in zip(pair_counts(grid), allowed, strict=True):
        assert counts[~pairs].sum() == 0
        expected = counts.sum() / pairs.sum()
        freedom = pairs.sum() - 1
        assert ((counts[pairs] - expected) ** 2 / expected).sum() < freedom + 4 * (2 * freedom) ** 0.5 + 10


def test_direction_is_equivariant_under_the_symmetries_of_the_square():
    counts = pair_counts((4, 4)).double()
    cells = torch.arange(16).view(4, 4)
    symmetries = {  # where each cell goes, and what becomes of left, right, up, down
        "mirror": (cells.flip(1), [1, 0, 2, 3]),
        "upside down": (cells.flip(0), [0, 1, 3, 2]),
        "transpose": (cells.T, [2, 3, 0, 1]),
        "quarter turn": (cells.flip(0).T, [3, 2, 0, 1]),
    }
    for name, (moved, labels) in symmetries.items():
        moved = moved.flatten()
        there = counts[labels][:, moved][:, :, moved]
        spread = (counts + there).clamp(min=1).sqrt()
        assert ((counts - there) / spread).abs().max() < 5.5, name


def test_distance_between_the_marks_says_nothing_about_the_direction():
    """So isotropic ALiBi, which sees distances only, stays at chance on a square grid."""
    counts = pair_counts((5, 5)).double()
    y, x = torch.arange(25) // 5, torch.arange(25) % 5
    squared = (y[None] - y[:, None]) ** 2 + (x[None] - x[:, None]) ** 2
    by_distance = torch.stack([counts[:, squared == d].sum(1) for d in squared.unique()], 1)  # (4, distances)
    share = by_distance / by_distance.sum(1, keepdim=True)
    assert (share - share.mean(0)).abs().max() < 0.012


def patches(task, pictures):
    """The cells of each picture as a multiset: (B, cells, 3), sorted."""
    values = pictures.unflatten(2, (task.grid[0], task.cell)).unflatten(4, (task.grid[1], task.cell)).mean((3, 5))
    values = values.flatten(2).transpose(1, 2)
    order = (values * torch.tensor([1.0, 10.0, 100.0])).sum(2).argsort(1)
    return values.gather(1, order[:, :, None].expand_as(values))


@pytest.mark.parametrize("name", ["locate", "direction", "leftmost"])
def test_without_positions_all_pictures_are_the_same(name):
    task = PositionTask(name, grid=(4, 5), noise=0.0)
    assert len(patches(task, batch(task)[0]).unique(dim=0)) == 1


def test_count_needs_no_positions():
    task = PositionTask("count", grid=(4, 5), noise=0.0)
    pictures, labels = batch(task)
    assert torch.equal(patches(task, pictures).sum((1, 2)).round().long(), labels + 1)


def test_locate_uses_each_cell_of_a_quadrant_alike():
    task, count = PositionTask("locate", grid=(4, 6), cell=1, noise=0.0), 24_000
    pictures, _ = batch(task, count)
    assert (pictures[:, 0].sum(0) - 1000).abs().max() < 4.5 * 1000**0.5


# Bad input.


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "locat"}, "unknown position task 'locat'.*locate, direction, .*did you mean 'locate'"),
        ({"name": "zzz"}, "expected one of locate, direction, leftmost, jigsaw, count$"),
        ({"name": "locate", "holdout": "left"}, "only defined for 'direction', not for 'locate'"),
        ({"name": "direction", "holdout": "top"}, "unknown hold-out 'top', expected one of none, left"),
        ({"name": "direction", "grid": (6, 3), "holdout": "left"}, "at least 2 rows and 4 columns"),
        ({"name": "leftmost", "grid": (6, 2)}, "at least 2 rows and 3 columns"),
        ({"name": "count", "grid": (1, 6)}, "at least 2 rows"),
        ({"name": "count", "cell": 0}, "cell must be at least 1"),
        ({"name": "count", "noise": -0.1}, "noise at least 0"),
    ],
)
def test_bad_tasks_end_in_one_line(options, message):
    with pytest.raises(ValueError, match=message) as caught:
        PositionTask(**options)
    assert "\n" not in str(caught.value)


def test_bad_parts_end_in_one_line():
    with pytest.raises(ValueError, match="needs a task with holdout='left'"):
        batch(PositionTask("direction"), split="outside")
    with pytest.raises(ValueError, match="unknown split 'test', expected one of train, outside, whole"):
        batch(PositionTask("direction"), split="test")


def test_a_list_is_a_grid_too():
    assert PositionTask("count", grid=[4, 6]) == PositionTask("count", grid=(4, 6))
