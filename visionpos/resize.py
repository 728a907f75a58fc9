"""Resizing of learned tables to another grid or window, by one small matrix per axis.

Resampling is linear and separable: new = A_h table A_w^T on two axes. The matrices are built in float64 and equal
`torch.nn.functional.interpolate` (align_corners=False) for every size, including outputs one cell wide.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from functools import lru_cache, wraps
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from .frequencies import to_float64
from .materialize import is_plain_eager
from .windows import check_size, same_grid

Mode = Literal["bicubic", "bilinear"]
CPU = torch.device("cpu")


def _once_per_size(build: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Remember what `build(new, old, ..., device)` returns: sizes, options and device alone decide on a matrix.

    In a traced graph, where sizes may be symbols, it is built in place.
    """
    remembered = lru_cache(maxsize=256)(torch.inference_mode(False)(build))  # of use to a training step later

    @wraps(build)
    def matrix(*args, **options) -> Tensor:
        return remembered(*args, **options) if is_plain_eager() else build(*args, **options)

    return matrix


def _kernel(x: Tensor, mode: str, a: float) -> Tensor:
    """Return the weight of a cell at distance x: Keys' cubic convolution with parameter a, or the triangle."""
    x = x.abs()
    if mode == "bilinear":
        return (1 - x).clamp(min=0)
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = ((a * x - 5 * a) * x + 8 * a) * x - 4 * a
    return torch.where(x < 1, near, torch.where(x < 2, far, torch.zeros_like(x)))


@_once_per_size
def resize_matrix(
    new: int, old: int, mode: Mode = "bicubic", antialias: bool = True, device: torch.device = CPU
) -> Float[Tensor, "new old"]:
    """Return the matrix that resamples `old` cells to `new`, in float64; the identity where they are equal.

    Cells have their centres at i + 0.5. With antialias the kernel is stretched when shrinking, cut at the border and
    normalised; without, the border is repeated. torch's two cubic kernels: a = -0.5 with antialias (Pillow's), -0.75
    without. Plain tensor arithmetic, so that sizes may be symbols of an exported graph.
    """
    if mode not in ("bicubic", "bilinear"):
        raise ValueError(f"mode must be 'bicubic' or 'bilinear', got {mode!r}")
    if new < 1 or old < 1:
        raise ValueError(f"sizes must be positive, got {old} -> {new}")
    scale, cells = old / new, to_float64(torch.arange(old, device=device))
    centre = (to_float64(torch.arange(new, device=device)) + 0.5) * scale - 0.5  # in old cells
    if antialias:
        stretch = torch.sym_max(scale, 1.0)
        weights = _kernel((cells - centre[:, None]) / stretch, mode, -0.5)
        return weights / weights.sum(1, keepdim=True)
    matrix = torch.zeros_like(centre[:, None] + cells)
    for tap in (-1, 0, 1, 2) if mode == "bicubic" else (0, 1):
        cell = centre.floor() + tap
        reads = cell.clamp(0, old - 1)[:, None] == cells
        matrix = matrix + reads * _kernel(cell - centre, mode, -0.75)[:, None]
    return matrix


def _resample(grid: Tensor, matrices: Sequence[Tensor]) -> Tensor:
    """Return a grid (h, w, C) resampled to (H, W, C) by a matrix for each axis, in float64, in the dtype of `grid`."""
    resampled = to_float64(grid)
    with torch.autocast(grid.device.type, enabled=False):
        for axis, matrix in enumerate(matrices):
            resampled = torch.tensordot(matrix, resampled, dims=([1], [axis])).movedim(0, axis)
    return resampled.to(grid.dtype)


def resize_position_table(
    table: Float[Tensor, "*one n dim"],
    new_size: tuple[int, int],
    old_size: tuple[int, int],
    num_prefix_tokens: int = 0,
    mode: Mode = "bicubic",
    antialias: bool = True,
) -> Float[Tensor, "*one m dim"]:
    """Return a learned position table resized to another grid; rows of prefix tokens are copied.

    Args:
        table: (1, P + h * w, dim) or (P + h * w, dim), patch rows in row-major order.
        new_size: (H, W).
        old_size: (h, w). Never guessed.
        num_prefix_tokens: P.
        mode: "bicubic" or "bilinear".
        antialias: True as in timm; False as in the code of DeiT, MAE and Swin.

    Returns:
        (1, P + H * W, dim) or without the 1, in the table's dtype; the table itself where the sizes are equal.

    Raises:
        ValueError: the table has another number of rows than P + h * w.

    Example:
        >>> table = torch.tensor([[0.0], [1.0]])
        >>> vp.resize_position_table(table, new_size=(1, 4), old_size=(1, 2), mode="bilinear").flatten().tolist()
        [0.0, 0.25, 0.75, 1.0]
    """
    (h, w), (height, width) = check_size("old_size", old_size), check_size("new_size", new_size)
    if table.shape[-2] != num_prefix_tokens + h * w:
        raise ValueError(
            f"the table has {table.shape[-2]} rows, but {num_prefix_tokens} prefix tokens and a grid of {h} x {w} need "
            f"{num_prefix_tokens + h * w}"
        )
    if same_grid((h, w), (height, width)):
        return table
    prefix, patches = table.split([num_prefix_tokens, h * w], dim=-2)
    sizes = (height, h), (width, w)
    matrices = [resize_matrix(new, old, mode, antialias, table.device) for new, old in sizes]
    patches = patches.movedim(-2, 0)  # (h * w, [tables,] dim)
    resized = _resample(patches.reshape(h, w, -1), matrices).reshape(height * width, *patches.shape[1:])
    patches = resized.movedim(0, -2)
    return torch.cat([prefix, patches], dim=-2)


