"""The logit kernel: what an encoding contributes to the attention of one token to another, as one (heads, N, N) array.

| place       | K(p, p')                                                                                             |
| ----------- | ---------------------------------------------------------------------------------------------------- |
| input       | e(p) . e(p')                                                                                         |
| rotary      | (R(p) q) . (R(p') q), the mean over unit vectors q: trace(R(p)^T R(p')) / D; mean cosine for RoPE     |
|             | and, where q and k are not multiplied by matrices, of channels with one magnitude, for PoPE           |
| bias        | b(p, p'); with content where it needs any: one random vector of unit variance, the same for all tokens |
| conditional | e(p) . e(p'), where e(p) is what it mixes into tokens that all hold that one random vector           |

Definitions: section 7 of the project's encodings reference. Everything goes through the public contract alone.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from ..encoding import LayerFacts, PositionEncoding
from ..positions import Positions
from ..registry import FIXED, check_options, complete_options, get_encoding_class

DIM, HEADS, HEAD_DIM, DEPTH = 192, 3, 64, 12  # ViT-Tiny


class NotDefined(ValueError):
    """The error of a property that has no meaning for an encoding; the text says why."""


def build(name: str, grid: tuple[int, ...], **options: Any) -> PositionEncoding:
    """Return an encoding as a ViT-Tiny that is trained on this grid has it, at a fixed random initialisation.

    What the model knows of a layer is filled in, as in the model, so that on another grid it does what it does there.

    A ViT-Tiny has 192 channels, 3 heads of 64.

    A table that its paper starts at zero, which has no properties yet, is drawn with a standard deviation of 0.02.

    Raises:
        ValueError: an unknown name or option.
    """
    cls, given = get_encoding_class(name), options
    check_options(cls, given)
    heads = given.get("num_heads", HEADS)
    sizes = {"dim": DIM, "num_heads": heads, "head_dim": DIM // heads, "layer": 0, "depth": DEPTH}
    sizes |= {key: given[key] for key in FIXED if key in given}
    options = complete_options(cls, given, LayerFacts(**sizes, feat_shape=tuple(grid)))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        encoding = cls(**options)
        zero = all(not parameter.any() for parameter in encoding.parameters())
        if encoding.learnable and zero and "init_std" in options and "init_std" not in given:
            encoding = cls(**{**options, "init_std": 0.02})
        return encoding


def exact(encoding: PositionEncoding) -> PositionEncoding:
    """Return a copy in float64 on the CPU, for use with float64 coordinates."""
    return copy.deepcopy(encoding).cpu().double()


def exact_grid(grid: tuple[int, ...]) -> Positions:
    """Return the positions of a whole grid in float64."""
    positions = Positions.grid(grid)
    return Positions(positions.coords.double(), grid, is_grid=True)


def width(encoding: PositionEncoding) -> int:
    """Return the channels of the tokens that an encoding works on."""
    if isinstance(getattr(encoding, "dim", None), int):
        return encoding.dim
    return encoding.num_heads * getattr(encoding, "head_dim", HEAD_DIM)


def content(encoding: PositionEncoding, positions: Positions, scale: float = 1.0) -> Tensor:
    """Return one random vector for all tokens: x (1, N, C), or q (1, heads, N, head_dim).

    Its variance is `scale` squared.
    """
    generator = torch.Generator().manual_seed(1)
    vector = scale * torch.randn(width(encoding), generator=generator).to(positions.coords.dtype)
    x = vector.expand(1, positions.num_tokens, -1)
    if encoding.place == "bias" and getattr(encoding, "content_source", "x") == "q":
        return x.unflatten(-1, (encoding.num_heads, -1)).transpose(1, 2)
    return x


@torch.no_grad()
def rotations(encoding: PositionEncoding, positions: Positions) -> Float[Tensor, "heads n d d"]:
    """Return R(p) of a rotary encoding as matrices: column c is the rotated unit vector of channel c."""
    if encoding.place != "rotary":
        raise NotDefined("only for the place rotary")
    if not encoding.linear:
        raise NotDefined("it is no matrix that queries and keys are multiplied by")
    unit = torch.eye(encoding.head_dim, dtype=positions.coords.dtype)
    unit = unit[:, None, None].expand(-1, encoding.num_heads, positions.num_tokens, -1)
    return encoding.rotate(unit, encoding.prepare(positions)).movedim(0, -1)


@torch.no_grad()
def vectors(encoding: PositionEncoding, positions: Positions) -> Float[Tensor, "heads n f"]:
    """Return features f with K = f(p) . f(p'): embedding, rotations as vectors, or what is mixed into equal tokens."""
    if encoding.place == "input":
        return encoding.embed(positions).detach()[None]
    if encoding.place == "rotary" and not encoding.linear:
        channels = torch.zeros(1, encoding.num_heads, positions.num_tokens, encoding.head_dim).to(positions.coords)
        return F.normalize(encoding.rotate(channels, encoding.prepare(positions))[0], dim=-1)
    if encoding.place == "rotary":
        return rotations(encoding, positions).flatten(2) / math.sqrt(encoding.head_dim)
    if encoding.place == "conditional":
        return encoding.mix(content(encoding, positions), positions)
    raise NotDefined("a bias gives no vector to a token" if encoding.place == "bias" else "it encodes nothing")


@torch.no_grad()
def bias(encoding: PositionEncoding, positions: Positions, given: Tensor | None = None) -> Float[Tensor, "heads n n"]:
    """Return the bias; `given` is the content for one that needs any.

    Pairs that it hides from each other are -inf: those with the lowest value, if that is below -1000 and is shared by
    more than one pair in a hundred, as no distance is.
    """
    if encoding.content_dependent:
        values = encoding.bias(positions, content=content(encoding, positions) if given is None else given)[0]
    else:
        values = encoding.bias(positions)
    lowest = values == values.min()
    return values.masked_fill(lowest & (values < -1e3) & (lowest.double().mean() > 0.01), -math.inf)


@torch.no_grad()
def values(encoding: PositionEncoding, positions: Positions) -> Float[Tensor, "heads n f"]:
    """Return what the encoding itself computes: `vectors`, or the rows of its bias."""
    return bias(encoding, positions) if encoding.place == "bias" else vectors(encoding, positions)


@torch.no_grad()
def logit_kernel(
    encoding: PositionEncoding, positions: Positions, queries: Tensor | None = None
) -> Float[Tensor, "heads q n"]:
    """Return K of every pair of tokens, (heads, N, N), heads 1 for an encoding of tokens.

    Args:
        encoding: any encoding; with float64 coordinates, `exact` of it.
        positions: coordinates (N, A) without prefix tokens.
        queries: indices of the rows that are wanted, by default all: (heads, Q, N).

    Raises:
        NotDefined: `none` contributes nothing.
    """
    if encoding.place == "bias":
        kernel = bias(encoding, positions)
        return kernel if queries is None else kernel[:, queries]
    features = vectors(encoding, positions)
    return (features if queries is None else features[:, queries]) @ features.mT


@torch.no_grad()
def attention_logits(encoding: PositionEncoding, positions: Positions, seed: int = 0) -> Float[Tensor, "heads n n"]:
    """Return the logits of an attention layer with random content (N, C) and projections; the seed decides both."""
    channels = width(encoding)
    generator = torch.Generator().manual_seed(seed)
    draw = torch.randn(positions.num_tokens + 2 * channels, channels, generator=generator).to(positions.coords.dtype)
    x, w_q, w_k = draw[None].split([positions.num_tokens, channels, channels], dim=1)
    if encoding.place == "input":
        x = encoding(x, positions)
    elif encoding.place not in ("rotary", "bias"):
        raise NotDefined(
            "it is no function of coordinates" if encoding.place == "conditional" else "it encodes nothing"
        )
    heads = getattr(encoding, "num_heads", 1)
    q, k = ((x @ w / math.sqrt(channels)).unflatten(-1, (heads, -1)).transpose(1, 2) for w in (w_q, w_k))
    scale = math.sqrt(q.shape[-1])
    if encoding.place == "rotary":
        q, k = encoding(q, k, positions)
    logits = (q @ k.mT)[0] / scale
    if encoding.place == "bias":
        logits = logits + bias(encoding, positions, q if getattr(encoding, "content_source", "x") == "q" else x)
    return logits


def phase_frequencies(encoding: PositionEncoding, positions: Positions) -> Float[Tensor, "heads bands axes"]:
    """Return theta of angles theta . p + constant, in radians per grid step, fitted and checked.

    Raises:
        NotDefined: no rotation of channel pairs, or angles that are not linear in the coordinates.
    """
    rotation = rotations(encoding, positions)
    with torch.no_grad():
        angles = encoding.angles(positions)  # (heads or 1, N, bands)
    waves = torch.cat([angles.cos(), angles.sin()], dim=-1)
    pairs = waves @ waves.mT / angles.shape[-1]
    flat = rotation.flatten(2)
    if (pairs - flat @ flat.mT / encoding.head_dim).abs().max() > 1e-6:
        raise NotDefined("its rotations do not turn pairs of channels by the angles")
    design = F.pad(positions.coords, (0, 1), value=1.0)
    fitted = torch.linalg.lstsq(design.expand(len(angles), -1, -1), angles).solution  # (heads, axes + 1, bands)
    if (design @ fitted - angles).abs().max() > 1e-6 * angles.abs().max().clamp(min=1):
        raise NotDefined("its angles are not linear in the coordinates")
    return fitted[:, :-1].mT
