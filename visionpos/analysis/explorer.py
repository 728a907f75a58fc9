"""The explorer: one HTML page on which two encodings are looked at side by side, token by token."""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Sequence
from importlib.resources import files
from typing import Any

import torch
from torch import Tensor

from ..encoding import PositionEncoding
from ..registry import encoding_info, list_encodings
from . import kernel as kernels
from .plots import WHAT, grids

TRAINED = (6, 8)
TEMPERATURES = (10.0, 100.0, 1000.0, 10000.0)
HIDDEN = 255  # the code of a pair that does not see each other; the others are 0 .. 254


def explorer(names: Sequence[str] | None = None, grid: tuple[int, int] = TRAINED) -> str:
    """Return the page as text. It has all numbers in it and asks nothing of any address.

    For each encoding, at each temperature if it has one: K of every pair of tokens (see `visionpos.analysis.kernel`) on
    the grid that was trained on and on twice the grid, as a model does it there and, where it interpolates, running on.

    Args:
        names: of encodings; all that encode something by default.
        grid: (H, W) that was trained on.

    Raises:
        ValueError: an unknown name, or one that encodes nothing.

    Example:
        >>> from visionpos.analysis.explorer import explorer
        >>> page = explorer(["alibi2d", "rope_axial"], grid=(2, 3))
        >>> page.startswith("<!DOCTYPE html>"), "http" in page
        (True, False)
    """
    names = [name for name in list_encodings() if name != "none"] if names is None else names
    content = json.dumps({name: looks(name, grid) for name in names}, separators=(",", ":"))
    page = (files(__package__) / "explorer.html").read_text(encoding="utf-8")
    return page.replace("/*CONTENT*/{}", content.replace("</", "<\\/"))


def looks(name: str, grid: tuple[int, int]) -> dict[str, Any]:
    """Return what the page knows of one encoding: what K is of it, and its kernels by temperature and grid."""
    info = encoding_info(name)
    options, labels = [{}], [""]
    if "temperature" in info["options"]:
        default = info["options"]["temperature"]
        options += [{"temperature": value} for value in TEMPERATURES if value != default]
        labels = [
            "its own" if default is None else f"{default:g}",
            *(f"{each['temperature']:g}" for each in options[1:]),
        ]
    return {
        "what": f"{info['place']}: {WHAT[info['place']]}",
        "temperatures": labels,
        "views": [views(kernels.build(name, grid, **given), grid) for given in options],
    }


def views(encoding: PositionEncoding, grid: tuple[int, int]) -> list[dict[str, Any]]:
    """Return K on each grid: title, grid, the range of all values, and heads as codes of all pairs or all offsets."""
    shown = [(title, size, heads(each, size)) for title, each, size in grids(encoding, grid)]
    seen = torch.cat([kernel[kernel.isfinite()] for *_, kernel in shown])
    low, high = seen.min().item(), seen.max().item()
    found = []
    for title, size, kernel in shown:
        offsets = by_offset(kernel, size)
        codes = ((kernel if offsets is None else offsets) - low) / ((high - low) or 1) * (HIDDEN - 1)
        codes = codes.round().where(codes.isfinite(), HIDDEN).to(torch.uint8)
        coded = [base64.b64encode(head.contiguous().numpy().tobytes()).decode() for head in codes]
        known = {"title": title, "grid": size, "low": low, "high": high}
        found.append(known | {"offsets": offsets is not None, "heads": coded})
    return found


def heads(encoding: PositionEncoding, grid: tuple[int, int]) -> Tensor:
    """Return K (heads, N, N), or (1, N, N) where all heads are alike."""
    kernel = kernels.logit_kernel(encoding, kernels.exact_grid(grid))
    return kernel[:1] if torch.allclose(kernel, kernel[:1].expand_as(kernel), equal_nan=True) else kernel


def by_offset(kernel: Tensor, grid: tuple[int, int]) -> Tensor | None:
    """Return K as a function of the offset, (heads, 2H - 1, 2W - 1), or None where it is none (or differs by 1e-9)."""
    height, width = grid
    y, x = kernels.exact_grid(grid).coords.long().unbind(-1)
    place = (y[None] - y[:, None] + height - 1) * (2 * width - 1) + x[None] - x[:, None] + width - 1  # (query, key)
    table = kernel.new_full((len(kernel), (2 * height - 1) * (2 * width - 1)), -math.inf)
    table[:, place.flatten()] = kernel.flatten(1)
    if not torch.allclose(table[:, place], kernel, rtol=0, atol=1e-9):
        return None
    return table.unflatten(1, (2 * height - 1, 2 * width - 1))
