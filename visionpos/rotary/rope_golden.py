"""Golden-gate RoPE: "On N-dimensional Rotary Positional Embeddings" (Xiong 2025, jerryxio.ng/posts/nd-rope)."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ..frequencies import geometric_frequencies, require_multiple, to_float64
from ..options import Count, Positive, Share
from ..positions import Positions
from ..registry import register_encoding
from ..rotation import Layout, mixed_angles
from .scaling import FrequencyRotary

PLASTIC = 1.324717957244746  # g^3 = g + 1, the golden ratio of three axes


@register_encoding("rope_golden")
class RopeGolden(FrequencyRotary):
    """Every pair turns along a fixed direction of its own; golden-angle steps spread them evenly over the plane.

    angle_i = omega_i (x' cos(i phi) + y' sin(i phi)), phi = pi (sqrt(5) - 1) / 2, with i counting the pairs of all
    heads one after the other, so that heads differ. In every head omega is spaced geometrically from `min_freq` to
    `max_freq`, both included. The image is a box of area 4 that keeps its shape: x' runs from -sqrt(W / H) to
    sqrt(W / H) and y' from -sqrt(H / W) to sqrt(H / W), from the first token to the last; an axis of one cell is 0.
    q . k depends on the offset (dy, dx) alone.

    i phi is half a turn times i / g, with the golden ratio, g^2 = g + 1. On three axes g^3 = g + 1 spreads directions
    over half a sphere (the R2 sequence, Roberts 2018): i / g of a turn about the axis of t', at the height i / g^2, of
    which the fraction counts. On one axis every pair turns with x'. The box then has the volume 8, or the length 2.
    Public code for more than two axes draws other directions, through the normal distribution.

    Args:
        num_heads: attention heads.
        head_dim: channels of a head, even.
        min_freq: radians per unit of the box; 0.2 to 1 recommended.
        max_freq: 20 to 100 recommended.
        zero_fraction: share of pairs that do not turn, the first of each head; 0.25 helped its author.
        num_directions: None for the golden angle. A number K makes K groups of pairs: group k turns along the angle
            pi k / K and has all the frequencies; heads are alike. 2 is axial, x first. `rope_spiral` deals out its
            directions in another way. For two axes.
        layout: "half" (the source) or "interleaved".
        scaling: of the frequencies on a larger grid, see `visionpos.rotary.scaling.FrequencyRotary`.

    Raises:
        ValueError: frequencies that are not 0 < min_freq <= max_freq, a share outside [0, 1), or directions that do
            not divide the pairs.
    """

    paper = "Xiong 2025, jerryxio.ng/posts/nd-rope"
    axes = None
    translation_invariant = True
    extrapolation = "formula"  # the box

    def __init__(
        self,
        num_heads: Count,
        head_dim: Count,
        min_freq: Positive = 0.2,
        max_freq: Positive = 20.0,
        zero_fraction: Share = 0.0,
        num_directions: Count | None = None,
        layout: Layout = "half",
        **grid_options,
    ):
        if num_directions is not None:
            self.axes = 2
        super().__init__(num_heads, head_dim, layout, **grid_options)
        if min_freq > max_freq:
            raise ValueError(f"frequencies must be 0 < min_freq <= max_freq, got {min_freq} and {max_freq}")
        if num_directions is not None:
            require_multiple("head_dim", head_dim, 2 * num_directions, "pairs of channels for each direction")
        self.min_freq, self.max_freq, self.zero_fraction = min_freq, max_freq, zero_fraction
        self.num_directions = num_directions

    def frequencies(self, device=None, feat_shape: tuple[int, ...] = (1, 1)) -> Tensor:
        """Return omega_i u_i, what multiplies x' and y' on a grid, (axes, heads or 1, pairs) float64, x' first."""
        groups, pairs = self.num_directions or 1, self.head_dim // 2
        still = min(round(self.zero_fraction * pairs / groups), pairs // groups - 1)  # at least one pair turns
        count, ratio = pairs // groups - still, self.min_freq / self.max_freq
        turning = self.min_freq * geometric_frequencies(count, ratio, inclusive=True, device=device)
        if self.scales:
            fastest = [self.max_freq * step for step in box_steps(self.trained_shape)]
            fall = -math.log(ratio) / max(count - 1, 1)
            turning = self.scale(turning.flip(0), fall, feat_shape, self.trained_shape, fastest).flip(-1)
        omega = F.pad(turning.expand(len(feat_shape), -1), (still, 0)).repeat(1, groups).flip(0)  # (axes, pairs)
        return self.directions(len(feat_shape), device) * omega.unsqueeze(1)

    def directions(self, axes: int, device=None) -> Tensor:
        """Return the unit vectors u_i, (axes, heads or 1, pairs) float64, x first.

        Raises:
            ValueError: more than three axes.
        """
        pairs = self.head_dim // 2
        if self.num_directions is not None:
            group = to_float64(torch.arange(self.num_directions, device=device))
            angle = (group * (math.pi / self.num_directions)).repeat_interleave(pairs // self.num_directions)[None]
            return torch.stack([angle.cos(), angle.sin()])
        index = to_float64(torch.arange(self.num_heads * pairs, device=device)).view(self.num_heads, pairs)
        if axes == 1:
            return torch.ones_like(index[None, :1])
        if axes == 2:
            angle = index * (math.pi * (math.sqrt(5) - 1) / 2)
            return torch.stack([angle.cos(), angle.sin()])
        if axes == 3:
            angle, height = index * (2 * math.pi / PLASTIC), index * PLASTIC**-2 % 1
            return torch.stack([*((1 - height**2).sqrt() * torch.stack([angle.cos(), angle.sin()])), height])
        raise ValueError(f"{self.name} needs 1 to 3 coordinates of a token, got {axes}")

    def locate(self, positions: Positions) -> Positions:
        return positions

    def encode(self, positions: Positions) -> Tensor:
        axes = zip(to_float64(positions.coords).unbind(-1), positions.feat_shape, strict=True)
        steps = box_steps(self.trained_shape if self.runs_on else positions.feat_shape)
        box = torch.stack([(i - (n - 1) / 2) * step for (i, n), step in zip(axes, steps, strict=True)], dim=-1)
        return mixed_angles(box, self.frequencies(box.device, positions.feat_shape))


def box_steps(feat_shape: tuple[int, ...]) -> list[float]:
    """Return the length of a grid step along each axis of the box, from the first token to the last."""
    side = math.prod(feat_shape) ** (1 / len(feat_shape))
    return [2 * (n / side) / max(n - 1, 1) for n in feat_shape]
