"""Position tasks: endless pictures, made on the fly, whose labels depend on where things are.

A picture is a grid of cells on Gaussian noise; a mark adds 1 to one channel over a whole cell. With patches as large as
a cell all patches are exchangeable, so a model that ignores positions is at chance on every task but `count`, whatever
its weights. Draws are vectorised and come from one generator alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange

from visionpos.suggestion import closest
from visionpos.training.data.names import TASKS

SPLITS = ("train", "outside", "whole")

_CLASSES = {
    "locate": ("top left", "top right", "bottom left", "bottom right"),
    "direction": ("left", "right", "up", "down"),
    "leftmost": ("red", "green", "blue"),
    "jigsaw": ("intact", "shuffled"),
    "count": ("1", "2", "3", "4"),
}


@dataclass(frozen=True)
class PositionTask:
    """Draw examples of one task on one grid.

    Args:
        name: a key of `TASKS`.
        grid: rows and columns of cells.
        cell: pixels along a cell's side; the patch size of the model that is to solve the task.
        holdout: "left" (for `direction` only) keeps both marks in the left half while training.
        noise: standard deviation of the background; `jigsaw` takes a third of it.

    Raises:
        ValueError: If the name is unknown, or the task is not defined on that grid or with that hold-out.
    """

    name: str
    grid: Sequence[int] = (6, 6)
    cell: int = 4
    holdout: str = "none"
    noise: float = 0.3

    def __post_init__(self):
        object.__setattr__(self, "grid", tuple(self.grid))
        if self.name not in TASKS:
            meant = closest(str(self.name), TASKS)
            hint = f"; did you mean {meant!r}?" if meant else ""
            raise ValueError(f"unknown position task {self.name!r}, expected one of {', '.join(TASKS)}{hint}")
        if self.holdout not in ("none", "left"):
            raise ValueError(f"unknown hold-out {self.holdout!r}, expected one of none, left")
        if self.holdout == "left" and self.name != "direction":
            raise ValueError(f"holdout='left' is only defined for 'direction', not for {self.name!r}")
        fewest = 4 if self.holdout == "left" else 3 if self.name == "leftmost" else 2
        if len(self.grid) != 2 or self.grid[0] < 2 or self.grid[1] < fewest:
            raise ValueError(f"{self.name!r} needs a grid of at least 2 rows and {fewest} columns, got {self.grid}")
        if self.cell < 1 or self.noise < 0:
            raise ValueError(f"cell must be at least 1 and noise at least 0, got {self.cell} and {self.noise}")

    @property
    def classes(self) -> tuple[str, ...]:
        """Return the names of the labels, in order."""
        return _CLASSES[self.name]

    @property
    def num_classes(self) -> int:
        """Return the number of labels."""
        return len(self.classes)

    @property
    def chance(self) -> float:
        """Return the accuracy of a guess: the classes are balanced."""
        return 1 / self.num_classes

    @property
    def image_size(self) -> tuple[int, int]:
        """Return height and width in pixels."""
        return self.grid[0] * self.cell, self.grid[1] * self.cell

    def sample(
        self, batch_size: int, generator: torch.Generator, split: str = "train"
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Draw a new batch on the generator's device.

        Args:
            batch_size: B.
            generator: the only source of randomness.
            split: where the marks may lie: "train" (with a hold-out: the left half), "outside" (the right half; only
                with a hold-out) or "whole" (anywhere).

        Returns:
            Pictures (B, 3, H, W) float32 and labels (B,) int64.

        Raises:
            ValueError: If the split is unknown, or "outside" is asked for without a hold-out.
        """
        rows, columns = self.grid
        left, width = self._columns(split)
        pictures, labels = _DRAW[self.name](rows, width, self.cell, batch_size, generator)
        pictures = F.pad(pictures, (left * self.cell, (columns - left - width) * self.cell))
        noise = torch.randn(pictures.shape, generator=generator, device=generator.device)
        return pictures + noise * (self.noise / 3 if self.name == "jigsaw" else self.noise), labels

    def _columns(self, split: str) -> tuple[int, int]:
        """Return the first column and the number of columns that a split may use; a middle one is in neither half."""
        if split not in SPLITS:
            raise ValueError(f"unknown split {split!r}, expected one of {', '.join(SPLITS)}")
        columns = self.grid[1]
        if split == "outside" and self.holdout == "none":
            raise ValueError("split='outside' needs a task with holdout='left'")
        if split == "whole" or self.holdout == "none":
            return 0, columns
        half = columns // 2
        return (0 if split == "train" else columns - half), half


# Each drawing below returns noise-free pictures (B, 3, rows * cell, columns * cell) and labels (B,).


