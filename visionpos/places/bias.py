"""The base classes of encodings that add a number to each attention logit."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from ..encoding import AttentionTensors, PositionEncoding, check_tokens, full_precision
from ..options import Count
from ..positions import Positions

HIDDEN = -1e4  # finite in float16 too, and so are sums of a few; e^HIDDEN is 0 in every dtype
BORDER = 1e-3  # of a grid step: coordinates that were rescaled onto the border of a half plane lie on it


class BiasEncoding(PositionEncoding):
    """Base class of encodings that add a number to each attention logit, after the scaling by 1 / sqrt(head_dim).

    Args:
        num_heads: attention heads.

    Example:
        >>> class Rows(vp.BiasEncoding):
        ...     def formula(self, positions):
        ...         return lambda head, dy, dx: (head + 1) * (1 - dy.abs())
        >>> Rows(num_heads=2).bias(vp.Positions.grid((3, 1)))[1].tolist()
        [[2.0, 0.0, -2.0], [0.0, 2.0, 0.0], [-2.0, 0.0, 2.0]]
    """

    place = "bias"

    def __init_subclass__(cls, **options):
        """Drop an inherited formula where the class computes another bias and says no formula of its own."""
        super().__init_subclass__(**options)
        author = next(base for base in cls.__mro__ if "formula" in vars(base))
        computes = ("encode", "bias", "with_prefix", "half_planes")
        if any(getattr(cls, name) is not getattr(author, name) for name in computes):
            cls.formula = BiasEncoding.formula

    def __init__(self, num_heads: Count, **grid_options):
        super().__init__(**grid_options)
        self.num_heads = num_heads

    def encode(self, queries: Positions, keys: Positions) -> Tensor:
        """Return the bias between patch tokens, (heads, Nq, Nk), or (B, heads, Nq, Nk).

        An author who gives a `formula` need not write it: this is the formula of every pair.
        """
        formula, planes = self.formula(queries), self.half_planes()
        if formula is None:
            raise TypeError(f"{type(self).__name__} must define encode() or formula()")
        delta = (queries.coords[..., :, None, :] - keys.coords[..., None, :, :]).unsqueeze(-4)  # ([B,] 1, Nq, Nk, 2)
        head = torch.arange(self.num_heads, device=delta.device)[:, None, None]  # (heads, 1, 1)
        bias = formula(head, *delta.unbind(-1)).expand(*delta.shape[:-4], self.num_heads, *delta.shape[-3:-1])
        if planes is None:
            return bias
        outside = torch.einsum("...hqkc,hpc->...hpqk", delta.expand(*bias.shape, 2), planes.to(delta)) > BORDER
        return bias.masked_fill(outside.any(-3), HIDDEN)

    def formula(self, positions: Positions) -> Callable[[Tensor, Tensor, Tensor], Tensor] | None:
        """Return the bias as a function of one pair, for kernels that compute it on the fly, or None if it is none.

        It computes what `encode` does, from nothing that is learned. A subclass that overrides `encode` and not the
        formula has none.

        Args:
            positions: as `encode` gets them, on two axes.

        Returns:
            A function of (head, dy, dx): the index of the head, an integer tensor, and the offset query minus key, in
            the dtype of the coordinates, of shapes that broadcast. It may index tensors by `head`, and computes
            element by element.
        """
        return None

    def half_planes(self) -> Tensor | None:
        """Return the normals n (heads, P, 2), in (y, x), of half planes outside of which keys are hidden, or None.

        A query sees the keys with n . (key - query) >= 0 for all P normals of the head, borders included; (0, 0) holds
        everywhere. Elsewhere the bias is HIDDEN, whatever `formula` says, and kernels skip what they can.
        """
        return None

    def bias(self, positions: Positions, keys: Positions | None = None) -> Float[Tensor, "*batch heads q k"]:
        """Return the bias of queries at `positions` and keys at `keys` (by default the same).

        Its shape is (heads, prefix + N, prefix + N), with a leading B for batched coordinates.

        Rows and columns of prefix tokens are zero. Float32, or float64 where positions or parameters are, and added
        after the scaling of the logits.
        """
        positions = self.promote(positions)
        keys = positions if keys is None else self.promote(keys)
        with full_precision(positions):
            queries = self.locate(positions)
            bias = self.encode(queries, queries if keys is positions else self.locate(keys))  # ([B,] heads, Nq, Nk)
        return self.with_prefix(bias.to(positions.coords.dtype), positions.num_prefix_tokens, keys.num_prefix_tokens)

    def with_prefix(self, bias: Tensor, queries: int, keys: int) -> Tensor:
        """Return (..., queries + Nq, keys + Nk): a bias (..., Nq, Nk) with rows and columns of prefix tokens: zeros."""
        return F.pad(bias, (keys, 0, queries, 0)) if queries or keys else bias

    def prepare(self, positions: Positions) -> Tensor:
        """Return the bias of all tokens."""
        return self.bias(positions)

    def modify_attention(self, tensors: AttentionTensors, prepared: Tensor | Positions) -> None:
        """Add to the logits of an attention layer; given positions, leave it to a kernel to compute what is added."""
        if isinstance(prepared, Positions):
            if tensors.formula is None:
                tensors.formula = self, prepared
                return
            prepared = self.bias(prepared)
        tensors.add_bias(prepared)

    def forward(self, logits: Float[Tensor, "b heads q k"], positions: Positions, keys: Positions | None = None):
        """Return scaled logits (B, heads, prefix + N, prefix + N) plus the bias, in the logits' dtype."""
        keys = positions if keys is None else keys
        self.check_logits(logits, positions, keys)
        return logits + self.bias(positions.promote(logits.dtype), keys.promote(logits.dtype)).to(logits.dtype)

    def check_logits(self, logits: Tensor, positions: Positions, keys: Positions) -> None:
        """Check that the bias of these positions fits logits (B, heads, T, T) without anything being repeated.

        Raises:
            ValueError: another number of heads, tokens or samples.
        """
        heads = logits.shape[1]
        if heads != self.num_heads:
            raise ValueError(f"logits have {heads} heads, but {self.name} was built with num_heads={self.num_heads}")
        check_tokens(logits, 2, positions, "logits")
        check_tokens(logits, 3, keys, "logits")


