"""The base class of encodings that mix neighbouring tokens."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from ..encoding import AttentionTensors, PositionEncoding, check_tokens
from ..options import Count
from ..positions import Positions


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
    extrapolation = "run_on"  # neighbours are those of the grid at hand
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