def _locate(rows, columns, cell, batch_size, generator):
    """Draw one red mark; the middle row and column of an odd grid, in no quadrant, stay empty."""
    labels = _integers(4, batch_size, generator)
    y = _integers(rows // 2, batch_size, generator) + labels // 2 * (rows - rows // 2)
    x = _integers(columns // 2, batch_size, generator) + labels % 2 * (columns - columns // 2)
    return _paint((y * columns + x)[:, None], rows, columns, cell), labels


def _direction(rows, columns, cell, batch_size, generator):
    """Draw a label, then one of the pairs of cells that have it, all alike: a displacement and a place for it."""
    dy = torch.arange(1 - rows, rows, device=generator.device)[:, None]
    dx = torch.arange(1 - columns, columns, device=generator.device)[None, :]
    places = (rows - dy.abs()) * (columns - dx.abs())  # pairs with each displacement
    towards = torch.stack([dx < -dy.abs(), dx > dy.abs(), dy < -dx.abs(), dy > dx.abs()])  # no diagonal ties
    pairs = (towards * places).flatten(1).cumsum(1)  # (4, displacements)

    labels = _integers(4, batch_size, generator)
    ticket = _integers(2**62, batch_size, generator) % pairs[labels, -1]  # which of the label's pairs
    chosen = torch.searchsorted(pairs[labels], ticket[:, None], right=True).squeeze(1)
    place = ticket - pairs[labels, chosen] + places.flatten()[chosen]  # which of the displacement's
    dy, dx = chosen // (2 * columns - 1) - (rows - 1), chosen % (2 * columns - 1) - (columns - 1)
    y = place // (columns - dx.abs()) - dy.clamp(max=0)
    x = place % (columns - dx.abs()) - dx.clamp(max=0)
    cells = torch.stack([y * columns + x, (y + dy) * columns + x + dx], 1)  # red, green
    return _paint(cells, rows, columns, cell), labels


def _leftmost(rows, columns, cell, batch_size, generator):
    """Draw a red, a green and a blue mark in three different columns, in any rows."""
    x = _orders(columns, batch_size, generator)[:, :3]
    y = _integers(rows, (batch_size, 3), generator)
    return _paint(y * columns + x, rows, columns, cell), x.argmin(1)


def _jigsaw(rows, columns, cell, batch_size, generator):
    """Draw coarse noise and make it smooth; for label 1 the cells change places, never all back to their own."""
    labels = _integers(2, batch_size, generator)
    coarse = (batch_size, 3, rows // 2 + 1, columns // 2 + 1)
    smooth = torch.randn(coarse, generator=generator, device=generator.device)
    smooth = F.interpolate(smooth, (rows * cell, columns * cell), mode="bicubic", align_corners=True)

    own = torch.arange(rows * columns, device=generator.device)
    order = _orders(rows * columns, batch_size, generator)
    order = torch.where((order == own).all(1, keepdim=True), order.roll(1, 1), order)
    order = torch.where(labels[:, None] == 1, order, own)  # (B, cells)
    cells = rearrange(smooth, "b c (h p) (w q) -> b (h w) (c p q)", p=cell, q=cell)
    cells = cells.gather(1, order[:, :, None].expand_as(cells))
    return rearrange(cells, "b (h w) (c p q) -> b c (h p) (w q)", h=rows, c=3, p=cell), labels


def _count(rows, columns, cell, batch_size, generator):
    """Draw one to four red marks in different cells."""
    labels = _integers(4, batch_size, generator)
    ranks = _orders(rows * columns, batch_size, generator)
    return _enlarge((ranks <= labels[:, None])[:, None], rows, columns, cell), labels


_DRAW = {"locate": _locate, "direction": _direction, "leftmost": _leftmost, "jigsaw": _jigsaw, "count": _count}


def _integers(below: int, shape: int | tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """Return uniform integers in 0 .. below - 1."""
    shape = (shape,) if isinstance(shape, int) else shape
    return torch.randint(below, shape, generator=generator, device=generator.device)


def _orders(length: int, batch_size: int, generator: torch.Generator) -> torch.Tensor:
    """Return a random order of 0 .. length - 1 for each row, (B, length)."""
    return torch.rand(batch_size, length, generator=generator, device=generator.device).argsort(1)


def _paint(cells: torch.Tensor, rows: int, columns: int, cell: int) -> torch.Tensor:
    """Return pictures with one mark per channel, red first, in the cells (B, marks) given in reading order."""
    return _enlarge(cells[:, :, None] == torch.arange(rows * columns, device=cells.device), rows, columns, cell)


def _enlarge(marks: torch.Tensor, rows: int, columns: int, cell: int) -> torch.Tensor:
    """Return marks (B, up to 3 channels, rows * columns) as float pictures (B, 3, rows * cell, columns * cell)."""
    marks = F.pad(marks.float(), (0, 0, 0, 3 - marks.shape[1])).unflatten(2, (rows, columns))
    return marks.repeat_interleave(cell, 2).repeat_interleave(cell, 3)
