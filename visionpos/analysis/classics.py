"""Pictures that papers are known by: ViT's mosaic, the sinusoid's stripes, Swin's index, RoPE's frequencies."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import nn

from ..description import distinct_encodings
from ..encoding import PositionEncoding
from ..windows import relative_position_index
from . import kernel as kernels
from .kernel import NotDefined

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def plot_similarity(encoding: str | PositionEncoding | nn.Module, grid: tuple[int, int] | None = None) -> Figure:
    """Draw ViT's mosaic: in the tile of row y and column x, how alike each embedding is to that of patch (y, x).

    Cosines of the vectors that are added to the tokens, from -1 to 1, as in figure 7 of "An Image is Worth 16x16 Words"
    (arXiv:2010.11929), of any input encoding.

    Args:
        encoding: a name, an encoding, or a model, whose own embedding it is then.
        grid: (H, W), for a name or an encoding; 7 x 7 by default.

    Raises:
        ValueError: nothing is added to the tokens.

    Example:
        >>> from visionpos.analysis.classics import plot_similarity
        >>> plot_similarity("sincos2d", (3, 5)).axes[0].get_title()
        'sincos2d: cosine of each embedding with all others'
    """
    encoding, grid = _find(encoding, "input", grid)
    vectors = F.normalize(kernels.vectors(encoding, kernels.exact_grid(grid))[0], dim=-1)  # (N, dim)
    height, width = grid
    tiles = F.pad((vectors @ vectors.mT).view(*grid, *grid), (0, 1, 0, 1), value=torch.nan)  # a line between tiles
    mosaic = tiles.transpose(1, 2).reshape(height * (height + 1), width * (width + 1))
    title = f"{encoding.name}: cosine of each embedding with all others"
    ax = _picture(mosaic, title, cmap="viridis", vmin=-1, vmax=1)
    ax.set_xticks([(width + 1) * x + width / 2 - 0.5 for x in range(width)], range(width))
    ax.set_yticks([(height + 1) * y + height / 2 - 0.5 for y in range(height)], range(height))
    ax.set(xlabel="column of the patch", ylabel="row of the patch")
    return ax.figure


def plot_stripes(
    encoding: str | PositionEncoding | nn.Module = "sinusoidal", grid: tuple[int, int] | None = None
) -> Figure:
    """Draw the vectors of an input encoding as they are: a row for each token, a column for each channel.

    Raises:
        ValueError: nothing is added to the tokens.
    """
    encoding, grid = _find(encoding, "input", grid)
    vectors = kernels.vectors(encoding, kernels.exact_grid(grid))[0]
    ax = _picture(vectors, f"{encoding.name}: what is added to each token", cmap="RdBu_r", aspect="auto")
    ax.set(xlabel="channel", ylabel="token, row by row")
    return ax.figure


def plot_relative_index(window_size: tuple[int, int] = (7, 7)) -> Figure:
    """Draw Swin's index: which row of the table each pair of tokens of a window reads (arXiv:2103.14030)."""
    index = relative_position_index(window_size)
    title = f"row of the table, {window_size[0]} x {window_size[1]} window"
    ax = _picture(index.view(2 * [window_size[0] * window_size[1]]), title, cmap="viridis")
    ax.set(xlabel="key", ylabel="query")
    return ax.figure


def plot_frequencies(
    encoding: str | PositionEncoding | nn.Module = "rope_axial", grid: tuple[int, int] | None = None
) -> Figure:
    """Draw the frequencies of a rotary encoding as points of the plane, one for each pair of channels and head.

    A point (theta_x, theta_y) says by how many radians a step to the right and a step down turn the pair. Those of an
    axial one lie on the axes; mixed ones see diagonals as well (arXiv:2403.13298).

    Raises:
        ValueError: nothing is rotated by angles that are linear in the coordinates.
    """
    from .notebook import NotebookFigure

    encoding, grid = _find(encoding, "rotary", grid)
    ax = NotebookFigure(figsize=(4.4, 4.2)).subplots()
    for head, theta in enumerate(kernels.phase_frequencies(encoding, kernels.exact_grid(grid))[:12]):
        ax.scatter(theta[:, 1], theta[:, 0], s=14, label=f"head {head}")
    limit = 1.1 * max(map(abs, (*ax.get_xlim(), *ax.get_ylim())))
    ax.set(xlim=(-limit, limit), ylim=(limit, -limit), aspect="equal")
    ax.set(xlabel="radians a column", ylabel="radians a row", title=f"{encoding.name}: frequencies")
    ax.grid(alpha=0.25)
    return ax.figure


def _find(
    encoding: str | PositionEncoding | nn.Module, place: str, grid: tuple[int, int] | None
) -> tuple[PositionEncoding, tuple[int, int]]:
    """Return the encoding of a place that is meant, in float64, and its grid."""
    if isinstance(encoding, nn.Module) and not isinstance(encoding, PositionEncoding):
        found = [(each, facts.feat_shape) for _, each, facts in distinct_encodings(encoding)[0] if each.place == place]
        if not found:
            raise NotDefined(f"{type(encoding).__name__} has no encoding of the place {place}")
        encoding, shape = found[0]
        grid = grid or tuple(shape)
    grid = grid or getattr(encoding, "reference_shape", None) or (7, 7)
    if isinstance(encoding, str):
        encoding = kernels.build(encoding, grid)
    if encoding.place != place:
        raise NotDefined(f"only for the place {place}; {encoding.name} is of the place {encoding.place}")
    return kernels.exact(encoding), grid


def _picture(values: torch.Tensor, title: str, **style):
    from .notebook import NotebookFigure

    ax = NotebookFigure(figsize=(4.8, 4.2)).subplots()
    ax.figure.colorbar(ax.imshow(values.numpy(), interpolation="nearest", **style), ax=ax, shrink=0.8)
    ax.set_title(title, fontsize=10)
    return ax
