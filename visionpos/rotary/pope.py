"""PoPE: polar coordinate position embedding (Gopalakrishnan et al. 2025, arXiv 2509.10534), on two axes."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..frequencies import to_float64
from ..options import Count, Positive, Size
from ..places import RotaryEncoding
from ..positions import Positions
from ..registry import register_encoding
from ..rotation import rotate
from .dialects import DIALECTS, axial_angles, axial_frequencies


@register_encoding("pope")
class PoPE(RotaryEncoding):
    """Content sets the magnitude of each channel of q and k, and the position alone sets its phase.

        q' = [m(q) cos a(p) | m(q) sin a(p)],  k' = [m(k) cos(a(p) + b) | m(k) sin(a(p) + b)],  m(z) = softplus(z)

    so that q' . k' = sum_c m(q_c) m(k_c) cos(a_c(p_k) - a_c(p_q) + b_c), which depends on the offset (dy, dx) alone.
    Half of the channels have the angle y theta, half x theta, theta_c = temperature ** (-2c / head_dim),
    c < head_dim / 2: as many frequencies as channels, where RoPE has one for two. b is learned for each head and
    channel, within [-2 pi, 0].

    q' and k' have 2 * head_dim channels, values keep theirs, and logits are scaled by 1 / sqrt(head_dim) as they were.
    Prefix tokens are at the position (0, 0): they, too, are given magnitudes and doubled.

    The paper is about sequences; two axes share the channels here as in axial RoPE, y first.

    Args:
        num_heads: attention heads.
        head_dim: channels of a head, even.
        temperature: of the frequencies; 100 as in `rope_axial` (10000 for the sequences of the paper).

    Attributes:
        phases: Parameter (heads, head_dim), b in radians; 0 at the start.

    Example:
        >>> pope = vp.create_encoding("pope", num_heads=1, head_dim=4)
        >>> q, k = torch.tensor([[1.0, -1.0, 0.5, 2.0], [0.0, 1.0, 2.0, 3.0]]).view(1, 1, 2, 4).expand(2, 1, 1, 2, 4)
        >>> q, k = pope(q, k, vp.Positions(torch.tensor([[0.0, 0.0], [1.0, 2.0]]), (2, 3)))
        >>> q.shape, (q @ k.mT)[0, 0, 0, 1]
        (torch.Size([1, 1, 2, 8]), tensor(6.3939))
    """

    paper = "Gopalakrishnan et al. 2025, arXiv 2509.10534"
    learnable = True
    widens = True
    linear = False
    translation_invariant = True
    extrapolation = "run_on"  # longer sequences, without more, are what the paper is about

    def __init__(
        self,
        num_heads: Count,
        head_dim: Count,
        temperature: Positive = 100.0,
        reference_shape: Size | None = None,
        extrapolate: bool | None = None,
    ):
        super().__init__(num_heads, head_dim, reference_shape=reference_shape, extrapolate=extrapolate)
        self.temperature = temperature
        self.phases = nn.Parameter(torch.empty(num_heads, head_dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set b to 0."""
        nn.init.zeros_(self.phases)

    @property
    def num_angles(self) -> int:
        """Return the number of angles per token: one for each channel."""
        return self.head_dim

    def encode(self, positions: Positions) -> Tensor:
        pairs, dialect = self.num_angles, DIALECTS["qwen_vit"]  # one block for y, then one for x
        theta = axial_frequencies(pairs, self.temperature, dialect, device=positions.coords.device)
        return axial_angles(positions.coords, theta, pairs, dialect)

    def rotate(self, x: Tensor, prepared: Tensor) -> Tensor:
        """Return queries x (B, heads, prefix + N, head_dim) as (B, heads, prefix + N, 2 head_dim)."""
        magnitude = F.softplus(x.to(torch.promote_types(x.dtype, prepared.dtype)))
        return torch.cat([magnitude * table for table in prepared.unbind(0)], dim=-1).to(x.dtype)

    def rotate_qk(self, q: Tensor, k: Tensor, prepared: Tensor) -> tuple[Tensor, Tensor]:
        """Return queries, and keys, which are turned by b as well."""
        b, least = to_float64(self.phases).unsqueeze(-2), -2 * math.pi  # (heads, 1, D)
        b = b.masked_fill(b > 0, 0).masked_fill(b < least, least)  # `clamp` may give no gradient at 0, where b starts
        cos, sin = b.cos().to(prepared.dtype), b.sin().to(prepared.dtype)
        exact = k.to(torch.promote_types(k.dtype, prepared.dtype))  # rounded once, at the end
        return self.rotate(q, prepared), rotate(self.rotate(exact, prepared), cos, sin, "half").to(k.dtype)
