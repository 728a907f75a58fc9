"""Small encodings, called with content that says nothing: shared by the contract test and its users."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from .encoding import LayerFacts, PositionEncoding
from .positions import Positions
from .registry import constructor_parameters, create_encoding, required_options

GRID = (3, 5)
DIM, HEADS, HEAD_DIM, BATCH = 48, 4, 16, 2
FACTS = {"num_heads": HEADS, "head_dim": HEAD_DIM, "value_dim": DIM, "layer": 1, "depth": 3}
SMALL = LayerFacts(dim=DIM, feat_shape=GRID, **FACTS)


def small_encoding(
    cls: type[PositionEncoding], feat_shape: tuple[int, int] = GRID, prefix: int = 0, **options
) -> PositionEncoding:
    """Return an encoding of small size outside any model; learned tables are drawn large enough to be seen."""
    facts = replace(SMALL, feat_shape=feat_shape)
    visible = {"num_prefix_tokens": prefix, "init_std": 0.5}
    accepted = constructor_parameters(cls)
    visible = {key: value for key, value in visible.items() if key in accepted}
    torch.manual_seed(0)
    return create_encoding(cls.name, **{**required_options(cls, facts), **visible}, **options)


def content(encoding: PositionEncoding, positions: Positions, dtype=torch.float32) -> Tensor:
    """Return tokens or queries that are the same everywhere, (B, [heads,] T, channels): positions alone differ."""
    batch = positions.coords.shape[0] if positions.is_batched else BATCH
    generator = torch.Generator().manual_seed(1)
    if encoding.place == "rotary" or getattr(encoding, "content_source", "x") == "q":
        vector = torch.randn(1, HEADS, 1, HEAD_DIM, generator=generator)
        return vector.to(dtype).expand(batch, -1, positions.num_tokens, -1)
    vector = torch.randn(1, 1, DIM, generator=generator) if encoding.content_dependent else torch.zeros(1, 1, DIM)
    return vector.to(dtype).expand(batch, positions.num_tokens, -1)


def output(encoding: PositionEncoding, positions: Positions, dtype=torch.float32) -> Tensor:
    """Return what a layer sees: tokens plus embedding, q . k logits after rotation, or logits plus bias."""
    tokens = content(encoding, positions, dtype)
    if encoding.place == "rotary":
        q, k = encoding(tokens, tokens.flip(-1), positions)
        return q @ k.transpose(-2, -1)
    if encoding.place == "bias":
        logits = torch.zeros(len(tokens), HEADS, positions.num_tokens, positions.num_tokens, dtype=dtype)
        return encoding(logits, positions, **({"content": tokens} if encoding.content_dependent else {}))
    return encoding(tokens, positions)


def raw(encoding: PositionEncoding, positions: Positions) -> Tensor:
    """Return the encoding alone, for patch tokens: embedding, angles, bias or what is mixed in."""
    if encoding.place == "input":
        return encoding.embed(positions)
    if encoding.place == "rotary":
        return encoding.angles(positions)
    tokens = content(encoding, positions)
    if encoding.place == "conditional":
        return encoding.mix(tokens, positions)
    return encoding.bias(positions, content=tokens) if encoding.content_dependent else encoding.bias(positions)
