"""Spiral RoPE: "Spiral RoPE: Rotate Your Rotary Positional Embeddings in the 2D Plane" (Liu 2026, arXiv 2602.03227)."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from ..encoding import Shape
from ..frequencies import geometric_frequencies, require_multiple, to_float64
from ..options import Count, Positive
from ..positions import Positions
from ..registry import register_encoding
from ..rotation import Layout, mixed_angles
from .scaling import FrequencyRotary


@register_encoding("rope_spiral")
class RopeSpiral(FrequencyRotary):
    """Every frequency turns along two directions at a right angle, and neighbouring frequencies along other ones.

    With P = head_dim / 4 frequencies and K directions, spread evenly over half a turn, the angles of a token are

        pairs 0 .. P - 1:   f_p (X sin t_p + Y cos t_p)
        pairs P .. 2P - 1:  f_p (X cos t_p - Y sin t_p)

    with f_p = max_freq * temperature ** (-4p / head_dim) and t_p = (floor(p / 2) mod K / 2) pi / K. An axis of n cells
    has the coordinates i G / n, G = `reference_side`: a picture has G steps whatever its grid, and grids of different
    size align at their top-left tokens. q . k depends on the offset (dy, dx) alone. K = 2 is axial, y first.

    The authors' code turns about the middle of the picture, which adds the same number to all patches of a pair and so
    leaves q . k of two patches as it is, and for K > 2 it reads the angles of rotated places from a table that ends
    at the picture's border: a fifth to a third of its tokens, those near the corners, have other angles than the
    formula, which is what is computed here.

    Args:
        num_heads: attention heads (all turn alike).
        head_dim: channels of a head, a multiple of 2 * `num_directions`.
        num_directions: K, even; 4 is the default of the authors' code, 8 in their DeiT.
        temperature: ratio that the geometric series of frequencies would reach; 10000 in the paper.
        max_freq: the highest frequency, in radians for each of the G steps; 1.5 in the paper.
        reference_side: G; 14 in the paper, whose pictures have 14 x 14 patches.
        layout: "interleaved" (the paper) or "half".
        scaling: of the frequencies on a larger grid, see `visionpos.rotary.scaling.FrequencyRotary`.
        zero_fraction: share of the frequencies, the lowest, that are 0.

    Raises:
        ValueError: an odd number of directions, or a `head_dim` that they do not divide.

    Example:
        >>> rope = vp.create_encoding("rope_spiral", num_heads=1, head_dim=16)
        >>> token = vp.Positions(torch.tensor([[1.0, 2.0]]), (14, 14))  # one down, two to the right
        >>> rope.angles(token)[0, 0, :4]
        tensor([1.5000, 0.1500, 0.0318, 0.0032])
    """

    paper = "Liu 2026, arXiv 2602.03227"
    translation_invariant = True
    extrapolation = "formula"  # the frame of `reference_side` steps
    num_series = 2

    def __init__(
        self,
        num_heads: Count,
        head_dim: Count,
        num_directions: Count = 4,
        temperature: Positive = 10000.0,
        max_freq: Positive = 1.5,
        reference_side: Count = 14,
        layout: Layout = "interleaved",
        **grid_options,
    ):
        super().__init__(num_heads, head_dim, layout, **grid_options)
        require_multiple("num_directions", num_directions, 2, "each has one at a right angle")
        require_multiple("head_dim", head_dim, 2 * num_directions, "two pairs of channels for each direction")
        self.num_directions, self.temperature, self.max_freq = num_directions, temperature, max_freq
        self.reference_side = reference_side

    def frequencies(self, device=None, feat_shape: Shape | None = None) -> Tensor:
        """Return what multiplies X and Y in the angle of each pair, (2, 1, head_dim / 2); scaled for a grid."""
        count, half = self.head_dim // 4, self.num_directions // 2
        f = self.max_freq * geometric_frequencies(count, self.temperature, device=device)  # (P,)
        if feat_shape is not None:
            fastest = [self.max_freq * self.reference_side / n for n in self.trained_shape]
            f = self.scale(f, math.log(self.temperature) / count, feat_shape, self.trained_shape, fastest)
        fy, fx = f.expand(2, -1)
        t = to_float64(torch.arange(count, device=device) // 2 % half) * (math.pi / self.num_directions)
        of_x, of_y = [fx * t.sin(), fx * t.cos()], [fy * t.cos(), -fy * t.sin()]
        return torch.stack([torch.cat(of_x), torch.cat(of_y)]).unsqueeze(1)

    def locate(self, positions: Positions) -> Positions:
        trained = self.trained_shape if self.runs_on else positions.feat_shape
        axes = zip(to_float64(positions.coords).unbind(-1), trained, strict=True)
        coords = torch.stack([i * (self.reference_side / n) for i, n in axes], dim=-1)
        return replace(positions, coords=coords, is_grid=False)

    def encode(self, positions: Positions) -> Tensor:
        grid = positions.feat_shape if self.runs_on else None
        return mixed_angles(positions.coords, self.frequencies(positions.coords.device, grid))
