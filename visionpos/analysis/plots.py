"""Drawings of what an encoding does. Every function draws on the axes given, or on new ones, and returns them."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..encoding import PositionEncoding
from ..registry import constructor_parameters
from . import kernel as kernels
from .kernel import NotDefined
from .properties import bounded

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure

WHAT = {
    "input": "inner product of the embeddings",
    "rotary": "mean cosine of the rotation between two tokens",
    "bias": "bias on the attention logit",
    "conditional": "inner product of what equal tokens receive",
    "none": "nothing",
}
TWICE = {
    "interpolate": "interpolated",
    "run_on": "running on",
    "formula": "in its own frame",
    "resize": "resized",
    "error": "not defined",
}
COLOURS = "viridis"


def _axes(ax: Axes | None) -> Axes:
    from .notebook import NotebookFigure

    return NotebookFigure(figsize=(4, 3.2)).subplots() if ax is None else ax


def plot_map(
    row: Tensor, centre: tuple[int, int], ax: Axes | None = None, title: str = "", limits: tuple | None = None
) -> Axes:
    """Draw what the token at `centre` says of each other token, (H, W); axes in grid steps from it."""
    ax = _axes(ax)
    (height, width), (y, x) = row.shape, centre
    low, high = limits or (None, None)
    extent = (-x - 0.5, width - x - 0.5, height - y - 0.5, -y - 0.5)
    ax.imshow(row.numpy(), cmap=COLOURS, vmin=low, vmax=high, extent=extent, interpolation="nearest")
    ax.plot(0, 0, marker="+", color="white", markersize=7)
    ax.set(title=title, xlabel="columns from the centre", ylabel="rows from the centre")
    return ax


def plot_decay(row: Tensor, centre: tuple[int, int], ax: Axes | None = None, title: str = "from the centre") -> Axes:
    """Draw what the token at `centre` says of others, (H, W), along its row, its column and a diagonal.

    Steps are distances in units of the grid, negative to the left and upwards, so that a direction that an encoding
    prefers is seen, and no directions are averaged.
    """
    ax = _axes(ax)
    (height, width), (y, x) = row.shape, centre
    rays = {
        "row": (0, 1, range(-x, width - x)),
        "column": (1, 0, range(-y, height - y)),
        "diagonal": (1, 1, range(-min(x, y), min(height - y, width - x))),
    }
    for (label, (dy, dx, steps)), style in zip(rays.items(), ("-", "--", ":"), strict=True):
        values = [row[y + dy * step, x + dx * step].item() for step in steps]
        ax.plot([step * math.hypot(dy, dx) for step in steps], values, style, linewidth=1.6, label=label)
    ax.legend(frameon=False, fontsize=7)
    ax.set(title=title, xlabel="distance, grid steps", ylabel="mean of the heads")
    ax.margins(x=0.02)
    ax.grid(alpha=0.25)
    return ax


def plot_spectrum(kernel: Tensor, ax: Axes | None = None, title: str = "spectrum of the kernel") -> Axes:
    """Draw singular values of K (heads, N, N), relative to the largest, one line for each different head."""
    ax = _axes(ax)
    values = torch.linalg.svdvals(bounded(kernel)).clamp(min=1e-30)
    values = values / values[:, :1]
    same = torch.allclose(values, values[:1].expand_as(values))
    for head in values[:1] if same else values[:12]:
        ax.semilogy(range(1, len(head) + 1), head.clamp(min=1e-17).numpy(), linewidth=1.4)
    ax.set(title=title, xlabel="index", ylabel="singular value / largest", ylim=(1e-10, 2), xscale="log")
    ax.grid(alpha=0.25)
    return ax


def plot_heads(rows: Tensor, ax: Axes | None = None, title: str = "") -> Axes:
    """Draw what the centre token says in each head, (heads, H, W), as tiles on one colour scale."""
    ax = _axes(ax)
    rows = rows[:12]
    columns = math.ceil(math.sqrt(len(rows)))
    padded = torch.nn.functional.pad(rows, (0, 1, 0, 1), value=math.nan)
    blank = padded.new_full((-len(padded) % columns, *padded.shape[1:]), math.nan)
    tiles = torch.cat([padded, blank]).unflatten(0, (-1, columns))  # (rows of tiles, columns, H + 1, W + 1)
    picture = tiles.transpose(1, 2).flatten(2).flatten(0, 1)  # (rows of tiles * (H + 1), columns * (W + 1))
    image = ax.imshow(picture.numpy(), cmap=COLOURS, interpolation="nearest")
    ax.figure.colorbar(image, ax=ax, shrink=0.8, pad=0.02).ax.tick_params(labelsize=7)
    ax.set(title=title or f"{len(rows)} heads, on one scale", xticks=[], yticks=[])
    ax.set_frame_on(False)
    return ax


def centre_row(encoding: PositionEncoding, grid: tuple[int, int]) -> tuple[Tensor, tuple[int, int]]:
    """Return K of the token in the middle of the grid, (heads, H, W), and where that is. Hidden tokens are NaN."""
    centre = grid[0] // 2, grid[1] // 2
    query = torch.tensor([centre[0] * grid[1] + centre[1]])
    row = kernels.logit_kernel(encoding, kernels.exact_grid(grid), query)[:, 0].unflatten(1, grid)
    return row.where(row.isfinite(), math.nan), centre


def grids(encoding: PositionEncoding, grid: tuple[int, int]) -> list[tuple[str, PositionEncoding, tuple[int, int]]]:
    """Return what is shown of an encoding: a title, the encoding in float64, and a grid.

    First the grid that was trained on, then twice that as a model does it, and, where coordinates are interpolated
    then, twice that with coordinates that run on.
    """
    encoding, twice = kernels.exact(encoding), tuple(2 * size for size in grid)
    shown = [encoding] if encoding.extrapolation != "error" else []
    if "extrapolate" in constructor_parameters(type(encoding)) and encoding.reference_shape and not encoding.runs_on:
        running = copy.deepcopy(encoding)
        running.extrapolate = True
        shown.append(running)
    found = [(f"trained: {grid[0]} x {grid[1]}", encoding, grid)]
    for each in shown:
        way = TWICE["run_on" if each.runs_on else each.extrapolation]
        found.append((f"twice, {way}: {twice[0]} x {twice[1]}", each, twice))
    return found


def plot_encoding(
    encoding: str | PositionEncoding | nn.Module,
    grid: tuple[int, int] | None = None,
    figure: Figure | SubFigure | None = None,
    **options: Any,
) -> Figure | SubFigure:
    """Draw what an encoding says, or each of the encodings of a model, and return the figure, which a notebook shows.

    Panels: the kernel (see `visionpos.analysis.kernel`) around the centre token on the grid that was trained on and, as
    a model has it there, on twice the grid, on one colour scale; its course along row, column and diagonal; and the
    heads where they differ, or else the spectrum. An encoding that interpolates has one panel more: twice the grid with
    coordinates that run on.

    Args:
        encoding: a name, an encoding, or a timm model of a supported family, which gets a row of panels for each
            encoding that differs, with its own weights; of layers that are alike in all else, those of the first.
        grid: (H, W) that was trained on. 14 x 14 by default, or that of the encoding or model.
        figure: what to draw on; a new figure by default. Save it with `.savefig("x.png")`.
        options: of an encoding that is given by name.

    Raises:
        ValueError: an unknown name or option, options for what is built already, or a model that is no host.

    Example:
        >>> figure = vp.plot_encoding("alibi2d", grid=(5, 7), num_heads=4)
        >>> figure.get_suptitle()
        'alibi2d (num_heads=4): bias on the attention logit'
        >>> vp.plot_encoding(vp.create_model("vit_tiny_patch16_224", "learned", depth=2)).get_suptitle()
        'VisionTransformer'
    """
    from .notebook import NotebookFigure

    if not isinstance(encoding, str) and options:
        raise ValueError(
            f"options are for a name; {type(encoding).__name__} is built already, got {', '.join(options)}"
        )
    if isinstance(encoding, nn.Module) and not isinstance(encoding, PositionEncoding):
        return _plot_model(encoding, grid, figure)
    if isinstance(encoding, str):
        grid = grid or (14, 14)
        encoding = kernels.build(encoding, grid, **options)
    grid = grid or encoding.reference_shape or getattr(encoding, "feat_shape", None) or (14, 14)
    maps = grids(encoding, grid)
    figure = figure or NotebookFigure(figsize=(2.75 * (len(maps) + 2), 2.9))
    label = ", ".join(f"{key}={value}" for key, value in options.items())
    figure.suptitle(f"{encoding.name}{f' ({label})' if label else ''}: {WHAT[encoding.place]}", fontsize=11)
    panels = figure.subplots(1, len(maps) + 2, width_ratios=(*[1] * len(maps), 1.25, 1.25))
    try:
        _draw(maps, figure, panels)
        for ax in panels:
            ax.title.set_fontsize(9.5)
            ax.tick_params(labelsize=8)
    except NotDefined as reason:
        for ax in panels:
            ax.set_axis_off()
        figure.text(0.5, 0.45, f"no picture: {reason}", ha="center")
    return figure


def _plot_model(
    model: nn.Module, grid: tuple[int, int] | None, figure: Figure | SubFigure | None
) -> Figure | SubFigure:
    """Draw one row of panels for each encoding of a model that differs from the others."""
    from ..description import describe, distinct_encodings  # timm, which the plot of a name does without
    from .notebook import NotebookFigure

    found, _ = distinct_encodings(model)
    figure = figure or NotebookFigure(figsize=(13.75, 2.9 * max(len(found), 1)))
    figure.suptitle(describe(model).model, fontsize=12)
    if not found:
        figure.text(0.5, 0.45, "no position at all", ha="center")
        return figure
    for row, (layers, encoding, facts) in zip(
        figure.subfigures(len(found), 1, squeeze=False)[:, 0], found, strict=True
    ):
        plot_encoding(encoding, grid or tuple(facts.feat_shape), row)
        where = layers if layers == "stem" else f"layers {layers}, here the first"
        row.suptitle(f"{where}: {row.get_suptitle()}", fontsize=11)
    return figure


def _draw(
    encodings: list[tuple[str, PositionEncoding, tuple[int, int]]], figure: Figure | SubFigure, panels: Sequence[Axes]
) -> None:
    *places, decay, last = panels
    maps = [centre_row(encoding, grid) for _, encoding, grid in encodings]
    means = [rows.nanmean(0) for rows, _ in maps]
    seen = torch.cat([mean[~mean.isnan()] for mean in means])
    low, high = seen.min().item(), seen.max().item()
    limits = (low, high if high > low else low + 1)
    for index, ((title, *_), mean, (_, centre)) in enumerate(zip(encodings, means, maps, strict=True)):
        plot_map(mean, centre, places[index], title, limits).set_ylabel("" if index else "rows from the centre")
    figure.colorbar(places[0].images[0], ax=places, shrink=0.8, pad=0.02)
    plot_decay(means[0], maps[0][1], decay)
    rows = maps[0][0]
    if len(rows) > 1 and not torch.allclose(rows, rows[:1].expand_as(rows), equal_nan=True):
        plot_heads(bounded(rows.where(~rows.isnan(), -math.inf)), last)
    else:
        _, encoding, grid = encodings[0]
        plot_spectrum(kernels.logit_kernel(encoding, kernels.exact_grid(grid)), last)
