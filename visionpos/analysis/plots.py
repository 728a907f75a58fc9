"""Drawings of what an encoding does. Every function draws on the axes given, or on new ones, and returns them."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..encoding import PositionEncoding
from ..registry import constructor_parameters
from . import kernel as kernels
from .kernel import NotDefined
from .properties import bounded, distance_profile

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

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
    from matplotlib.figure import Figure

    return Figure(figsize=(4, 3.2), dpi=100, layout="constrained").subplots() if ax is None else ax


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


def plot_decay(radii: Tensor, profile: Tensor, ax: Axes | None = None, title: str = "mean by distance") -> Axes:
    """Draw k(r), one line for each head, (heads, R), over distances (R,) in grid steps."""
    ax = _axes(ax)
    same = torch.allclose(profile, profile[:1].expand_as(profile), equal_nan=True)
    for head, values in enumerate(profile[:1] if same else profile[:12]):
        ax.plot(radii.numpy(), values.numpy(), linewidth=1.4, label=f"head {head}")
    if 1 < len(profile) <= 4 and not same:
        ax.legend(frameon=False, fontsize=7)
    ax.set(title=title, xlabel="distance, grid steps", ylabel="K")
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
    """Draw what the centre token sees in each head, (heads, H, W), tiled, each head on a scale of its own."""
    ax = _axes(ax)
    rows = rows[:12]
    low, high = rows.amin((1, 2), keepdim=True), rows.amax((1, 2), keepdim=True)
    rows = (rows - low) / (high - low).clamp(min=1e-30)
    columns = math.ceil(math.sqrt(len(rows)))
    padded = torch.nn.functional.pad(rows, (0, 1, 0, 1), value=math.nan)
    blank = padded.new_full((-len(padded) % columns, *padded.shape[1:]), math.nan)
    tiles = torch.cat([padded, blank]).unflatten(0, (-1, columns))  # (rows of tiles, columns, H + 1, W + 1)
    picture = tiles.transpose(1, 2).flatten(2).flatten(0, 1)  # (rows of tiles * (H + 1), columns * (W + 1))
    ax.imshow(picture.numpy(), cmap=COLOURS, interpolation="nearest")
    ax.set(title=title or f"{len(rows)} heads, each scaled to itself", xticks=[], yticks=[])
    ax.set_frame_on(False)
    return ax


def centre_row(encoding: PositionEncoding, grid: tuple[int, int]) -> tuple[Tensor, tuple[int, int]]:
    """Return K of the token in the middle of the grid, (heads, H, W), and where that is. Hidden tokens are NaN."""
    centre = grid[0] // 2, grid[1] // 2
    query = torch.tensor([centre[0] * grid[1] + centre[1]])
    row = kernels.logit_kernel(encoding, kernels.exact_grid(grid), query)[:, 0].unflatten(1, grid)
    return row.where(row.isfinite(), math.nan), centre


def plot_encoding(
    encoding: str | PositionEncoding,
    grid: tuple[int, int] = (14, 14),
    figure: Figure | None = None,
    **options: Any,
) -> Figure:
    """Draw an encoding on `figure` or a new one, which is returned; save it with `.savefig("x.png")`.

    Four panels: the kernel around the centre token at the training grid and, as a model has it there, at twice the
    grid, on one colour scale; its mean by distance; and its spectrum, or the heads where they differ. An encoding that
    interpolates has one more: twice the grid with coordinates that run on.

    Raises:
        ValueError: an unknown name or option.
    """
    from matplotlib.figure import Figure

    if isinstance(encoding, str):
        encoding = kernels.build(encoding, grid, **options)
    encoding = kernels.exact(encoding)
    maps = [(encoding, grid)]
    if encoding.extrapolation != "error":
        maps.append((encoding, tuple(2 * size for size in grid)))
    if "extrapolate" in constructor_parameters(type(encoding)) and encoding.reference_shape and not encoding.runs_on:
        running = copy.deepcopy(encoding)
        running.extrapolate = True
        maps.append((running, maps[-1][1]))
    figure = figure or Figure(figsize=(2.75 * (len(maps) + 2), 2.9), dpi=72, layout="constrained")
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


def _draw(encodings: list[tuple[PositionEncoding, tuple[int, int]]], figure: Figure, panels: Sequence[Axes]) -> None:
    *places, decay, last = panels
    maps = [centre_row(encoding, grid) for encoding, grid in encodings]
    means = [rows.nanmean(0) for rows, _ in maps]
    seen = torch.cat([mean[~mean.isnan()] for mean in means])
    low, high = seen.min().item(), seen.max().item()
    limits = (low, high if high > low else low + 1)
    for index, ((encoding, grid), mean, (_, centre)) in enumerate(zip(encodings, means, maps, strict=True)):
        way = "run_on" if encoding.runs_on else encoding.extrapolation
        title = f"twice, {TWICE[way]}: {grid[0]} x {grid[1]}" if index else f"trained: {grid[0]} x {grid[1]}"
        plot_map(mean, centre, places[index], title, limits).set_ylabel("" if index else "rows from the centre")
    figure.colorbar(places[0].images[0], ax=places, shrink=0.8, pad=0.02)
    encoding, grid = encodings[0]
    positions = kernels.exact_grid(grid)
    kernel = kernels.logit_kernel(encoding, positions)
    plot_decay(*distance_profile(kernel, positions), decay)
    rows = maps[0][0]
    if len(rows) > 1 and not torch.allclose(rows, rows[:1].expand_as(rows), equal_nan=True):
        floor = bounded(rows.where(~rows.isnan(), -math.inf))
        plot_heads(floor, last)
    else:
        plot_spectrum(kernel, last)
