"""The base class of encodings that add a vector to each token."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from ..encoding import PositionEncoding, check_tokens, full_precision, put_in_front
from ..options import Count
from ..positions import Positions


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
        count = positions.num_prefix_tokens
        return put_in_front(self.embed(positions), self.embed_prefix(count) if count else None, count)

    def forward(self, x: Float[Tensor, "b t dim"], positions: Positions) -> Float[Tensor, "b t dim"]:
        """Return x (B, prefix + N, dim) plus the encoding, in x's dtype.

        Raises:
            ValueError: another number of tokens or channels than the positions and the encoding have.
        """
        check_tokens(x, 1, positions, "x")
        if x.shape[-1] != self.dim:
            raise ValueError(f"x has {x.shape[-1]} channels, but {self.name} was built with dim={self.dim}")
        return x + self.prepare(positions.promote(x.dtype)).to(x.dtype)
