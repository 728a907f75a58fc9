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
from .positions import Positions
from .rotation import Layout, rotate


class InputEncoding(PositionEncoding):
    """Adds a vector to each token before the first block.

    Args:
        dim: channels of a token.
    """

    place = "input"

    def __init__(self, dim: int, **frame):
        super().__init__(**frame)
        require_multiple("dim", dim, 1, "the channels of a token")
        self.dim = dim

    def embed(self, positions: Positions) -> Float[Tensor, "*batch n dim"]:
        """The vectors of the patch tokens: (N, dim), or (B, N, dim) for batched coordinates."""
        positions = self.promote(positions)
        with full_precision(positions):
            return self.encode(self.locate(positions)).to(positions.coords.dtype)

    def embed_prefix(self, num_prefix_tokens: int) -> Tensor | None:
        """The vectors of the prefix tokens, (P, dim); None means zeros, as in MAE."""
        return None

    def prepare(self, positions: Positions) -> Tensor:
        """The vectors of all tokens, ([B,] prefix + N, dim)."""
        table = self.embed(positions)
        if positions.num_prefix_tokens:
            prefix = self.embed_prefix(positions.num_prefix_tokens)
            if prefix is None:
                table = F.pad(table, (0, 0, positions.num_prefix_tokens, 0))
            else:
                table = torch.cat([prefix.expand(*table.shape[:-2], -1, -1), table], dim=-2)
        return table

    def forward(self, x: Float[Tensor, "b t dim"], positions: Positions) -> Float[Tensor, "b t dim"]:
        """x (B, prefix + N, dim) plus the encoding, in x's dtype.

        Raises:
            ValueError: another number of tokens or channels than the positions and the encoding have.
        """
        check_tokens(x, 1, positions, "x")
        if x.shape[-1] != self.dim:
            raise ValueError(f"x has {x.shape[-1]} channels, but {self.name} was built with dim={self.dim}")
        return x + self.prepare(positions.promote(x.dtype)).to(x.dtype)


def take_tokens(table: Tensor, index: Tensor, num_prefix_tokens: int) -> Tensor:
    """The rows of the prefix tokens and of the patch tokens index (B, K), other ones for every sample.

    Args:
        table: (..., heads, prefix + N, X).
        index: (B, K).
        num_prefix_tokens: how many prefix tokens there are.

    Returns:
        (..., B, heads, prefix + K, X).
    """
    prefix = torch.arange(num_prefix_tokens, device=index.device).expand(len(index), -1)
    rows = torch.cat([prefix, index + num_prefix_tokens], dim=1)
    return materialize(table.index_select(-2, rows.flatten())).unflatten(-2, rows.shape).movedim(-3, -4)


