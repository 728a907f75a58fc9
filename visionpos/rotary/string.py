"""STRING: "Learning the RoPEs" (Schenck et al. 2025, arXiv 2502.02562)."""

from __future__ import annotations

import math
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ..frequencies import geometric_frequencies, require_multiple, to_float64
from ..options import Count, Positive, Spread
from ..positions import Positions
from ..registry import register_encoding
from ..rotation import Layout, mixed_angles
from .basis import BasisRotary
from .blocks import skew
from .rope_mixed import RopeMixed
from .scaling import LearnedScaling


@register_encoding("string")
class String(BasisRotary):
    """RoPE in a learned basis: R(p) = exp(x L_x + y L_y) = Q RoPE(p) Q^T, for learned generators that commute.

    Preset "cayley": Q = (I - S)(I + S)^-1 with S learned and skew-symmetric, and axial RoPE with learned frequencies,
    half of the pairs for x, half for y. Preset "circulant": L = C - C^T with C circulant, c its first column (a first
    row enters as -c). Its basis Q is the real Fourier basis; pair m >= 1 turns by 2 sum_k c_k sin(2 pi m k / head_dim),
    pair 0 (mean and Nyquist) not at all. q . k depends on the offset (dy, dx) alone.

    Attention multiplies q and k by RoPE(p) Q^T, since the outer Q cancels in q . k. The paper has (I - S)(I + S)^-1 in
    the place of Q^T, so that its S enters with the other sign. No code of the authors is public; what is computed here
    is compared with these formulas.

    When training is over, Q^T goes into the projection: `fold` its weight and bias and replace this encoding by
    `folded()`, at no cost. A model that normalises q and k after the projection cannot be folded.

    Args:
        num_heads: attention heads.
        head_dim: channels of a head, a multiple of 4.
        preset: "cayley" or "circulant".
        temperature: of the frequencies "cayley" starts with, those of `rope_axial`.
        init_std: standard deviation of S or C before training (our choice: the paper does not say).
        layout: which channels of the basis form a pair, "interleaved" or "half".
        scaling: on a larger grid: "interpolate", "run_on" or "linear", see `visionpos.rotary.scaling`. Learned
            frequencies are no geometric series, whose ends NTK and YaRN would need.

    Attributes:
        skew: Parameter (heads, head_dim (head_dim - 1) / 2), the upper triangle of S ("cayley").
        freqs: Parameter (heads, head_dim / 2), first those of x, then those of y ("cayley").
        circulant: Parameter (2, heads, head_dim / 2 - 1), c_k of L_x and of L_y, k = 1 .. ("circulant"); C - C^T holds
            no more than these differences c_k - c_-k.

    Raises:
        ValueError: an unknown preset, or a `head_dim` that is not a multiple of 4.
    """

    paper = "Schenck et al. 2025, arXiv 2502.02562"
    learnable = True
    translation_invariant = True
    num_series = 2
    extrapolation = "run_on"  # as the RoPE that it is in another basis; the paper names no other way

    def __init__(
        self,
        num_heads: Count,
        head_dim: Count,
        preset: Literal["cayley", "circulant"] = "cayley",
        temperature: Positive = 100.0,
        init_std: Spread = 0.02,
        layout: Layout = "interleaved",
        scaling: LearnedScaling | None = None,
        **grid_options,
    ):
        super().__init__(num_heads, head_dim, layout, scaling, **grid_options)
        require_multiple("head_dim", head_dim, 4, "pairs of channels for each of two axes")
        if preset == "circulant" and self.zero_fraction:
            raise ValueError("the frequencies of preset 'circulant' have no order, and it takes no zero_fraction")
        self.preset, self.temperature, self.init_std = preset, temperature, init_std
        if preset == "cayley":
            self.skew = nn.Parameter(torch.empty(num_heads, head_dim * (head_dim - 1) // 2))
            self.freqs = nn.Parameter(torch.empty(num_heads, head_dim // 2))
        else:
            self.circulant = nn.Parameter(torch.empty(2, num_heads, head_dim // 2 - 1))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw S or C from a normal distribution of standard deviation `init_std`; frequencies as `rope_axial`."""
        nn.init.normal_(self.skew if self.preset == "cayley" else self.circulant, std=self.init_std)
        if self.preset == "cayley":
            self.freqs.copy_(geometric_frequencies(self.head_dim // 4, self.temperature).repeat(2))

    def frequencies(self) -> Float[Tensor, "2 heads pairs"]:
        """Return what multiplies x and y in the angle of each pair, (2, heads, head_dim / 2), float64."""
        if self.preset == "cayley":
            x, y = to_float64(self.freqs).chunk(2, dim=-1)
            none = torch.zeros_like(x)
            return torch.stack([torch.cat([x, none], dim=-1), torch.cat([none, y], dim=-1)])
        k = to_float64(torch.arange(self.head_dim // 2, device=self.circulant.device))
        waves = 2 * (2 * math.pi / self.head_dim * k[1:, None] * k).sin()  # (k, pair)
        return to_float64(self.circulant) @ waves

    def basis(self) -> Float[Tensor, "heads d d"]:
        """Return the orthogonal matrix Q, (heads or 1, head_dim, head_dim), float64; `layout` pairs its columns."""
        if self.preset == "cayley":
            s = skew(to_float64(self.skew), self.head_dim)
            eye = torch.eye(self.head_dim, dtype=s.dtype, device=s.device)
            return torch.linalg.solve_ex(eye + s, eye - s, check_errors=False).result  # I + S is never singular
        d = self.head_dim
        n = to_float64(torch.arange(d, device=self.circulant.device))
        turns = 2 * math.pi / d * n[:, None] * n[: d // 2]
        cosines, sines = math.sqrt(2 / d) * turns.cos(), math.sqrt(2 / d) * turns.sin()
        cosines[:, 0], sines[:, 0] = d**-0.5, d**-0.5 * (math.pi * n).cos()  # mean and Nyquist
        pairs = torch.stack([cosines, sines], dim=-1 if self.layout == "interleaved" else -2)
        return pairs.flatten(1).unsqueeze(0)

    def bases(self) -> tuple[Tensor, Tensor]:
        basis = self.basis()
        return basis, basis

    def encode(self, positions: Positions) -> Tensor:
        return mixed_angles(self.shrink(positions), self.frequencies())

    def folded(self) -> RopeMixed:
        """Return what is left of this encoding for a folded projection: RoPE with its frequencies."""
        kept = ("layout", "zero_fraction", "reference_shape", "scaling")
        rope = RopeMixed(self.num_heads, self.head_dim, **{key: getattr(self, key) for key in kept})
        rope.freqs = nn.Parameter(self.frequencies().detach().to(next(self.parameters())))
        return rope
