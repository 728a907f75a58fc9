"""Sinusoid of the flat token index: "Attention Is All You Need" (Vaswani et al. 2017, arXiv 1706.03762)."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from ..frequencies import flat_index, geometric_frequencies, require_multiple, to_float64
from ..options import Count, Positive
from ..places import InputEncoding
from ..positions import Positions
from ..registry import register_encoding

SinCosLayout = Literal["interleaved", "split"]


def sincos_1d(
    positions: Tensor, dim: int, temperature: float = 10000.0, layout: SinCosLayout = "interleaved"
) -> Float[Tensor, "*batch n dim"]:
    """Return sinusoids of positions p: PE[p, 2i] = sin(p w_i), PE[p, 2i + 1] = cos(p w_i), i = 0 .. dim / 2 - 1.

    The frequencies are w_i = temperature ** (-2i / dim), in radians per position.

    Args:
        positions: (..., N) positions, integer or real.
        dim: channels, even.
        temperature: ratio of the fastest to the (excluded) slowest frequency.
        layout: "interleaved" sin, cos, sin, cos (the paper), or "split": all sines, then all cosines (tensor2tensor).

    Returns:
        (..., N, dim), computed in float64; in the dtype of `positions` if that is floating, else in the default dtype.

    Raises:
        ValueError: an odd `dim`, a temperature that is not positive, or an unknown layout.

    Example:
        >>> vp.sincos_1d(torch.tensor([0, 1]), dim=4)
        tensor([[0.0000, 1.0000, 0.0000, 1.0000],
                [0.8415, 0.5403, 0.0100, 0.9999]])
    """
    if layout not in ("interleaved", "split"):
        raise ValueError(f"layout must be 'interleaved' or 'split', got {layout!r}")
    require_multiple("dim", dim, 2, "a sine and a cosine for each frequency")
    omega = geometric_frequencies(dim // 2, temperature, device=positions.device)
    angles = to_float64(positions)[..., None] * omega
    waves = angles.sin(), angles.cos()
    table = torch.stack(waves, dim=-1).flatten(-2) if layout == "interleaved" else torch.cat(waves, dim=-1)
    return table.to(positions.dtype if positions.is_floating_point() else torch.get_default_dtype())


@register_encoding("sinusoidal")
class Sinusoidal(InputEncoding):
    """Sinusoid of the flat row-major index p = y W + x, so that vertical neighbours are W apart.

    x += PE[p] with `sincos_1d`. Every row is a rotation of every other, PE(p + k) = M_k PE(p): linear in the relative
    offset. Its inner product falls with distance as a trend only, not at every step.

    Args:
        dim: channels of a token, even.
        temperature: 10000 in the paper.
        layout: "interleaved" (the paper) or "split".
    """

    paper = "Vaswani et al. 2017, arXiv 1706.03762"
    extrapolation = "run_on"  # the paper's formula of the index
    axes = None

    def __init__(
        self, dim: Count, temperature: Positive = 10000.0, layout: SinCosLayout = "interleaved", **grid_options
    ):
        super().__init__(dim, **grid_options)
        require_multiple("dim", dim, 2, "a sine and a cosine for each frequency")
        self.temperature, self.layout = temperature, layout

    def encode(self, positions: Positions) -> Tensor:
        index = flat_index(positions.coords, positions.feat_shape)
        return sincos_1d(index, self.dim, self.temperature, self.layout)
