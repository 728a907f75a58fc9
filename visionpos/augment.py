"""Coordinates moved at random while training, for any encoding: DINOv3 (Simeoni et al. 2025, arXiv 2508.10104)."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch

from .positions import Positions


@dataclass(frozen=True)
class CoordinateAugmentation:
    """Shift, jitter and rescale the picture's frame, one draw for a forward pass: scale is not learned by heart.

    With c in [-1, 1] from border to border of the grid, each axis: c <- (c + s) j r, in this order. Before that every
    token can be moved by a draw of its own, the fuzzy positions of ViTAR (Fan et al. 2024, arXiv 2403.18361), which
    uses `token_jitter` 0.5 alone. The draws of a forward pass are the same for all its images, and tokens that are
    dropped later leave the others theirs.

    Args:
        shift: s is drawn from U[-shift, shift], for each axis.
        jitter: j is drawn log-uniformly from [1 / jitter, jitter], for each axis.
        rescale: r is drawn log-uniformly from [1 / rescale, rescale], for both axes together. The paper's pretraining
            uses rescale 2 alone.
        token_jitter: each token and axis is moved by U[-token_jitter, token_jitter], in steps of the grid.

    Raises:
        ValueError: a negative shift or token_jitter, or a jitter or rescale below 1; none may be infinite.

    Example:
        >>> model = vp.create_model("vit_tiny_patch16_224", "rope_axial", img_size=(32, 48), depth=1)
        >>> model.coordinate_augmentation = vp.CoordinateAugmentation(rescale=2.0)  # from now on, while training
        >>> positions = vp.Positions.grid((2, 3))
        >>> model.coordinate_augmentation(positions).feat_shape
        (2, 3)
    """

    shift: float = 0.0
    jitter: float = 1.0
    rescale: float = 1.0
    token_jitter: float = 0.0

    def __post_init__(self):
        for name, least in (("shift", 0), ("jitter", 1), ("rescale", 1), ("token_jitter", 0)):
            if not least <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be {least} or more, and finite, got {getattr(self, name)}")

    def __call__(self, positions: Positions, generator: torch.Generator | None = None) -> Positions:
        """Return the same tokens at other coordinates, drawn on the coordinates' device, without waiting for it."""
        coords, axes = positions.coords, len(positions.feat_shape)
        draws = torch.rand(2 * axes + 1, device=coords.device, dtype=coords.dtype, generator=generator) * 2 - 1
        shift = self.shift * draws[:axes]  # of U[-1, 1]
        scale = (math.log(self.jitter) * draws[axes:-1] + math.log(self.rescale) * draws[-1]).exp()
        if self.token_jitter:  # drawn after the others, which stay what they are without it
            own = torch.rand(coords.shape, device=coords.device, dtype=coords.dtype, generator=generator) * 2 - 1
            coords = coords + self.token_jitter * own
        size = torch.cat([coords.new_full((1,), n) for n in positions.feat_shape])  # copies nothing from the host
        box = (2 * coords + 1) / size - 1
        moved = ((box + shift) * scale + 1) * size / 2 - 0.5
        return replace(positions, coords=moved, is_grid=False)
