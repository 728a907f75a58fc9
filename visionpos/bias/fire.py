"""FIRE: functional interpolation for relative positions (Li et al. 2023, arXiv 2310.04418)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ..options import Count, GridSize, Positive
from ..places import BiasEncoding
from ..positions import Positions
from ..registry import register_encoding
from .offsets import bias_of_offsets, distance, run_mlp


def fire_input(distance: Tensor, reach: float, c: Tensor, threshold: Tensor) -> Tensor:
    """Return ln(c d + 1) / ln(c max(L, reach) + 1), the input of FIRE's network; the signs of c and L do not matter."""
    c = c.abs().clamp(min=1e-6)
    normaliser = threshold.abs().clamp(min=torch.full_like(threshold, reach))  # compared as rounded: equal is not below
    return torch.log1p(c * distance) / torch.log1p(c * normaliser)


def diameter(feat_shape: tuple[int, ...]) -> float:
    """Return the distance of opposite corner tokens; 1 where there is a single token."""
    return max(math.hypot(*(size - 1 for size in feat_shape)), 1.0)


@register_encoding("fire")
class Fire(BiasEncoding):
    """A small network of the distance relative to how far one can see: b = MLP(ln(c d + 1) / ln(c max(L, D) + 1)).

    d = ||p - p'||, the Euclidean distance in units of one grid step, and D the grid's diameter, the distance of its
    corners. The paper is for causal text and has the query's index there, the distance of its farthest key; an image
    has no such order. So the input lies in [0, 1] on every grid of a diameter of at least L: on a larger grid
    distances are interpolated.

    L starts at the diameter of the grid that the encoding was built for. There a learned L > D stretches the input's
    scale, and one below has no effect (and gets no gradient), as in the paper for queries farther than L. Public code
    learns a multiplier m instead, from 1, with L = m L0 and L0 kept: the same functions, other steps of an optimiser.

    Args:
        num_heads: attention heads.
        feat_shape: (H, W) of the grid.
        init_c: the initial c.
        init_L: the initial L. None: the diameter of `feat_shape`.

    Attributes:
        mlp: Sequential(Linear(1, 32), ReLU, Linear(32, heads)).
        c: Parameter (), how early the logarithm bends.
        L: Parameter (), the smallest normaliser.

    Raises:
        ValueError: c or L is not positive.
    """

    paper = "Li et al. 2023, arXiv 2310.04418"
    learnable = True
    translation_invariant = True
    axes = None
    extrapolation = "formula"  # the normaliser

    def __init__(self, num_heads: Count, feat_shape: GridSize, init_c: Positive = 0.1, init_L: Positive | None = None):
        super().__init__(num_heads)
        self.init_c, self.init_L = init_c, diameter(feat_shape) if init_L is None else init_L
        self.mlp = nn.Sequential(nn.Linear(1, 32), nn.ReLU(), nn.Linear(32, num_heads))
        self.c, self.L = nn.Parameter(torch.empty(())), nn.Parameter(torch.empty(()))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set c and L as given, and draw the network as torch initialises linear layers."""
        nn.init.constant_(self.c, self.init_c)
        nn.init.constant_(self.L, self.init_L)
        self.mlp[0].reset_parameters()
        self.mlp[2].reset_parameters()

    def encode(self, queries: Positions, keys: Positions) -> Tensor:
        dtype, reach = queries.coords.dtype, diameter(queries.feat_shape)
        c, threshold = self.c.to(dtype), self.L.to(dtype)

        def bias(delta: Tensor) -> Tensor:
            return run_mlp(self.mlp, fire_input(distance(delta), reach, c, threshold))

        return bias_of_offsets(bias, queries, keys)