class ContextualBias(BiasEncoding):
    """Base class of biases that depend on the content of the query: `encode(queries, keys, content)`.

    `content` holds the patch tokens only: with `content_source` "q" their query vectors (B, heads, Nq, head_dim),
    before scaling and before any rotation that comes later; with "x" the layer's input (B, Nq, C).

    Example:
        >>> class Below(vp.ContextualBias):
        ...     def encode(self, queries, keys, content):  # (B, heads, Nq, Nk) of the queries (B, heads, Nq, head_dim)
        ...         return content.mean(-1, keepdim=True) * keys.coords[..., None, :, 0]
        >>> Below(num_heads=1).bias(vp.Positions.grid((2, 1)), content=torch.ones(1, 1, 2, 4)).tolist()
        [[[[0.0, 1.0], [0.0, 1.0]]]]
    """

    content_dependent = True
    content_source: ClassVar[Literal["q", "x"]] = "q"

    def encode(self, queries: Positions, keys: Positions, content: Tensor) -> Tensor:
        """Return the bias between patch tokens, (B, heads, Nq, Nk), in float32 or better."""
        raise TypeError(f"{type(self).__name__} must define encode()")

    def bias(
        self, positions: Positions, keys: Positions | None = None, content: Tensor | None = None
    ) -> Float[Tensor, "b heads q k"]:
        """Return the bias of queries with `content` (prefix tokens included): (B, heads, prefix + N, prefix + N).

        Raises:
            ValueError: no content, or content of another number of tokens or heads.
        """
        if content is None:
            raise ValueError(f"{self.name} depends on the queries: pass content= ({self.content_source})")
        check_tokens(content, -2, positions, "content")
        heads = self.num_heads if self.content_source == "x" else content.shape[1]
        if heads != self.num_heads:
            raise ValueError(f"content has {heads} heads, but {self.name} was built with num_heads={self.num_heads}")
        positions = self.promote(positions).promote(content.dtype)
        keys = positions if keys is None else self.promote(keys).promote(content.dtype)
        with full_precision(positions):
            queries = self.locate(positions)
            located = queries if keys is positions else self.locate(keys)
            patches = content[..., positions.num_prefix_tokens :, :].to(positions.coords.dtype)
            bias = self.encode(queries, located, patches)  # (B, heads, Nq, Nk)
        return self.with_prefix(bias, positions.num_prefix_tokens, keys.num_prefix_tokens)

    def prepare(self, positions: Positions) -> Positions:
        """Return the positions themselves: there is nothing to compute ahead."""
        return positions

    def modify_attention(self, tensors: AttentionTensors, prepared: Positions) -> None:
        """Add to the logits of an attention layer."""
        tensors.add_bias(self.bias(prepared, content=getattr(tensors, self.content_source)))

    def forward(self, logits: Tensor, positions: Positions, keys: Positions | None = None, content=None) -> Tensor:
        """Return scaled logits (B, heads, prefix + N, prefix + N) plus the bias, in the logits' dtype."""
        keys = positions if keys is None else keys
        self.check_logits(logits, positions, keys)
        return logits + self.bias(positions.promote(logits.dtype), keys.promote(logits.dtype), content).to(logits.dtype)
