"""The base class of encodings that rotate queries and keys."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from ..encoding import AttentionTensors, PositionEncoding, check_tokens, full_precision, put_in_front
from ..frequencies import require_multiple
from ..materialize import materialize
from ..options import Count, Fraction
from ..positions import Positions
from ..rotation import AxialLayout, rotate


def take_tokens(table: Tensor, index: Tensor, num_prefix_tokens: int) -> Tensor:
    """Return the rows of the prefix tokens and of the patch tokens index (B, K), other ones for every sample.

    Args:
        table: (..., heads, prefix + N, X).
        index: (B, K).
        num_prefix_tokens: how many prefix tokens there are.

    Returns:
        (..., B, heads, prefix + K, X).
    """
    prefix = torch.arange(num_prefix_tokens, device=index.device).expand(len(index), -1)
    rows = torch.cat([prefix, index + num_prefix_tokens], dim=1)  # (B, prefix + K)
    return materialize(table.index_select(-2, rows.flatten())).unflatten(-2, rows.shape).movedim(-3, -4)


class RotaryEncoding(PositionEncoding):
    """Base class of encodings that rotate channel pairs of queries and keys by angles that depend on the position.

    Args:
        num_heads: attention heads.
        head_dim: channels of a head, even.
        layout: which channels form a pair: "interleaved" (2i, 2i + 1), "half" (i, i + head_dim / 2), or
            "half_per_axis", half in each half of the head.
        zero_fraction: share z of the frequencies that are 0, so that their pairs never turn: of each series of n
            frequencies the round(z n) lowest (p-RoPE, Barbero et al. 2024, arXiv 2410.06205). 1 turns nothing.

    Raises:
        ValueError: an odd `head_dim`, an unknown layout, or a `zero_fraction` for a class that has no such series.

    Example:
        >>> class Column(vp.RotaryEncoding):
        ...     def encode(self, positions):  # (heads or 1, N, head_dim / 2): an angle of x radians
        ...         return positions.coords[..., None, :, 1:].expand(-1, -1, self.num_angles)
        >>> x = torch.tensor([1.0, 0.0]).expand(1, 1, 3, 2)
        >>> q, k = Column(num_heads=1, head_dim=2)(x, x, vp.Positions.grid((1, 3)))
        >>> torch.allclose((q @ k.mT)[0, 0, 0], torch.tensor([0.0, 1.0, 2.0]).cos())
        True
    """

    place = "rotary"
    widens: ClassVar[bool] = False  # leaves q and k with more channels than they had
    linear: ClassVar[bool] = True  # multiplies q and k by matrices, those of prefix tokens by the identity
    num_series: int | Literal["axes"] = 0  # of a head's pairs, one after the other, from fast to slow; 0: none

    def __init__(
        self,
        num_heads: Count,
        head_dim: Count,
        layout: AxialLayout = "interleaved",
        *,
        zero_fraction: Fraction = 0.0,
        **grid_options,
    ):
        super().__init__(**grid_options)
        require_multiple("head_dim", head_dim, 4 if layout == "half_per_axis" else 2, "channels are rotated in pairs")
        if zero_fraction and not self.num_series:
            raise ValueError(f"{self.name} has no series of frequencies, and takes no zero_fraction")
        self.num_heads, self.head_dim, self.layout, self.zero_fraction = num_heads, head_dim, layout, zero_fraction

    @property
    def num_angles(self) -> int:
        """Return the number of angles per token and head: one for each pair of channels."""
        return self.head_dim // 2

    def angles(self, positions: Positions) -> Float[Tensor, "*batch heads n pairs"]:
        """Return the angles of the patch tokens in radians: (heads or 1, N, head_dim / 2), float32."""
        positions = self.promote(positions)
        with full_precision(positions):
            return self.keep_still(self.encode(self.locate(positions)), positions).to(positions.coords.dtype)

    def keep_still(self, angles: Tensor, positions: Positions) -> Tensor:
        """Return angles ([B,] heads or 1, N, head_dim / 2) with 0 for the pairs that `zero_fraction` keeps still."""
        if not (self.zero_fraction and self.num_series):
            return angles
        count = len(positions.feat_shape) if self.num_series == "axes" else self.num_series
        series = angles.unflatten(-1, (count, -1))
        turning = series.shape[-1] - round(self.zero_fraction * series.shape[-1])
        return F.pad(series[..., :turning], (0, series.shape[-1] - turning)).flatten(-2)

    def encode_prefix(self, num_prefix_tokens: int, device: torch.device) -> Tensor | None:
        """Return the angles of the prefix tokens, (heads or 1, prefix, head_dim / 2); None, as here, turns none."""
        return None

    def prepare(self, positions: Positions) -> Tensor:
        """Return cosines and sines, (2, [B,] heads or 1, prefix + N, head_dim / 2)."""
        positions = self.promote(positions)
        with full_precision(positions):
            angles = self.token_angles(positions)
            return torch.stack([angles.cos(), angles.sin()]).to(positions.coords.dtype)

    def token_angles(self, positions: Positions) -> Tensor:
        """Return angles of prefix and patch tokens, ([B,] heads or 1, prefix + N, head_dim / 2), not rounded yet."""
        angles, count = self.encode(self.locate(positions)), positions.num_prefix_tokens
        prefix = self.encode_prefix(count, angles.device) if count else None
        return self.keep_still(put_in_front(angles, prefix, count), positions)

    def take_tokens(self, prepared: Any, index: Tensor, num_prefix_tokens: int) -> Any:
        """Return the part of what `prepare` returned for a whole grid that belongs to the patch tokens index (B, K).

        It equals `prepare(positions.keep(index))` bit for bit; the formula is computed once for all samples.
        """
        return take_tokens(prepared, index, num_prefix_tokens)

    def rotate(self, x: Tensor, prepared: Tensor) -> Tensor:
        """Return x (B, heads, prefix + N, head_dim) turned by what `prepare` returned."""
        cos, sin = prepared.unbind(0)  # ([B,] heads or 1, prefix + N, head_dim / 2) each
        return rotate(x, cos, sin, self.layout)

    def rotate_qk(self, q: Tensor, k: Tensor, prepared: Any) -> tuple[Tensor, Tensor]:
        """Return queries and keys turned by what `prepare` returned: both alike, unless a subclass says otherwise."""
        return self.rotate(q, prepared), self.rotate(k, prepared)

    @property
    def turns_pairs(self) -> bool:
        """Return whether cosines and sines of `prepare` turn q and k, and nothing else happens to them.

        So it is unless a subclass says otherwise, in the two layouts that kernels know.
        """
        return RotaryEncoding.turns_by_angles(self, None) and self.layout != "half_per_axis"

    def turns_by_angles(self, positions: Positions | None) -> bool:
        """Return whether the angles of these tokens say all that happens to q and k."""
        own, base = type(self), RotaryEncoding
        return all(getattr(own, name) is getattr(base, name) for name in ("rotate", "rotate_qk", "modify_attention"))

    def modify_attention(self, tensors: AttentionTensors, prepared: Tensor) -> None:
        """Turn the queries and keys of an attention layer."""
        tensors.q, tensors.k = self.rotate_qk(tensors.q, tensors.k, prepared)

    def forward(self, q: Float[Tensor, "b heads t d"], k: Float[Tensor, "b heads t d"], positions: Positions):
        """Return q and k (B, heads, prefix + N, head_dim), rotated, in their own dtype.

        Prefix tokens stay as they are, bit for bit, unless the encoding gives them positions (`encode_prefix`) or says
        that it is not `linear`.

        Raises:
            ValueError: another number of tokens, heads or channels than the positions and the encoding have.
        """
        for what, x in (("q", q), ("k", k)):
            check_tokens(x, 2, positions, what)
            if (x.shape[1], x.shape[3]) != (self.num_heads, self.head_dim):
                raise ValueError(
                    f"{what} has {x.shape[1]} heads of {x.shape[3]} channels, but {self.name} was built with "
                    f"num_heads={self.num_heads}, head_dim={self.head_dim}"
                )
        prepared = self.prepare(positions.promote(q.dtype).promote(k.dtype))
        return self.rotate_qk(q, k, prepared)