class RotaryEncoding(PositionEncoding):
    """Rotates the channel pairs of queries and keys by angles that depend on the token's position.

    Args:
        num_heads: attention heads.
        head_dim: channels of a head, even.
        layout: which channels form a pair: "interleaved" (2i, 2i + 1) or "half" (i, i + head_dim / 2).
    """

    place = "rotary"

    def __init__(self, num_heads: int, head_dim: int, layout: Layout = "interleaved", **frame):
        super().__init__(**frame)
        require_multiple("head_dim", head_dim, 2, "channels are rotated in pairs")
        if layout not in ("interleaved", "half"):
            raise ValueError(f"layout must be 'interleaved' or 'half', got {layout!r}")
        self.num_heads, self.head_dim, self.layout = num_heads, head_dim, layout

    @property
    def num_angles(self) -> int:
        """Angles per token and head: one for each pair of channels."""
        return self.head_dim // 2

    def angles(self, positions: Positions) -> Float[Tensor, "*batch heads n pairs"]:
        """Angles of the patch tokens in radians: (heads or 1, N, head_dim / 2), float32 or float64."""
        positions = self.promote(positions)
        with full_precision(positions):
            return self.encode(self.locate(positions)).to(positions.coords.dtype)

    def prepare(self, positions: Positions) -> Tensor:
        """Cosines and sines, (2, [B,] heads or 1, prefix + N, head_dim / 2); prefix tokens get the identity."""
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
        """x (B, heads, prefix + N, head_dim) turned by what `prepare` returned."""
        cos, sin = prepared.unbind(0)
        return rotate(x, cos, sin, self.layout)

    @property
    def turns_pairs(self) -> bool:
        """Whether `prepare` gives cosines and sines and nothing else happens to q and k: no subclass says otherwise."""
        own, base = type(self), RotaryEncoding
        return own.rotate is base.rotate and own.modify_attention is base.modify_attention

    def modify_attention(self, tensors: AttentionTensors, prepared: Tensor) -> None:
        """Turn queries and keys of an attention layer."""
        tensors.q, tensors.k = self.rotate(tensors.q, prepared), self.rotate(tensors.k, prepared)

    def forward(self, q: Float[Tensor, "b heads t d"], k: Float[Tensor, "b heads t d"], positions: Positions):
        """q and k (B, heads, prefix + N, head_dim), rotated, in their own dtype. Prefix tokens stay as they are.

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
        return self.rotate(q, prepared), self.rotate(k, prepared)


HIDDEN = -1e4  # finite in float16 too, and so are sums of a few; e^HIDDEN is 0 in every dtype
BORDER = 1e-3  # of a grid step: coordinates that were rescaled onto the border of a half plane lie on it


class BiasEncoding(PositionEncoding):
    """Adds a number to each attention logit, after the scaling by 1 / sqrt(head_dim).

    Args:
        num_heads: attention heads.
    """

    place = "bias"

    def __init_subclass__(cls, **options):
        """Drop an inherited formula where the class computes another bias and says no formula of its own."""
        super().__init_subclass__(**options)
        author = next(base for base in cls.__mro__ if "formula" in vars(base))
        computes = ("encode", "bias", "with_prefix", "half_planes")
        if any(getattr(cls, name) is not getattr(author, name) for name in computes):
            cls.formula = BiasEncoding.formula

    def __init__(self, num_heads: int, **frame):
        super().__init__(**frame)
        require_multiple("num_heads", num_heads, 1, "attention heads")
        self.num_heads = num_heads

    def encode(self, queries: Positions, keys: Positions) -> Tensor:
        """The bias between patch tokens, (heads, Nq, Nk), or (B, heads, Nq, Nk).

        An author who gives a `formula` need not write it: this is the formula of every pair.
        """
        formula, planes = self.formula(queries), self.half_planes()
        if formula is None:
            raise TypeError(f"{type(self).__name__} must define encode() or formula()")
        delta = (queries.coords[..., :, None, :] - keys.coords[..., None, :, :]).unsqueeze(-4)  # ([B,] 1, Nq, Nk, 2)
        head = torch.arange(self.num_heads, device=delta.device)[:, None, None]
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
        """The bias of queries at `positions` and keys at `keys` (by default the same): (heads, prefix + N, prefix + N).

        Rows and columns of prefix tokens are zero. Float32, or float64 where positions or parameters are, and added
        after the scaling of the logits.
        """
        keys = self.promote(positions if keys is None else keys)
        positions = self.promote(positions)
        with full_precision(positions):
            queries = self.locate(positions)
            bias = self.encode(queries, queries if keys is positions else self.locate(keys))
        return self.with_prefix(bias.to(positions.coords.dtype), positions.num_prefix_tokens, keys.num_prefix_tokens)

    def with_prefix(self, bias: Tensor, queries: int, keys: int) -> Tensor:
        """(..., Nq, Nk) -> (..., queries + Nq, keys + Nk): rows and columns of prefix tokens, here zeros."""
        return F.pad(bias, (keys, 0, queries, 0)) if queries or keys else bias

    def prepare(self, positions: Positions) -> Tensor:
        """The bias."""
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
        """Scaled logits (B, heads, prefix + N, prefix + N) plus the bias, in the logits' dtype."""
        keys = positions if keys is None else keys
        check_tokens(logits, 2, positions, "logits")
        check_tokens(logits, 3, keys, "logits")
        return logits + self.bias(positions.promote(logits.dtype), keys.promote(logits.dtype)).to(logits.dtype)


