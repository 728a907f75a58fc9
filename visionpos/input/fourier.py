"""Fourier features: Perceiver (Jaegle et al. 2021, arXiv 2103.03206) and learnable (Li et al. 2021, arXiv 2106.02795).

Perceiver's formula was compared with timm's `build_fourier_pos_embed`; the learnable one is from memory of its paper.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from ..frequencies import geometric_frequencies, to_float64
from ..options import Count, Positive, Size
from ..places import InputEncoding
from ..positions import Positions
from ..registry import register_encoding


@register_encoding("fourier")
class Fourier(InputEncoding):
    """Sines and cosines of the position at many frequencies, through a learned map to the width of a token.

    Presets:
        perceiver: x += P f, f = [u | sin(pi f_b u) | cos(pi f_b u)], each part y before x, band after band. u is the
            position in a box: -1 at the first cell of an axis, 1 at the last (0 on an axis of one cell). The bands
            f_b of an axis of n cells go linearly from 1 to n / 2, its Nyquist frequency. Perceiver concatenates f to
            x instead; before a linear layer that is the same sum, P being the columns of f.
        learnable: x += W2 gelu(W1 [cos(W p) | sin(W p)] / sqrt(num_features) + b1) + b2 with p = (y, x) in units of
            one grid step and learned W ~ N(0, gamma^-2), so that similarity falls over about gamma steps.
        xcit: x += P f + b, f = [sin(u_y w_0), cos(u_y w_0), sin(u_y w_1), ... | the same of u_x], u = 2 pi (p + 1) / n
            on an axis of n cells and w_b = 10000 ** (-b / num_bands) (El-Nouby et al. 2021, arXiv 2106.09681).

    Prefix tokens get nothing.

    Args:
        dim: channels of a token.
        feat_shape: (H, W) of the grid that was trained on; sets the bands of "perceiver", whatever grid comes later.
        preset: "perceiver", "learnable" or "xcit".
        num_bands: bands per axis; "learnable" has twice as many directions W. None: 64, in "xcit" 16, as in the papers.
        hidden_dim: width of the hidden layer, for "learnable" only; None: 32, as in the paper.
        gamma: for "learnable" only; None: 10, as in the paper.

    Attributes:
        token_projection: xcit: Conv2d of 1 x 1, P (dim, 4 num_bands, 1, 1) and b (dim,), as in timm's Xcit.
        proj: perceiver: Linear without bias, P (dim, 2 + 4 num_bands).
        frequencies: learnable: Parameter W (2 num_bands, 2), columns y and x.
        mlp: learnable: Sequential(Linear, GELU, Linear).
    """

    paper = "Jaegle et al. 2021, arXiv 2103.03206"
    learnable = True
    extrapolation = "formula"  # the box of "perceiver" and "xcit"; "learnable" counts grid steps

    def __init__(
        self,
        dim: Count,
        feat_shape: Size,
        preset: Literal["perceiver", "learnable", "xcit"] = "perceiver",
        num_bands: Count | None = None,
        hidden_dim: Count | None = None,
        gamma: Positive | None = None,
    ):
        super().__init__(dim)
        if preset != "learnable" and (hidden_dim, gamma) != (None, None):
            raise ValueError(f"hidden_dim and gamma belong to preset 'learnable'; {preset!r} has neither")
        num_bands = num_bands or (16 if preset == "xcit" else 64)
        hidden_dim, gamma = 32 if hidden_dim is None else hidden_dim, 10.0 if gamma is None else gamma
        self.feat_shape, self.preset, self.num_bands, self.gamma = tuple(feat_shape), preset, num_bands, gamma
        if preset == "perceiver":
            self.proj = nn.Linear(2 + 4 * num_bands, dim, bias=False)
        elif preset == "xcit":
            self.token_projection = nn.Conv2d(4 * num_bands, dim, 1)
        else:
            self.frequencies = nn.Parameter(torch.empty(2 * num_bands, 2))
            self.mlp = nn.Sequential(nn.Linear(4 * num_bands, hidden_dim), nn.GELU(), nn.Linear(hidden_dim, dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw frequencies with standard deviation 1 / gamma, linear layers as torch draws them."""
        if self.preset == "learnable":
            nn.init.normal_(self.frequencies, std=1 / self.gamma)
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                module.reset_parameters()

    def features(self, positions: Positions) -> Float[Tensor, "*batch n features"]:
        """Return what the learned map reads, in float64: (N, 4 num_bands), for "perceiver" (N, 2 + 4 num_bands)."""
        coords = to_float64(positions.coords)
        if self.preset == "learnable":
            phase = coords @ to_float64(self.frequencies).t()
            return torch.cat([phase.cos(), phase.sin()], dim=-1) / math.sqrt(2 * phase.shape[-1])
        if self.preset == "xcit":
            omega = geometric_frequencies(self.num_bands, 10000.0, device=coords.device)
            axes = zip(coords.unbind(-1), positions.feat_shape, strict=True)
            u = torch.stack([2 * torch.pi * (p + 1) / (n + 1e-6) for p, n in axes], dim=-1)
            phase = u.unsqueeze(-1) * omega  # (N, axes, bands)
            return torch.stack([phase.sin(), phase.cos()], dim=-1).flatten(-3)
        box, phases = [], []
        for place, size, trained in zip(coords.unbind(-1), positions.feat_shape, self.feat_shape, strict=True):
            u = 2 * place / max(size - 1, 1) - min(size - 1, 1)
            bands = torch.linspace(1, trained / 2, self.num_bands, dtype=u.dtype, device=u.device)
            box.append(u.unsqueeze(-1))
            phases.append(torch.pi * u.unsqueeze(-1) * bands)
        phase = torch.cat(phases, dim=-1)
        return torch.cat([*box, phase.sin(), phase.cos()], dim=-1)

    def encode(self, positions: Positions) -> Tensor:
        x = self.features(positions).to(positions.coords.dtype)
        if self.preset == "perceiver":
            return F.linear(x, self.proj.weight.to(x.dtype))
        if self.preset == "xcit":
            return F.linear(
                x, self.token_projection.weight.flatten(1).to(x.dtype), self.token_projection.bias.to(x.dtype)
            )
        first, last = self.mlp[0], self.mlp[2]
        hidden = F.gelu(F.linear(x, first.weight.to(x.dtype), first.bias.to(x.dtype)))
        return F.linear(hidden, last.weight.to(x.dtype), last.bias.to(x.dtype))
