"""Rotary frequencies scaled for a larger grid: position interpolation, NTK, YaRN, on every axis of a picture."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

import torch
from torch import Tensor

from ..frequencies import to_float64
from ..options import Count, GridSize, Positive, Range, Spread, fits
from ..places import RotaryEncoding
from ..positions import Positions
from ..rotation import AxialLayout
from ..windows import check_size

SCALINGS = ("linear", "ntk", "ntk_by_parts", "yarn")
KEYS = {"type": Literal[SCALINGS], "trained": GridSize, "per_axis": bool}
YARN = {"beta_fast": Positive, "beta_slow": Positive, "attention_slope": Spread}
DEFAULTS = {"trained": None, "per_axis": True, "beta_fast": 32.0, "beta_slow": 1.0, "attention_slope": 0.1}
BY_PARTS = ((1.25, 0.75), (16.0, 2.0))  # where linear gives way to NTK, and where both give way to no scaling, in turns


def is_scaling(value: Any) -> bool:
    """Return whether `value` is a scaling of frequencies: a type, or a dict with the keys of its type."""
    if not isinstance(value, Mapping):
        return fits(value, KEYS["type"])
    accepted = KEYS | (YARN if value.get("type") == "yarn" else {})
    known = "type" in value and all(key in accepted and fits(value[key], accepted[key]) for key in value)
    return known and value.get("beta_fast", 32.0) > value.get("beta_slow", 1.0)


LearnedScaling = Literal["interpolate", "run_on", "linear"]  # of frequencies that are no geometric series
Scaling = Annotated[
    str | Mapping,
    Range(
        lambda value: value in ("interpolate", "run_on") or is_scaling(value),
        "'interpolate', 'run_on', 'linear', 'ntk', 'ntk_by_parts', 'yarn' or a dict {'type': one of the last four, "
        "'trained': (h, w), 'per_axis': true or false}, of yarn also {'beta_fast': 32, 'beta_slow': 1 (the smaller), "
        "'attention_slope': 0.1}",
    ),
]


class FrequencyRotary(RotaryEncoding):
    """Base class of rotations by coordinates times frequencies, which can be scaled for a larger grid.

    What happens on a larger grid is one option, `scaling`. On an axis of n cells, of which n_train were trained, with
    s = max(1, n / n_train) and the frequencies b_j = T^(-j / J), j < J, in radians per grid step:

    - "interpolate", "run_on": coordinates are interpolated or run on; `extrapolate=False` and `True` are short for it.
    - "linear": b_j / s, position interpolation (Chen et al. 2023, arXiv 2306.15595).
    - "ntk": b_j s^(-j / (J - 1)): the fastest stays, the slowest is divided by s (bloc97 2023; vision: FiT, Lu et al.
      2024, arXiv 2402.12376, as are all on two axes).
    - "yarn": b_j (m_j + (1 - m_j) / s): pairs that make more than `beta_fast` turns on the trained grid stay, below
      `beta_slow` they are interpolated, m_j falls linearly between; cosines and sines are multiplied by
      1 + `attention_slope` ln s, s the largest of all axes (Peng et al. 2023, arXiv 2309.00071).
    - "ntk_by_parts": the same ramp between 16 and 2 turns, with "ntk" in place of 1 / s where a pair makes more than
      1.25 turns, a mixture of both down to 0.75.

    The constants of YaRN, 32 and 1 turns, are for texts of thousands of tokens. On a grid of 14 even the fastest pair
    makes only 2.2 turns, so that all but the first two or three bands of an axis are interpolated: there YaRN is
    "linear" with sharper attention. For pictures give `beta_fast` and `beta_slow` that lie within the grid, 2 and 0.5.

    Encodings with a box of their own keep it for None and "interpolate"; for the others it grows with the grid, so
    that a step is what it was on the trained grid.

    A dict has more settings: {"type": "yarn", "trained": (14, 14), "per_axis": False}. `trained` is n_train, by
    default `reference_shape`. Without `per_axis` the largest s is that of all axes. The grid at hand decides in every
    forward pass; on one that is not larger than the trained one no bit changes. Prefix tokens do not turn, and keep
    their length.

    Args:
        num_heads: attention heads.
        head_dim: channels of a head, even.
        layout: which channels form a pair.
        scaling: None for the encoding's own way, one of the names above, or a dict.

    Raises:
        ValueError: a scaling and an `extrapolate` that contradict it, or a scaling without a trained grid, or with one
            on another number of axes.

    Example:
        >>> rope = vp.create_encoding("rope_axial", num_heads=1, head_dim=8, reference_shape=(4, 4), scaling="ntk")
        >>> rope.angles(vp.Positions.grid((8, 4)))[0, -1].tolist()  # x runs to 3 and y to 7, whose slow pair is halved
        [3.0, 0.30000001192092896, 7.0, 0.3499999940395355]
    """

    def __init__(
        self,
        num_heads: Count,
        head_dim: Count,
        layout: AxialLayout = "interleaved",
        scaling: Scaling | None = None,
        **grid,
    ):
        super().__init__(num_heads, head_dim, layout, **grid)
        asked = self.extrapolate
        self.scaling = self.scaling if scaling is None else scaling
        if asked is not None and asked != self.extrapolate:
            raise ValueError(
                f"{self.name}: scaling={scaling!r} and extrapolate={asked} contradict each other; give one of them"
            )
        if (self.scales or (self.runs_on and self.extrapolation == "formula")) and self.trained_shape is None:
            raise ValueError(
                f"{self.name}: scaling={self.scaling!r} needs the grid that was trained on: give "
                "reference_shape=(h, w), or 'trained': (h, w) in a dict"
            )
        if self.scales:
            trained = check_size(f"{self.name}: the grid that was trained on", self.trained_shape, self.axes)
            self.axes = len(trained)

    @property
    def extrapolate(self) -> bool | None:
        """Return True for the scaling "run_on", False for "interpolate", else None; setting it sets `scaling`."""
        return {"run_on": True, "interpolate": False}.get(self.scaling) if isinstance(self.scaling, str) else None

    @extrapolate.setter
    def extrapolate(self, value: bool | None) -> None:
        self.scaling = {True: "run_on", False: "interpolate", None: None}[value]

    @property
    def scales(self) -> bool:
        """Return whether frequencies are scaled."""
        return self.scaling not in (None, "run_on", "interpolate")

    @property
    def runs_on(self) -> bool:
        return self.extrapolation == "run_on" if self.scaling is None else self.scaling != "interpolate"

    @property
    def settings(self) -> dict[str, Any]:
        """Return the settings of the scaling, defaults included."""
        return DEFAULTS | ({"type": self.scaling} if isinstance(self.scaling, str) else dict(self.scaling or {}))

    @property
    def trained_shape(self) -> tuple[int, ...] | None:
        """Return the grid that was trained on, or None."""
        trained = self.settings["trained"] if self.scales else None
        return self.reference_shape if trained is None else tuple(trained)

    def stretch(self, sizes: Sequence[int], trained: Sequence[int], device: torch.device) -> Tensor:
        """Return s of each axis, of `sizes` cells now and of `trained` before, (axes,) float64, at least 1."""
        one = to_float64(torch.ones((), device=device))
        s = torch.stack([one * (n / n_train) for n, n_train in zip(sizes, trained, strict=True)]).clamp(min=1)
        return s if self.settings["per_axis"] else s.amax().expand_as(s)

    def shrink(self, positions: Positions) -> Tensor:
        """Return coordinates (..., A) as "linear" has them, divided by s; any others as they are."""
        if not self.scales:
            return positions.coords
        s = self.stretch(positions.feat_shape, self.trained_shape, positions.coords.device)
        return to_float64(positions.coords) / s

    def scale(
        self,
        theta: Tensor,
        ratio: float,
        sizes: Sequence[int],
        trained: Sequence[int] | None,
        fastest: Sequence[float] | None = None,
    ) -> Tensor:
        """Return frequencies for each axis of the grid at hand, (axes, J); (J,) as they are if nothing scales them.

        Args:
            theta: (J,), or (axes, J) for another one on each axis, float64: a geometric series that falls.
            ratio: ln(theta_j / theta_(j + 1)).
            sizes: cells of each axis.
            trained: the same while training.
            fastest: what theta_0 is on each axis, in radians per step of the trained grid; by default 1.
        """
        if not self.scales:
            return theta
        settings, count, s = self.settings, theta.shape[-1], self.stretch(sizes, trained, theta.device).unsqueeze(-1)
        linear = theta / s
        if settings["type"] == "linear":
            return linear

        def blend(low: Tensor, high: Tensor, fast: float, slow: float) -> Tensor:
            """Return `high` above `fast` turns on the trained grid, `low` below `slow`, and a mixture between."""
            firsts = fastest or [1.0] * len(trained)
            turns = [n * first / (2 * math.pi) for n, first in zip(trained, firsts, strict=True)]  # of theta_0
            shares = [1 - ramp(count, ratio, each / fast, each / slow, s.device) for each in turns]
            return torch.lerp(low, high, torch.stack(shares))

        if settings["type"] == "yarn":
            return blend(linear, theta.expand_as(linear), settings["beta_fast"], settings["beta_slow"])
        ntk = theta * s ** -(to_float64(torch.arange(count, device=theta.device)) / max(count - 1, 1))
        if settings["type"] == "ntk":
            return ntk
        return blend(blend(linear, ntk, *BY_PARTS[0]), theta.expand_as(linear), *BY_PARTS[1])

    def turns_by_angles(self, positions: Positions) -> bool:
        """Return whether angles say all: YaRN also lengthens q and k, on another grid than the trained one."""
        lengthens = self.scales and self.settings["type"] == "yarn" and positions.feat_shape != self.trained_shape
        return super().turns_by_angles(positions) and not lengthens

    def prepare(self, positions: Positions) -> Any:
        table = super().prepare(positions)
        if not self.scales or self.settings["type"] != "yarn":
            return table
        s = self.stretch(positions.feat_shape, self.trained_shape, positions.coords.device)
        prefix, patches = table.split([positions.num_prefix_tokens, positions.num_patches], dim=-2)
        return torch.cat([prefix, patches * (1 + self.settings["attention_slope"] * s.amax().log()).to(table)], dim=-2)


def ramp(count: int, ratio: float, low: float, high: float, device: torch.device) -> Tensor:
    """Return 0 for the pairs that are less than `low` times slower than the fastest, 1 beyond `high`: (count,).

    A line lies between. Its ends are whole indices of pairs, as in the authors' code.
    """
    if ratio <= 0:
        raise ValueError("frequencies that are scaled by their turns must fall: temperature must be more than 1")
    first = max(math.floor(math.log(low) / ratio), 0)
    last = min(math.ceil(math.log(high) / ratio), 2 * count - 1)
    index = to_float64(torch.arange(count, device=device))
    return ((index - first) / (max(last, first + 0.001) - first)).clamp(0, 1)
