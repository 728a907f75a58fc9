"""The base classes of the four places where an encoding can act: input, rotary, bias, conditional."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from .encoding import AttentionTensors, PositionEncoding, check_tokens, full_precision
from .frequencies import require_multiple
from .materialize import materialize
from .options import Count
from .positions import Positions
from .rotation import AxialLayout, rotate


class InputEncoding(PositionEncoding):
    """Base class of encodings that add a vector to each token before the first block.

    Args:
        dim: channels of a token.

    Example:
        >>> class RowNumber(vp.InputEncoding):
        ...     def encode(self, positions):  # (N, dim)
        ...         return positions.coords[..., :1].repeat_interleave(self.dim, dim=-1)
        >>> RowNumber(dim=4)(torch.zeros(1, 6, 4), vp.Positions.grid((2, 3)))[0, :, 0].tolist()
        [0.0, 0.0, 0.0, 1.0, 1.0, 1.0]
    """

    place = "input"

    def __init__(self, dim: Count, **grid_options):
        super().__init__(**grid_options)
        self.dim = dim

    def embed(self, positions: Positions) -> Float[Tensor, "*batch n dim"]:
        """Return the vectors of the patch tokens: (N, dim), or (B, N, dim) for batched coordinates."""
        positions = self.promote(positions)
        with full_precision(positions):
            return self.encode(self.locate(positions)).to(positions.coords.dtype)

    def embed_prefix(self, num_prefix_tokens: int) -> Tensor | None:
        """Return the vectors of the prefix tokens, (P, dim); None means zeros, as in MAE."""
        return None

    def prepare(self, positions: Positions) -> Tensor:
        """Return the vectors of all tokens, ([B,] prefix + N, dim)."""
        table = self.embed(positions)  # ([B,] N, dim)
        if positions.num_prefix_tokens:
            prefix = self.embed_prefix(positions.num_prefix_tokens)  # (P, dim)
            if prefix is None:
                table = F.pad(table, (0, 0, positions.num_prefix_tokens, 0))
            else:
                table = torch.cat([prefix.expand(*table.shape[:-2], -1, -1), table], dim=-2)  # ([B,] P + N, dim)
        return table

    def forward(self, x: Float[Tensor, "b t dim"], positions: Positions) -> Float[Tensor, "b t dim"]:
        """Return x (B, prefix + N, dim) plus the encoding, in x's dtype.

        Raises:
            ValueError: another number of tokens or channels than the positions and the encoding have.
        """
        check_tokens(x, 1, positions, "x")
        if x.shape[-1] != self.dim:
            raise ValueError(f"x has {x.shape[-1]} channels, but {self.name} was built with dim={self.dim}")
        return x + self.prepare(positions.promote(x.dtype)).to(x.dtype)


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
    linear: ClassVar[bool] = True  # multiplies q and k by matrices, those of prefix tokens by the identity

    def __init__(self, num_heads: Count, head_dim: Count, layout: AxialLayout = "interleaved", **grid_options):
        super().__init__(**grid_options)
        require_multiple("head_dim", head_dim, 4 if layout == "half_per_axis" else 2, "channels are rotated in pairs")
        self.num_heads, self.head_dim, self.layout = num_heads, head_dim, layout

    @property
    def num_angles(self) -> int:
        """Return the number of angles per token and head: one for each pair of channels."""
        return self.head_dim // 2

    def angles(self, positions: Positions) -> Float[Tensor, "*batch heads n pairs"]:
        """Return the angles of the patch tokens in radians: (heads or 1, N, head_dim / 2), float32."""
        positions = self.promote(positions)
        with full_precision(positions):
            return self.encode(self.locate(positions)).to(positions.coords.dtype)

    def prepare(self, positions: Positions) -> Tensor:
        """Return cosines and sines, (2, [B,] heads or 1, prefix + N, head_dim / 2); prefix tokens get the identity."""
        positions = self.promote(positions)
        with full_precision(positions):
            angles = F.pad(self.encode(self.locate(positions)), (0, 0, positions.num_prefix_tokens, 0))
            return torch.stack([angles.cos(), angles.sin()]).to(positions.coords.dtype)

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
        own, base = type(self), RotaryEncoding
        same = all(getattr(own, name) is getattr(base, name) for name in ("rotate", "rotate_qk", "modify_attention"))
        return same and self.layout != "half_per_axis"

    def modify_attention(self, tensors: AttentionTensors, prepared: Tensor) -> None:
        """Turn the queries and keys of an attention layer."""
        tensors.q, tensors.k = self.rotate_qk(tensors.q, tensors.k, prepared)

    def forward(self, q: Float[Tensor, "b heads t d"], k: Float[Tensor, "b heads t d"], positions: Positions):
        """Return q and k (B, heads, prefix + N, head_dim), rotated, in their own dtype.

        Prefix tokens stay as they are, bit for bit, unless the encoding says that it is not `linear`.

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
        keys = self.promote(positions if keys is None else keys)
        positions = self.promote(positions)
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
        keys = self.promote(positions if keys is None else keys).promote(content.dtype)
        positions = self.promote(positions).promote(content.dtype)
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


class ConditionalEncoding(PositionEncoding):
    """Base class of encodings that mix neighbouring tokens; where the neighbours end tells the position.

    Args:
        dim: channels of a token.

    Example:
        >>> class Mean(vp.ConditionalEncoding):
        ...     def encode(self, x, positions):  # (B, N, dim), added to the patch tokens x
        ...         return x.mean(dim=1, keepdim=True).expand_as(x)
        >>> Mean(dim=1)(torch.tensor([[[1.0], [3.0]]]), vp.Positions.grid((1, 2))).tolist()
        [[[3.0], [5.0]]]
    """

    place = "conditional"
    learnable = True
    continuous = False
    content_dependent = True
    site: ClassVar[Literal["tokens", "values"]] = "tokens"  # between blocks, or on the values inside attention

    def __init__(self, dim: Count, **grid_options):
        super().__init__(**grid_options)
        self.dim = dim

    def encode(self, x: Tensor, positions: Positions) -> Tensor:
        """Return what is added to the patch tokens x (B, N, dim): (B, N, dim)."""
        raise TypeError(f"{type(self).__name__} must define encode()")

    def mix(self, x: Float[Tensor, "b t dim"], positions: Positions) -> Float[Tensor, "b t dim"]:
        """Return what is added to x (B, prefix + N, dim), in x's dtype: zeros for prefix tokens."""
        positions = self.promote(positions)
        check_tokens(x, 1, positions, "x")
        if x.shape[-1] != self.dim:
            raise ValueError(f"x has {x.shape[-1]} channels, but {self.name} was built with dim={self.dim}")
        added = self.encode(x[:, positions.num_prefix_tokens :], positions)  # (B, N, dim)
        return F.pad(added, (0, 0, positions.num_prefix_tokens, 0)).to(x.dtype)

    def forward(self, x: Float[Tensor, "b t dim"], positions: Positions) -> Float[Tensor, "b t dim"]:
        """Return x (B, prefix + N, dim) with its patch tokens mixed."""
        return x + self.mix(x, positions)

    def prepare(self, positions: Positions) -> Positions:
        """Return the positions themselves: there is nothing to compute ahead."""
        return positions

    def modify_attention(self, tensors: AttentionTensors, prepared: Positions) -> None:
        """Add the mixed values to the output of an attention layer (site "values")."""
        heads = tensors.v.shape[1]
        mixed = self.mix(tensors.v.transpose(1, 2).flatten(2), prepared).unflatten(2, (heads, -1)).transpose(1, 2)
        tensors.output = mixed if tensors.output is None else tensors.output + mixed
