"""Batches of pictures whose grids differ, padded to one length: NaFlexViT and Gemma 4.

Pictures of one grid go through the blocks together, without their padding, so that each gets what it gets alone:

    picture 0 (1 x 3)   a b c .        0 and 2:  a b c     1:  d e f g     grids in the order of their first pictures
    picture 1 (2 x 2)   d e f g                  h i j
    picture 2 (1 x 3)   h i j .
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import torch
import torch.fx
from torch import Tensor

from ..positions import Positions
from .attention import AttentionContext
from .isotropic import IsotropicMixin, add_encodings

torch.fx.wrap("add_encodings")  # here, too

Size = tuple[int, int]
Known = TypeVar("Known")


@dataclass(frozen=True, eq=False)
class Group:
    """Hold pictures of one grid, with as many tokens left.

    Attributes:
        samples: (b, 1), which of the batch they are.
        tokens: (b or 1, prefix + n), which of their tokens are no padding.
        positions: of these.
    """

    samples: Tensor
    tokens: Tensor
    positions: Positions

    def take(self, x: Tensor) -> Tensor:
        """Return the tokens of the group (b, prefix + n, C) of those of the batch (B, prefix + N, C)."""
        return x[self.samples, self.tokens]

    def mask(self, attn_mask: Tensor | None) -> Tensor | None:
        """Return the caller's mask ([B or 1], heads or 1, T or 1, T) of the batch for the group alone."""
        if attn_mask is None:
            return None
        attn_mask = attn_mask.expand(*attn_mask.shape[:-2], attn_mask.shape[-1], -1)  # (B or 1, heads or 1, T, T)
        samples = self.samples if len(attn_mask) > 1 else torch.zeros_like(self.samples)
        tokens = self.tokens
        return attn_mask[samples.unsqueeze(2), :, tokens.unsqueeze(2), tokens.unsqueeze(1)].permute(0, 3, 1, 2)


def each(x: Tensor, groups: Iterable[tuple[Group, Known]], change: Callable[[Tensor, Known], Tensor]) -> Tensor:
    """Return x (B, prefix + N, C), the tokens of each group replaced by what `change` makes of them.

    Args:
        x: tokens of the batch.
        groups: each with what `change` needs to know of it.
        change: gets the tokens of a group (b, prefix + n, C), and that.
    """
    for group, known in groups:
        changed = change(group.take(x), known)
        x = x.to(changed.dtype).index_put((group.samples, group.tokens), changed)
    return x


def sizes_of(coords: Tensor, valid: Tensor) -> list[Size]:
    """Return the grid (H, W) of each picture: as large as its last row and column, padding apart."""
    last = coords.masked_fill(~valid.unsqueeze(-1), 0).amax(dim=1) if coords.shape[1] else coords.sum(dim=1)
    return [(height + 1, width + 1) for height, width in last.long().tolist()]


def group_pictures(
    coords: Tensor,
    valid: Tensor,
    sizes: list[Size],
    num_prefix_tokens: int = 0,
) -> list[Group]:
    """Return the pictures of a batch by their grids.

    Args:
        coords: (B, N, 2), (y, x) of each patch token.
        valid: (B, N), false for padding.
        sizes: the grid of each picture.
        num_prefix_tokens: in front of the patch tokens.
    """
    members: dict[tuple[Size, int], list[int]] = {}
    for sample, key in enumerate(zip(sizes, valid.sum(dim=1).tolist(), strict=True)):
        members.setdefault(key, []).append(sample)
    groups = []
    for (size, count), members_of_size in members.items():
        samples = torch.tensor(members_of_size, device=coords.device).unsqueeze(1)  # (b, 1)
        patches = valid[samples[:, 0]].nonzero()[:, 1].view(len(samples), count)  # (b, n)
        positions = Positions.grid(size, num_prefix_tokens, device=coords.device).promote(coords.dtype)
        there = coords[samples, patches]  # (b, n, 2)
        if count != positions.num_patches or not (there == positions.coords).all():
            positions = Positions(there, size, num_prefix_tokens)
        prefix = torch.arange(num_prefix_tokens, device=coords.device).expand(len(samples), -1)
        tokens = torch.cat([prefix, patches + num_prefix_tokens], dim=1)
        groups.append(Group(samples, tokens, positions))
    return groups


def pictures_alone(x: Tensor, *others: Tensor | None) -> Tensor:
    """Return the pictures x (B, C, H, W), of which a graph of torch.fx is; ValueError for what belongs to patches."""
    if any(other is not None for other in others):
        raise ValueError("a graph of torch.fx is of pictures, without patch_coord; give patches to the model itself")
    return x


class RaggedContext(AttentionContext):
    """What attention knows of a batch of grids that differ: the pictures of each grid, with a context of theirs.

    Args:
        groups: of the batch.
        num_prefix_tokens: in front of the patch tokens.
    """

    num_prefix_tokens = 0

    def __init__(self, groups: list[tuple[Group, AttentionContext]], num_prefix_tokens: int):
        self.groups, self.num_prefix_tokens = groups, num_prefix_tokens


class RaggedMixin(IsotropicMixin):
    """The stem and the loop over blocks of a converted model that takes batches of pictures whose grids differ."""

    def add_positions(self, x: Tensor, positions: Positions) -> Tensor:
        """Return the tokens (B, prefix + N, C) of one grid, with input encodings."""
        return add_encodings(x, positions, self.pos_embed_input, self.tables)

    def embed_ragged(self, x: Tensor, coords: Tensor, valid: Tensor) -> tuple[Tensor, Tensor, list[Size]]:
        """Return tokens with input encodings, their coordinates, moved by augmentation, and the grid of each picture.

        Args:
            x: (B, prefix + N, C).
            coords: (B, N, 2), (y, x) of each patch token.
            valid: (B, N), false for padding.
        """
        sizes, coords = sizes_of(coords, valid), coords.to(torch.promote_types(torch.float32, x.dtype))
        if self.training and self.coordinate_augmentation is not None:  # one draw for the pictures of each grid
            groups = [(group, group.positions) for group in group_pictures(coords, valid, sizes)]
            draw = self.coordinate_augmentation
            coords = each(coords, groups, lambda part, positions: draw(positions).coords.expand_as(part))
        groups = group_pictures(coords, valid, sizes, self.num_prefix_tokens)
        return each(x, [(group, group.positions) for group in groups], self.add_positions), coords, sizes

    def ragged_context(
        self, coords: Tensor, valid: Tensor, sizes: list[Size], attn_mask: Tensor | None = None
    ) -> RaggedContext:
        """Return what the blocks need to know of the tokens of a batch, with the caller's own mask."""
        groups = group_pictures(coords, valid, sizes, self.num_prefix_tokens)
        contexts = [(group, self.context(group.positions)) for group in groups]
        for group, context in contexts:
            context.attn_mask = group.mask(attn_mask)
        return RaggedContext(contexts, self.num_prefix_tokens)

    def forward_block(self, block: Callable[..., Tensor], x: Tensor, context: AttentionContext) -> Tensor:
        if isinstance(context, RaggedContext):
            return each(x, context.groups, partial(super().forward_block, block))
        return super().forward_block(block, x, context)

    def forward_blocks(self, x: Tensor, context: AttentionContext) -> Tensor:
        if isinstance(context, RaggedContext):
            return each(x, context.groups, super().forward_blocks)
        return super().forward_blocks(x, context)