class ContextualBias(BiasEncoding):
    """A bias that depends on the content of the query: `encode(queries, keys, content)`.

    `content` holds the patch tokens only: with `content_source` "q" their query vectors (B, heads, Nq, head_dim),
    before scaling and before any rotation that comes later; with "x" the layer's input (B, Nq, C).
    """

    content_dependent = True
    content_source: ClassVar[Literal["q", "x"]] = "q"

    def encode(self, queries: Positions, keys: Positions, content: Tensor) -> Tensor:
        """The bias between patch tokens, (B, heads, Nq, Nk), in float32 or better."""
        raise TypeError(f"{type(self).__name__} must define encode()")

    def bias(
        self, positions: Positions, keys: Positions | None = None, content: Tensor | None = None
    ) -> Float[Tensor, "b heads q k"]:
        """The bias of queries with `content` (prefix tokens included): (B, heads, prefix + N, prefix + N).

        Raises:
            ValueError: no content, or content of another number of tokens.
        """
        if content is None:
            raise ValueError(f"{self.name} depends on the queries: pass content= ({self.content_source})")
        check_tokens(content, -2, positions, "content")
        keys = self.promote(positions if keys is None else keys).promote(content.dtype)
        positions = self.promote(positions).promote(content.dtype)
        with full_precision(positions):
            queries = self.locate(positions)
            located = queries if keys is positions else self.locate(keys)
            patches = content[..., positions.num_prefix_tokens :, :].to(positions.coords.dtype)
            bias = self.encode(queries, located, patches)
        return self.with_prefix(bias, positions.num_prefix_tokens, keys.num_prefix_tokens)

    def prepare(self, positions: Positions) -> Positions:
        """Nothing to compute ahead: the positions themselves."""
        return positions

    def modify_attention(self, tensors: AttentionTensors, prepared: Positions) -> None:
        """Add to the logits of an attention layer."""
        tensors.add_bias(self.bias(prepared, content=getattr(tensors, self.content_source)))

    def forward(self, logits: Tensor, positions: Positions, keys: Positions | None = None, content=None) -> Tensor:
        """Scaled logits (B, heads, prefix + N, prefix + N) plus the bias, in the logits' dtype."""
        keys = positions if keys is None else keys
        check_tokens(logits, 2, positions, "logits")
        check_tokens(logits, 3, keys, "logits")
        return logits + self.bias(positions.promote(logits.dtype), keys.promote(logits.dtype), content).to(logits.dtype)


class ConditionalEncoding(PositionEncoding):
    """Mixes neighbouring tokens; where the neighbours end tells the position.

    Args:
        dim: channels of a token.
    """

    place = "conditional"
    learnable = True
    continuous = False
    content_dependent = True
    site: ClassVar[Literal["tokens", "values"]] = "tokens"  # between blocks, or on the values inside attention

    def __init__(self, dim: int, **frame):
        super().__init__(**frame)
        require_multiple("dim", dim, 1, "the channels of a token")
        self.dim = dim

    def encode(self, x: Tensor, positions: Positions) -> Tensor:
        """What is added to the patch tokens x (B, N, dim): (B, N, dim)."""
        raise TypeError(f"{type(self).__name__} must define encode()")

    def mix(self, x: Float[Tensor, "b t dim"], positions: Positions) -> Float[Tensor, "b t dim"]:
        """What is added to x (B, prefix + N, dim), in x's dtype: zeros for prefix tokens."""
        check_tokens(x, 1, positions, "x")
        added = self.encode(x[:, positions.num_prefix_tokens :], positions)
        return F.pad(added, (0, 0, positions.num_prefix_tokens, 0)).to(x.dtype)

    def forward(self, x: Float[Tensor, "b t dim"], positions: Positions) -> Float[Tensor, "b t dim"]:
        """x (B, prefix + N, dim) with its patch tokens mixed."""
        return x + self.mix(x, positions)

    def prepare(self, positions: Positions) -> Positions:
        """Nothing to compute ahead: the positions themselves."""
        return positions

    def modify_attention(self, tensors: AttentionTensors, prepared: Positions) -> None:
        """Add the mixed values to the output of an attention layer (site "values")."""
        heads = tensors.v.shape[1]
        mixed = self.mix(tensors.v.transpose(1, 2).flatten(2), prepared).unflatten(2, (heads, -1)).transpose(1, 2)
        tensors.output = mixed if tensors.output is None else tensors.output + mixed
