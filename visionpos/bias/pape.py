"""PaPE: "Parabolic Position Encoding" (Ohrstrom et al. 2026, arXiv 2602.01418)."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..options import Count
from ..places import ContextualBias
from ..positions import Positions
from ..registry import register_encoding


@register_encoding("pape")
class PaPE(ContextualBias):
    """The query chooses parabolas over the plane, whose vertex can lie anywhere: b = sum_m -a_m dz_m^2 + b_m dz_m.

    dz = z_q - z_k, z = W_p p for M parabolas per head; a = softplus(W_a x) and b = W_b x of the layer's input x at the
    query. Since z is linear in p, the M parabolas of a query are one: with D = p_q - p_k,
        bias = -D^T S D + beta . D,   S = sum_m a_m w_m w_m^T,   beta = sum_m b_m w_m,
    which is what is computed: a cost without M, and no squares of large coordinates to cancel.

    Prefix tokens have no bias by default. The reference code, for its class token, has: patches are counted from 1 on
    both axes there, and the token stands at (0, 0), one step outside the corner of the picture. `prefix="corner"` does
    the same.

    Presets:
        pape: as above.
        ri: rotation-invariant: b = -a (s |D|)^2, one a per query and head, s a fixed random scale per head.

    Scale: the reference code folds the bias into longer q and k before the logits are scaled, so that a and b count
    head_dim ** -0.5 times as much; `scaled`, the default, does the same. Without it they are added as they are.

    Args:
        num_heads: attention heads.
        head_dim: channels of a head.
        dim: channels of a token.
        num_parabolas: M, for preset "pape" only; None: 50, as in the reference code.
        preset: "pape" or "ri".
        scaled: multiply the bias by head_dim ** -0.5, as the reference code does.
        prefix: "none", no bias for pairs with a prefix token, or "corner": it stands at (-1, -1) of the patches' grid.

    Attributes:
        position: Linear without bias, W_p (num_heads * M, 2), columns y and x; "ri": none.
        ab: Linear without bias, [W_a; W_b] (2 * num_heads * M, dim); "ri": W_a (num_heads, dim).
        position_scales: "ri": buffer (num_heads,), s ~ U(-1 / sqrt(2), 1 / sqrt(2)); random, hence in the state dict.
    """

    paper = "Ohrstrom et al. 2026, arXiv 2602.01418"
    learnable = True
    translation_invariant = True
    extrapolation = "run_on"  # the paper's claim is about larger pictures, in grid steps
    content_source = "x"

    def __init__(
        self,
        num_heads: Count,
        head_dim: Count,
        dim: Count,
        num_parabolas: Count | None = None,
        preset: Literal["pape", "ri"] = "pape",
        scaled: bool = True,
        prefix: Literal["none", "corner"] = "none",
        **grid_options,
    ):
        super().__init__(num_heads, **grid_options)
        if preset == "ri" and num_parabolas is not None:
            raise ValueError(f"num_parabolas belongs to preset 'pape'; 'ri' has one parabola, got {num_parabolas}")
        num_parabolas = 50 if num_parabolas is None else num_parabolas
        self.head_dim, self.dim, self.preset, self.scaled, self.prefix = head_dim, dim, preset, scaled, prefix
        if preset == "ri":
            self.ab = nn.Linear(dim, num_heads, bias=False)
            self.register_buffer("position_scales", torch.empty(num_heads))
        else:
            self.position = nn.Linear(2, num_heads * num_parabolas, bias=False)
            self.ab = nn.Linear(dim, 2 * num_heads * num_parabolas, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the maps as torch draws linear layers, as the reference code does."""
        self.ab.reset_parameters()
        if self.preset == "ri":
            nn.init.uniform_(self.position_scales, -(0.5**0.5), 0.5**0.5)
        else:
            self.position.reset_parameters()

    def _prefix_as_patches(self, positions: Positions) -> Positions:
        """Return the same tokens in the trained grid, those of the prefix as patches one step off its corner."""
        located = self.locate(positions)
        corner = located.coords.new_full((*located.coords.shape[:-2], positions.num_prefix_tokens, 2), -1.0)
        coords = torch.cat([corner, located.coords], dim=-2)
        return replace(located, coords=coords, num_prefix_tokens=0, is_grid=False)

    def bias(self, positions: Positions, keys: Positions | None = None, content: Tensor | None = None) -> Tensor:
        """Return the contextual bias (B, heads, prefix + N, prefix + N)."""
        if self.prefix == "corner" and content is not None:
            keys = self._prefix_as_patches((positions if keys is None else keys).promote(content.dtype))
            positions = self._prefix_as_patches(positions.promote(content.dtype))
        return super().bias(positions, keys, content)

    def encode(self, queries: Positions, keys: Positions, content: Tensor) -> Tensor:
        delta = queries.coords[..., :, None, :] - keys.coords[..., None, :, :]
        delta = delta if delta.ndim == 4 else delta.unsqueeze(0)
        delta = delta.unsqueeze(1)  # (B or 1, 1, Nq, Nk, 2)
        ab = F.linear(content, self.ab.weight.to(content.dtype)).transpose(1, 2)  # (B, channels, Nq)
        if self.preset == "ri":
            a = F.softplus(ab) * self.position_scales.to(ab.dtype).square()[:, None]
            bias = -a.unsqueeze(-1) * delta.square().sum(-1)
        else:
            a, b = ab.unflatten(1, (2, self.num_heads, -1)).unbind(1)  # (B, heads, M, Nq)
            w = self.position.weight.to(ab.dtype).unflatten(0, (self.num_heads, -1))  # (heads, M, 2)
            form = torch.einsum("bhmq,hmi,hmj->bhqij", F.softplus(a), w, w)
            slope = torch.einsum("bhmq,hmi->bhqi", b, w)
            bias = ((slope.unsqueeze(-2) - delta @ form) * delta).sum(-1)
        return bias * self.head_dim**-0.5 if self.scaled else bias
