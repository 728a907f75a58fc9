"""HARoPE: head-wise adaptive RoPE (Li et al. 2025, arXiv 2510.10489)."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..frequencies import require_multiple, to_float64
from ..options import Count, Positive, Scale
from ..positions import Positions
from ..registry import register_encoding
from ..rotation import Layout
from .basis import BasisRotary
from .blocks import skew, skew_exp
from .dialects import DIALECTS, axial_angles, axial_frequencies, scale_axial
from .rope_axial import RopeAxial


@register_encoding("harope")
class HARoPE(BasisRotary):
    """Axial RoPE behind a learned invertible matrix M for each head: q goes to M q, k to M^-T k, and both turn.

    M = U diag(s) V^T, U = exp((A_u - A_u^T) / 2), V likewise, s = softplus(sigma) + 1e-6. At the start A = 0 and
    s = 1, so that it is `rope_axial`; without an offset q . k stays what it is for every M. `string` is the case s = 1
    of an orthogonal M. q . k depends on the offset (dy, dx) alone.

    When training is over, M and M^-T go into the projections: `fold` their weight and bias and replace this encoding
    by `folded()`, at no cost. In a model that normalises q and k after the projection M comes behind the norm and
    cannot be folded.

    Args:
        num_heads: attention heads.
        head_dim: channels of a head, a multiple of 4.
        temperature: of the rotation, which is that of `rope_axial`; the paper takes the RoPE of each model.
        init_std: standard deviation of the entries of A - A^T before training; 0 in the paper.
        layout: "interleaved" or "half".
        scaling: of the frequencies on a larger grid, see `visionpos.rotary.scaling.FrequencyRotary`.

    Attributes:
        skew_u: Parameter (heads, head_dim (head_dim - 1) / 2), the upper triangle of A_u - A_u^T, row by row.
        skew_v: likewise of A_v.
        sigma: Parameter (heads, head_dim).

    Raises:
        ValueError: a `head_dim` that is not a multiple of 4.

    Example:
        >>> harope = vp.create_encoding("harope", num_heads=2, head_dim=8)
        >>> axial = vp.create_encoding("rope_axial", num_heads=2, head_dim=8)
        >>> q, positions = torch.randn(1, 2, 6, 8), vp.Positions.grid((2, 3))
        >>> torch.allclose(harope(q, q, positions)[0], axial(q, q, positions)[0], atol=1e-5)
        True
    """

    paper = "Li et al. 2025, arXiv 2510.10489"
    learnable = True
    translation_invariant = True
    extrapolation = "run_on"  # as `rope_axial`, which it starts as
    num_series = 2

    def __init__(
        self,
        num_heads: Count,
        head_dim: Count,
        temperature: Positive = 100.0,
        init_std: Scale = 0.0,
        layout: Layout = "interleaved",
        **grid_options,
    ):
        super().__init__(num_heads, head_dim, layout, **grid_options)
        require_multiple("head_dim", head_dim, 4, "pairs of channels for each of two axes")
        self.temperature, self.init_std = temperature, init_std
        self.skew_u = nn.Parameter(torch.empty(num_heads, head_dim * (head_dim - 1) // 2))
        self.skew_v = nn.Parameter(torch.empty(num_heads, head_dim * (head_dim - 1) // 2))
        self.sigma = nn.Parameter(torch.empty(num_heads, head_dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw A from a normal distribution of standard deviation `init_std`; s is 1."""
        nn.init.normal_(self.skew_u, std=self.init_std)
        nn.init.normal_(self.skew_v, std=self.init_std)
        nn.init.constant_(self.sigma, math.log(math.e - 1))

    def bases(self) -> tuple[Tensor, Tensor]:
        u, v = (skew_exp(skew(to_float64(upper), self.head_dim) / 2) for upper in (self.skew_u, self.skew_v))
        s = F.softplus(to_float64(self.sigma)).unsqueeze(-2) + 1e-6  # (heads, 1, D)
        return (v * s) @ u.mT, (v / s) @ u.mT  # M^T and M^-1

    def encode(self, positions: Positions) -> Tensor:
        pairs, dialect = self.num_angles, DIALECTS["rope_vit"]
        theta = axial_frequencies(pairs, self.temperature, dialect, device=positions.coords.device)
        return axial_angles(positions.coords, scale_axial(self, theta, positions, dialect), pairs, dialect)

    def folded(self) -> RopeAxial:
        """Return what is left of this encoding for a folded projection: axial RoPE."""
        kept = ("temperature", "layout", "zero_fraction", "reference_shape", "scaling")
        return RopeAxial(self.num_heads, self.head_dim, **{key: getattr(self, key) for key in kept})
