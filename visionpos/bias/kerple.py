"""KERPLE: kernelized relative positions (Chi et al. 2022, arXiv 2205.09921)."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from ..options import Count
from ..places import BiasEncoding
from ..positions import Positions
from ..registry import register_encoding
from .offsets import bias_of_offsets, distance

SMALLEST = 0.01
# upper ends of the uniform distributions that r1 and r2 are drawn from, and the largest r2
PRESETS = {"log": (2.0, 1.0, None), "power": (1.0, 2.0, 2.0)}


def _clamped(parameter: Tensor, low: float, high: float | None) -> Tensor:
    """Return it clamped, with the gradient of the parameter itself, so that one at the end of its range comes back."""
    return parameter + (parameter.clamp(low, high) - parameter).detach()


def power(base: Tensor, exponent: Tensor) -> Tensor:
    """Return base ** exponent of numbers from 0 on; where the base is 0 it and all its derivatives are 0."""
    positive = base > 0
    return torch.where(positive, torch.where(positive, base, 1) ** exponent, 0)


@register_encoding("kerple")
class Kerple(BiasEncoding):
    """A learned fall with distance, one shape per head: b = -r1 log(1 + r2 d), or b = -r1 d ** r2.

    d = ||p - p'||, the Euclidean distance in units of one grid step: the paper's |m - n| in one dimension, and, as
    there, a conditionally positive definite kernel in any number of dimensions. The paper's text models are causal;
    here attention goes in both directions.

    r1 and r2 act as if clamped, r1, r2 >= 0.01 and r2 <= 2 in "power". The authors clamp the parameters themselves in
    every forward pass; here they stay what the optimiser made them, and the gradient passes the clamp.

    Presets:
        log: b = -r1 log(1 + r2 d), the paper's best; r1 drawn from U(0, 2), r2 from U(0, 1).
        power: b = -r1 d ** r2; r1 drawn from U(0, 1), r2 from U(0, 2).

    Args:
        num_heads: attention heads.
        preset: "log" or "power".

    Attributes:
        r1: Parameter (heads,).
        r2: Parameter (heads,).

    Raises:
        ValueError: an unknown preset.
    """

    paper = "Chi et al. 2022, arXiv 2205.09921"
    learnable = True
    translation_invariant = True
    axes = None
    extrapolation = "run_on"  # to test on longer sequences is what it is made for

    def __init__(self, num_heads: Count, preset: Literal["log", "power"] = "log", **grid_options):
        super().__init__(num_heads, **grid_options)
        self.preset = preset
        self.r1, self.r2 = nn.Parameter(torch.empty(num_heads)), nn.Parameter(torch.empty(num_heads))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw r1 and r2 from the preset's uniform distributions."""
        for parameter, high in zip((self.r1, self.r2), PRESETS[self.preset], strict=False):
            nn.init.uniform_(parameter, SMALLEST, high)

    def encode(self, queries: Positions, keys: Positions) -> Tensor:
        dtype = queries.coords.dtype
        r1 = _clamped(self.r1.to(dtype), SMALLEST, None)
        r2 = _clamped(self.r2.to(dtype), SMALLEST, PRESETS[self.preset][2])

        def bias(delta: Tensor) -> Tensor:
            d = distance(delta)
            return -r1 * (torch.log1p(r2 * d) if self.preset == "log" else power(d, r2))

        return bias_of_offsets(bias, queries, keys)
