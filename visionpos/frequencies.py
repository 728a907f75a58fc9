"""The few lines of maths that sinusoids and rotations share. All of it in float64: rounded once, by the caller."""

from __future__ import annotations

import torch
from torch import Tensor


def to_float64(x: Tensor) -> Tensor:
    """Return x in float64, or in float32 on a device that has nothing wider (MPS)."""
    return x.to(torch.float32 if x.device.type == "mps" else torch.float64)


def geometric_frequencies(count: int, temperature: float, inclusive: bool = False, device=None) -> Tensor:
    """Return omega_i = temperature ** -(i / count), i = 0 .. count - 1, (count,) float64; the fastest is 1.

    With `inclusive` the exponent is i / (count - 1), so that the slowest is exactly 1 / temperature (big_vision).
    """
    if not 0 < temperature < float("inf"):
        raise ValueError(f"temperature must be positive, finite and a number, got {temperature}")
    steps = max(count - 1, 1) if inclusive else count
    return float(temperature) ** -(to_float64(torch.arange(count, device=device)) / steps)


def flat_index(coords: Tensor, feat_shape: tuple[int, ...]) -> Tensor:
    """Return the row-major index of coordinates (..., A) on a grid, y * W + x for two axes; real ones stay real."""
    index = to_float64(coords[..., 0])
    for axis, size in enumerate(feat_shape[1:], start=1):
        index = index * size + coords[..., axis]
    return index


def require_multiple(name: str, value: int, factor: int, reason: str) -> None:
    """Check that a width divides, and say in one clear line where it does not.

    Raises:
        ValueError: `value` is not a positive multiple of `factor`.
    """
    if value < factor or value % factor:
        raise ValueError(f"{name} must be a positive multiple of {factor} ({reason}), got {value}")