@lru_cache(maxsize=64)
def _geometric_ratio(old: int, new: int) -> float:
    """Return q with 1 + q + ... + q^(old // 2 - 1) = new // 2: steps of 1, q, q^2 ... reach the new border."""
    low, high, reach = 1.01, 1.5, new // 2
    while high - low > 1e-6:
        q = (low + high) / 2
        low, high = (low, q) if sum(q**i for i in range(old // 2)) > reach else (q, high)
    return (low + high) / 2


@_once_per_size
def _geometric_matrix(new: int, old: int, device: torch.device = CPU) -> Tensor:
    """Return the matrix of linear interpolation from old offsets 0, +-1, +-(1 + q), ... to the new integer offsets."""
    if new == old or old == 1:
        return resize_matrix(new, old, "bilinear", antialias=False, device=device)
    q = _geometric_ratio(old, new)
    places = [sum(q**i for i in range(k)) for k in range(old // 2 + 1)]
    places = torch.tensor([-p for p in places[:0:-1]] + places, dtype=torch.float64)
    wanted = (torch.arange(new, dtype=torch.float64) - new // 2).clamp(places[0], places[-1])
    right = torch.searchsorted(places, wanted).clamp(1, old - 1)
    share = (wanted - places[right - 1]) / (places[right] - places[right - 1])
    row = torch.arange(new)
    matrix = torch.zeros(new, old, dtype=torch.float64)
    matrix[row, right - 1] = 1 - share
    matrix[row, right] = share
    return to_float64(matrix.to(device))


def resize_relative_table(
    table: Float[Tensor, "t heads"],
    new_window: tuple[int, ...],
    old_window: tuple[int, ...],
    mode: Literal["bicubic", "geometric"] = "bicubic",
) -> Float[Tensor, "u heads"]:
    """Return a relative position bias table resized to another window.

    Args:
        table: ((2h - 1)(2w - 1), heads).
        new_window: (H, W); on any number of axes, one size for each.
        old_window: (h, w). Never guessed.
        mode: "bicubic" stretches all offsets alike (Swin's code, no antialias). "geometric" keeps unit steps near
            zero and stretches far offsets in a geometric progression (BEiT's idea, here with linear interpolation).

    Returns:
        ((2H - 1)(2W - 1), heads); the table itself where the windows are equal.

    Raises:
        ValueError: another number of rows than the old window has offsets, or an unknown mode.

    Example:
        >>> table = torch.randn(3 * 5, 4)  # offsets of a window of 2 x 3 tokens, 4 heads
        >>> vp.resize_relative_table(table, new_window=(3, 4), old_window=(2, 3)).shape
        torch.Size([35, 4])
    """
    old, new = (tuple(2 * size - 1 for size in window) for window in (old_window, new_window))
    if mode not in ("bicubic", "geometric"):
        raise ValueError(f"mode must be 'bicubic' or 'geometric', got {mode!r}")
    if table.shape[0] != math.prod(old):
        needed = f"a window of {tuple(old_window)} needs {math.prod(old)}"
        raise ValueError(f"the table has {table.shape[0]} rows, but {needed}")
    if same_grid(old, new):
        return table
    sizes = zip(new, old, strict=True)
    if mode == "geometric":
        matrices = [_geometric_matrix(*size, table.device) for size in sizes]
    else:
        matrices = [resize_matrix(*size, antialias=False, device=table.device) for size in sizes]
    return _resample(table.reshape(*old, -1), matrices).flatten(0, -2)


def sample_table(table: Float[Tensor, "*grid c"], coords: Float[Tensor, "*batch axes"]) -> Float[Tensor, "*batch c"]:
    """Return the rows of a table (h, w, C) at real (y, x) coordinates, bilinear; beyond the border the border is read.

    On A axes the table is (n_1, ..., n_A, C), and a row is read from 2^A corners. Exact at integer coordinates.
    `index_select` keeps the gradient of the table deterministic on the CPU.
    """
    sizes, rows, result = table.shape[:-1], table.reshape(-1, table.shape[-1]), 0.0
    ends = []  # of each axis: the cells on either side, and how much of each is read
    for place, size in zip(coords.unbind(-1), sizes, strict=True):
        place = place.clamp(0, size - 1)
        low = place.floor()
        ends.append([(low, 1 - (place - low)), ((low + 1).clamp(max=size - 1), place - low)])
    for corner in itertools.product(*ends):
        index, share = 0, 1
        for (cell, part), size in zip(corner, sizes, strict=True):
            index, share = index * size + cell, share * part
        row = rows.index_select(0, index.long().flatten()).unflatten(0, index.shape)
        result = result + share.unsqueeze(-1) * row
    return result
