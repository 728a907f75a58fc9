"""Learned vectors looked up by the bucket of an offset: what Shaw's and iRPE's relative positions share."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from ..encoding import AttentionTensors, full_precision
from ..places import ContextualBias
from ..positions import Positions


class BucketBias(ContextualBias):
    """b = head_dim ** -0.5 * sum over tables t of q_t . key_table[t, bucket_t(offset)], added to the scaled logits.

    With `values` the same tables again, on the output: out += sum over keys of p value_table[t, bucket_t]. Tables
    have `channels` columns: all of q where that is head_dim, else table t has the t-th part of q and of the output.

    A subclass defines `bucket`. Pairs with a prefix token have one more row of their own, the last, where the
    encoding was built with prefix tokens, and no bias otherwise.
    """

    def create_tables(
        self, head_dim: int, shape: tuple[int, int, int], num_prefix_tokens: int, values: bool, init_std: float
    ) -> None:
        """Create the tables, at the end of a constructor; `shape` is (tables, buckets, channels)."""
        tables, self.num_buckets, channels = shape
        self.head_dim, self.has_prefix_row, self.init_std = head_dim, num_prefix_tokens > 0, init_std
        rows = self.num_buckets + self.has_prefix_row
        self.key_table = nn.Parameter(torch.empty(tables, rows, channels))
        self.register_parameter("value_table", nn.Parameter(torch.empty(tables, rows, channels)) if values else None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the tables from a normal distribution of standard deviation `init_std`."""
        for table in self.parameters():
            nn.init.normal_(table, std=self.init_std)

    def bucket(self, delta: Float[Tensor, "*batch q k axes"]) -> Int[Tensor, "t *batch q k"]:
        """Return the row of each table for the offsets query minus key."""
        raise TypeError(f"{type(self).__name__} must define bucket()")

    def _buckets(self, queries: Positions, keys: Positions) -> Tensor:
        delta = queries.coords[..., :, None, :] - keys.coords[..., None, :, :]
        index = self.bucket(delta)  # (tables, [B,] Nq, Nk)
        return index.unsqueeze(1) if index.ndim == 3 else index

    def scores(self, content: Float[Tensor, "b heads n d"]) -> Float[Tensor, "t b heads n rows"]:
        """Return what each query gives to each row of each table, scaled like the logits."""
        parts = content.unflatten(-1, (-1, self.key_table.shape[-1])).movedim(-2, 0)  # (1 or tables, B, heads, N, C)
        return parts @ self.key_table.to(content.dtype).transpose(-2, -1)[:, None, None] * self.head_dim**-0.5

    def encode(self, queries: Positions, keys: Positions, content: Tensor) -> Tensor:
        scores, index = self.scores(content), self._buckets(queries, keys).unsqueeze(2)
        return scores.gather(-1, index.expand(*scores.shape[:-1], -1)).sum(0)

    def bias(self, positions: Positions, keys: Positions | None = None, content: Tensor | None = None) -> Tensor:
        """Return the contextual bias; rows and columns of prefix tokens come from the last row of the tables."""
        bias = super().bias(positions, keys, content)
        queries, keys = positions.num_prefix_tokens, (positions if keys is None else keys).num_prefix_tokens
        if not self.has_prefix_row or not (queries or keys):
            return bias
        with full_precision(positions):
            last = self.scores(content.to(bias.dtype))[..., -1:].sum(0)  # (B, heads, T, 1)
        patches = torch.cat([last[..., queries:, :].expand(-1, -1, -1, keys), bias[..., queries:, keys:]], dim=-1)
        return torch.cat([last[..., :queries, :].expand(-1, -1, -1, bias.shape[-1]), patches], dim=-2)

    def modify_attention(self, tensors: AttentionTensors, prepared: Positions) -> None:
        """Add to the logits, and to the output where there are value vectors."""
        super().modify_attention(tensors, prepared)
        if self.value_table is not None:
            tensors.value_terms.append(partial(self.value_term, prepared))

    def value_term(self, positions: Positions, probabilities: Float[Tensor, "b heads t t"]) -> Tensor:
        """Return the sum over keys of p value_table[bucket], (B, heads, prefix + N, head_dim); p (B, heads, T, T)."""
        with full_precision(positions):
            p = probabilities.to(torch.promote_types(probabilities.dtype, torch.float32))
            located, prefix = self.locate(positions), positions.num_prefix_tokens
            index = F.pad(self._buckets(located, located), (prefix, 0, prefix, 0), value=self.num_buckets)
            out = []
            for rows, table in zip(index.unbind(), self.value_table.to(p.dtype).unbind(), strict=True):
                mass = p.new_zeros(*p.shape[:-1], self.num_buckets + 1)  # what falls into each bucket
                mass = mass.scatter_add(-1, rows.unsqueeze(1).expand_as(p), p)
                out.append(mass[..., : len(table)] @ table)
        return torch.cat(out, dim=-1) if self.value_table.shape[-1] < self.head_dim else sum(out)
