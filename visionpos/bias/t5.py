"""T5's relative attention bias (Raffel et al. 2019, arXiv 1910.10683), on two axes."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ..frequencies import require_multiple
from ..options import Count, Spread
from ..places import BiasEncoding
from ..positions import Positions
from ..registry import register_encoding
from .offsets import bias_of_offsets


def bucket_starts(num_buckets: int, max_distance: int, device: torch.device | None = None) -> Tensor:
    """Return the first distance of every bucket of one sign but the one at 0: (num_buckets / 2 - 1,) int64, rising."""
    half, exact = num_buckets // 2, num_buckets // 4
    growth = (max_distance / exact) ** (1 / (half - exact))
    starts = [*range(1, exact), *(math.ceil(exact * growth**step - 1e-6) for step in range(half - exact))]
    return torch.tensor(starts, device=device)


def find_bucket(distance: Tensor, starts: Tensor) -> Tensor:
    """Return `t5_bucket` of whole distances; comparing them with `starts`, no logarithm rounds to the wrong side."""
    half = len(starts) + 1
    return torch.bucketize(distance.abs(), starts.to(distance), right=True) + half * (distance > 0)


def t5_bucket(distance: Tensor, num_buckets: int = 32, max_distance: int = 128) -> Tensor:
    """Return the bucket of a whole distance, key minus query, of any sign: int64, the shape of `distance`.

    The first half of the buckets is for keys before the query and the distance 0, the second for keys behind it. Of
    the n = num_buckets / 2 of one sign half are exact, |d| < n / 2; the others are logarithmic,
    n / 2 + floor(n / 2 log(2 |d| / n) / log(2 max_distance / n)), the last one from its lower end to infinity.
    """
    return find_bucket(distance, bucket_starts(num_buckets, max_distance, distance.device))


@register_encoding("t5")
class T5(BiasEncoding):
    """Learned numbers for distances in buckets that widen with distance: b = B_y[bucket(dy)] + B_x[bucket(dx)].

    Key minus query, bucket by `t5_bucket`: 32 of them, exact below 8, logarithmic up to 128, the same one beyond.
    T5 is for text; in two dimensions the bias is the sum of one lookup for each axis, each in a table of its own, as
    LayoutLMv2 (Xu et al. 2020, arXiv 2012.14740) has it for boxes on a page. Between two whole distances the bias is
    interpolated.

    T5 itself has one table for all layers; here every layer has its own unless the encoding is given as an instance.

    Args:
        num_heads: attention heads.
        num_buckets: for both signs together, a multiple of 4.
        max_distance: where the last bucket ends in name; farther keys are in it too.
        init_std: standard deviation of the normal initialisation (LayoutLMv2's; T5 has 1 / sqrt(width)).

    Attributes:
        relative_attention_bias: Parameter (2, num_buckets, heads), the rows for y and those for x.
        starts: buffer (num_buckets / 2 - 1,) int64, see `bucket_starts`; not in the state dict.

    Raises:
        ValueError: a number of buckets that is no multiple of 4, or a maximum inside the exact buckets.
    """

    paper = "Raffel et al. 2019, arXiv 1910.10683"
    learnable = True
    translation_invariant = True
    extrapolation = "run_on"  # its last bucket is made for distances that were not seen

    def __init__(
        self,
        num_heads: Count,
        num_buckets: Count = 32,
        max_distance: Count = 128,
        init_std: Spread = 0.02,
        **grid_options,
    ):
        super().__init__(num_heads, **grid_options)
        require_multiple("num_buckets", num_buckets, 4, "exact and logarithmic buckets for each sign")
        if max_distance <= num_buckets // 4:
            raise ValueError(f"max_distance must be more than num_buckets / 4 = {num_buckets // 4}, got {max_distance}")
        self.num_buckets, self.max_distance, self.init_std = num_buckets, max_distance, init_std
        self.relative_attention_bias = nn.Parameter(torch.empty(2, num_buckets, num_heads))
        self.register_buffer("starts", torch.empty(0, dtype=torch.long), persistent=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the tables from a normal distribution of standard deviation `init_std`."""
        super().reset_parameters()
        nn.init.normal_(self.relative_attention_bias, std=self.init_std)

    def reinit_buffers(self) -> None:
        """Compute the first distances of the buckets again."""
        self.starts = bucket_starts(self.num_buckets, self.max_distance, self.starts.device)

    def _lookup(self, table: Tensor, distance: Tensor) -> Tensor:
        below = distance.floor()
        buckets = [find_bucket(whole, self.starts) for whole in (below, below + 1)]
        lower, upper = (table.index_select(0, b.flatten()).unflatten(0, b.shape) for b in buckets)  # (..., heads)
        return torch.lerp(lower, upper, (distance - below).unsqueeze(-1))

    def encode(self, queries: Positions, keys: Positions) -> Tensor:
        rows, columns = self.relative_attention_bias.to(queries.coords.dtype)

        def bias(delta: Tensor) -> Tensor:
            return self._lookup(rows, -delta[..., 0]) + self._lookup(columns, -delta[..., 1])

        return bias_of_offsets(bias, queries, keys)
