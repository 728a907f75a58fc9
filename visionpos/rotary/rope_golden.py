"""Golden-gate RoPE: "On N-dimensional Rotary Positional Embeddings" (Xiong 2025, jerryxio.ng/posts/nd-rope)."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ..encoding import Shape
from ..frequencies import geometric_frequencies, require_multiple, to_float64
from ..options import Count, Positive, Share
from ..positions import Positions
from ..registry import register_encoding
from ..rotation import Layout, mixed_angles
from .scaling import FrequencyRotary


@register_encoding("rope_golden")
class RopeGolden(FrequencyRotary):
    """Every pair turns along a fixed direction of its own; golden-angle steps spread them evenly over the plane.

    angle_i = omega_i (x' cos(i phi) + y' sin(i phi)), phi = pi (sqrt(5) - 1) / 2, with i counting the pairs of all
    heads one after the other, so that heads differ. In every head omega is spaced geometrically from `min_freq` to
    `max_freq`, both included. The image is a box of area 4 that keeps its shape: x' runs from -sqrt(W / H) to
    sqrt(W / H) and y' from -sqrt(H / W) to sqrt(H / W), from the first token to the last; an axis of one cell is 0.
    q . k depends on the offset (dy, dx) alone.

    Args:
        num_heads: attention heads.
        head_dim: channels of a head, even.
        min_freq: radians per unit of the box; 0.2 to 1 recommended.
        max_freq: 20 to 100 recommended.
        zero_fraction: share of pairs that do not turn, the first of each head; 0.25 helped its author.
        num_directions: None for the golden angle. A number K makes K groups of pairs: group k turns along the angle
            pi k / K and has all the frequencies; heads are alike. 2 is axial, x first. `rope_spiral` deals out its
            directions in another way.
        layout: "half" (the source) or "interleaved".
        scaling: of the frequencies on a larger grid, see `visionpos.rotary.scaling.FrequencyRotary`.

    Raises:
        ValueError: frequencies that are not 0 < min_freq <= max_freq, a share outside [0, 1), or directions that do
            not divide the pairs.
    """

    paper = "Xiong 2025, jerryxio.ng/posts/nd-rope"
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
        super().__init__(num_heads, head_dim, layout, **grid_options)
        if min_freq > max_freq:
            raise ValueError(f"frequencies must be 0 < min_freq <= max_freq, got {min_freq} and {max_freq}")
        if num_directions is not None:
            require_multiple("head_dim", head_dim, 2 * num_directions, "pairs of channels for each direction")
        self.min_freq, self.max_freq, self.zero_fraction = min_freq, max_freq, zero_fraction
        self.num_directions = num_directions

    def frequencies(self, device=None, feat_shape: Shape | None = None) -> Tensor:
        """Return omega_i u_i, what multiplies x and y, scaled for a grid if given: (2, heads or 1, pairs), float64."""
        groups, pairs = self.num_directions or 1, self.head_dim // 2
        still = min(round(self.zero_fraction * pairs / groups), pairs // groups - 1)  # at least one pair turns
        count, ratio = pairs // groups - still, self.min_freq / self.max_freq
        turning = self.min_freq * geometric_frequencies(count, ratio, inclusive=True, device=device)
        if feat_shape is not None:
            fastest = [self.max_freq * step for step in box_steps(self.trained_shape)]
            fall = -math.log(ratio) / max(count - 1, 1)
            turning = self.scale(turning.flip(0), fall, feat_shape, self.trained_shape, fastest).flip(-1)
        omega = F.pad(turning.expand(2, -1), (still, 0)).repeat(1, groups).flip(0).unsqueeze(1)  # (2, 1, pairs)
        if self.num_directions is None:
            index = to_float64(torch.arange(self.num_heads * pairs, device=device)).view(self.num_heads, pairs)
            direction = index * (math.pi * (math.sqrt(5) - 1) / 2)
        else:
            index = to_float64(torch.arange(groups, device=device)).repeat_interleave(pairs // groups)
            direction = (index * (math.pi / groups)).unsqueeze(0)
        return torch.stack([direction.cos(), direction.sin()]) * omega

    def locate(self, positions: Positions) -> Positions:
        return positions

    def encode(self, positions: Positions) -> Tensor:
        axes = zip(to_float64(positions.coords).unbind(-1), positions.feat_shape, strict=True)
        steps = box_steps(self.trained_shape if self.runs_on else positions.feat_shape)
        box = torch.stack([(i - (n - 1) / 2) * step for (i, n), step in zip(axes, steps, strict=True)], dim=-1)
        return mixed_angles(box, self.frequencies(box.device, positions.feat_shape if self.runs_on else None))


def box_steps(feat_shape: Shape) -> list[float]:
    """Return the length of a grid step along each axis of the box, from the first token to the last."""
    height, width = feat_shape
    halves = math.sqrt(height / width), math.sqrt(width / height)
    return [2 * half / max(n - 1, 1) for n, half in zip(feat_shape, halves, strict=True)]
