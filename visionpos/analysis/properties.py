"""The properties that people claim of position encodings, as numbers, one function each, on plain tensors.

Most work on the logit kernel K (heads, N, N) of `logit_kernel`: what the encoding contributes to the attention of the
token in row i to the token in column j. Pairs that a bias hides are -inf in it; statistics leave them out. A property
that has no meaning for its input raises `NotDefined`, whose text is the reason. Diagnostics, not requirements: good
encodings break each of them on purpose.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from ..positions import Positions
from .kernel import NotDefined

Kernel = Float[Tensor, "heads n n"]
SAME_SPREAD = 1e-12  # relative spread below which all entries of a kernel count as equal


def _spread(kernel: Tensor) -> Tensor:
    """Return K minus its mean, head by head; hidden pairs are 0.

    Raises:
        NotDefined: nothing is left to describe.
    """
    seen = kernel.isfinite()
    mean = kernel.where(seen, 0).sum((1, 2)) / seen.sum((1, 2)).clamp(min=1)
    spread = (kernel - mean[:, None, None]).where(seen, 0)
    if spread.abs().max() <= SAME_SPREAD * kernel.where(seen, 0).abs().max():
        raise NotDefined("all pairs of tokens have the same value")
    return spread


def _group_mean(kernel: Tensor, group: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return the mean of K over the pairs of each group, hidden ones left out: (heads, groups), and whether any are."""
    seen, group = kernel.isfinite().flatten(1), group.flatten().expand(len(kernel), -1)
    zeros = kernel.new_zeros(len(kernel), count)
    total = zeros.scatter_add(1, group, kernel.flatten(1).where(seen, 0))
    number = zeros.scatter_add(1, group, seen.to(kernel.dtype))
    return total / number.clamp(min=1), number > 0


def _shells(positions: Positions) -> tuple[Tensor, Tensor]:
    """Return the distances between two tokens that occur, (R,), and which of them each pair has, (N, N)."""
    delta = positions.coords[:, None] - positions.coords[None]
    squared, group = delta.square().sum(-1).round(decimals=6).unique(return_inverse=True)
    return squared.sqrt(), group


def sup_norm(values: Tensor) -> float:
    """Return B = max |value|, 0 to infinity, pairs hidden by a bias left out. Sinusoid 1; ALiBi grows with the grid."""
    return values[values.isfinite()].abs().max().item()


def norm_drift(vectors: Float[Tensor, "*heads n dim"]) -> float:
    """Return sup ||e(p)|| / inf ||e(p)|| over the tokens, 1 to infinity. Sinusoid 1: ||e||^2 = dim / 2 everywhere."""
    norms = vectors.norm(dim=-1)
    if norms.min() == 0:
        raise NotDefined("some token gets a zero vector")
    return (norms.max() / norms.min()).item()


def orthogonality_error(rotations: Float[Tensor, "heads n d d"]) -> float:
    """Return max |R^T R - I|, from 0. A rotation changes no norm, so queries and keys keep their size."""
    identity = torch.eye(rotations.shape[-1], dtype=rotations.dtype)
    return (rotations.mT @ rotations - identity).abs().max().item()


def growth_exponent(radii: Float[Tensor, " r"], profile: Float[Tensor, "heads r"]) -> float:
    """Return d log |b| / d log |delta|, the least-squares slope over distances from 1, mean of the heads.

    ALiBi 1, a logarithm near 0, bounded tables around 0.
    """
    slopes = []
    for values in profile:
        use = (radii >= 1) & values.isfinite() & (values != 0)
        x, y = radii[use].log(), values[use].abs().log()
        if len(x) > 1:
            slopes.append(((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum())
    if not slopes:
        raise NotDefined("the bias is zero at nearly every distance")
    return torch.stack(slopes).mean().item()


def linear_map_residual(
    vectors: Float[Tensor, "n dim"], positions: Positions, offset: tuple[int, ...], held_out: bool = True
) -> float:
    """Return ||e(p + k) - M e(p)|| / ||e(p + k)||, from 0: is e(p + k) a linear map of e(p)? M fits half of the pairs.

    The error is that of the other half. In-sample (`held_out=False`) it says nothing: with fewer pairs than channels
    every table has a perfect M. Sinusoids below 1e-8; a random table above 1.
    """
    coords = positions.coords
    match = (coords[:, None] + coords.new_tensor(offset) - coords[None]).abs().amax(-1) < 1e-6  # (N, N)
    start, end = match.nonzero().unbind(1)
    if len(start) < 4:
        raise NotDefined(f"fewer than four pairs of tokens are {offset} apart")
    order = torch.randperm(len(start), generator=torch.Generator().manual_seed(0))
    fit, test = order.chunk(2) if held_out else (order, order)
    into, out = vectors[start], vectors[end]
    fitted = torch.linalg.pinv(into[fit], rtol=1e-8) @ out[fit]
    return ((out[test] - into[test] @ fitted).norm() / out[test].norm()).item()


def rotation_map_residual(rotations: Float[Tensor, "heads n d d"], positions: Positions, pairs: int = 256) -> float:
    """Return max |R(p)^T R(p') - R(p + t)^T R(p' + t)| over pairs of a grid moved to the first corner; 0 to 2.

    0: queries and keys meet in a matrix that depends on their offset alone (RoPE). LieRE's generators do not commute.
    """
    cells = positions.coords.round().long()  # (N, axes)
    sizes = torch.tensor(positions.feat_shape)
    steps = sizes.flip(0).cumprod(0).roll(1).index_fill(0, torch.tensor([0]), 1).flip(0)
    drawn = torch.randint(len(cells), (2, pairs), generator=torch.Generator().manual_seed(0))
    moved = ((cells[drawn] - cells[drawn].amin(0)) * steps).sum(-1)
    before, after = (rotations[:, i].mT @ rotations[:, j] for i, j in (drawn, moved))
    return (before - after).abs().max().item()


def stationarity(kernel: Kernel, positions: Positions) -> float:
    """Return rho = ||K - T(K)|| / ||K - mean K||, T the mean over pairs of equal offset; 0 (by offset alone) to 1."""
    delta = (positions.coords[:, None] - positions.coords[None]).mul(2**20).round().long()
    code = delta[..., 0]
    for axis in range(1, delta.shape[-1]):
        code = code * (2 * int(delta.abs().max()) + 1) + delta[..., axis]
    offsets, group = code.unique(return_inverse=True)
    means, _ = _group_mean(kernel, group, len(offsets))
    left = (kernel - means[:, group]).where(kernel.isfinite(), 0)
    return (left.norm() / _spread(kernel).norm()).item()


def distance_profile(kernel: Kernel, positions: Positions) -> tuple[Tensor, Tensor]:
    """Return radii (R,) and k(r), (heads, R): the mean of K over pairs at distance r, NaN where all are hidden."""
    radii, group = _shells(positions)
    values, any_seen = _group_mean(kernel, group, len(radii))
    return radii, values.where(any_seen, math.nan)


def _ranks(x: Tensor) -> Tensor:
    _, inverse, count = x.unique(return_inverse=True, return_counts=True)
    return (count.cumsum(0) - (count - 1) / 2)[inverse].double()


def spearman(kernel: Kernel, positions: Positions) -> float:
    """Return the rank correlation of distance and K, -1 to 1, mean of the heads. -1: K falls with distance."""
    _spread(kernel)
    _, group = _shells(positions)
    found = []
    for head in kernel:
        seen = head.isfinite()
        scale = head[seen].abs().max().clamp(min=1e-30)
        pairs = torch.stack([_ranks(group[seen]), _ranks((head[seen] / scale).round(decimals=10))])
        if (pairs.std(1) > 0).all():
            found.append(torch.corrcoef(pairs)[0, 1])
    return torch.stack(found).mean().item()


def _falls(profile: Tensor) -> list[Tensor]:
    """Return each head's k(r) where it has one, scaled to a range of 1, rounded so that equal values are equal."""
    curves = []
    for values in profile:
        values = values[~values.isnan()]
        span = values.max() - values.min()
        if span > SAME_SPREAD * values.abs().max():
            curves.append((values / span).round(decimals=10))
    if not curves:
        raise NotDefined("the kernel is the same at every distance")
    return curves


def rising_share(profile: Float[Tensor, "heads r"]) -> float:
    """Return the share of steps to the next distance at which k(r) rises, 0 (monotone) to 1, mean of the heads."""
    return torch.stack([(curve.diff() > 0).double().mean() for curve in _falls(profile)]).mean().item()


def rebound(profile: Float[Tensor, "heads r"]) -> float:
    """Return max over r' > r of k(r') - k(r), in units of the range of k; 0 (never rises) to 1, mean of the heads."""
    return torch.stack([(curve - curve.cummin(0).values).max() for curve in _falls(profile)]).mean().item()


def half_radius(radii: Float[Tensor, " r"], profile: Float[Tensor, "heads r"]) -> float:
    """Return the first distance, in grid steps, at which k has fallen by half of its range, mean of the heads."""
    _falls(profile)
    found = []
    for values in profile:
        known = ~values.isnan()
        r, curve = radii[known], values[known]
        low = (curve[0] - curve >= (curve.max() - curve.min()) / 2) & (curve < curve[0])
        if low.any():
            found.append(r[low.nonzero()[0, 0]])
    if not found:
        raise NotDefined("the kernel never falls by half of its range")
    return torch.stack(found).mean().item()


def anisotropy(kernel: Kernel, positions: Positions) -> float:
    """Return the share of the variance of K left between pairs of equal distance, 0 (ALiBi) to 1, mean of the heads."""
    spread = _spread(kernel)
    radii, group = _shells(positions)
    means, _ = _group_mean(kernel, group, len(radii))
    left = (kernel - means[:, group]).where(kernel.isfinite(), 0).square().sum((1, 2))
    total = spread.square().sum((1, 2))
    return (left[total > 0] / total[total > 0]).mean().item()


def directionality(kernel: Kernel) -> float:
    """Return ||K - K^T|| / ||K||, 0 (i to j as j to i) to 2. Hidden pairs count as the head's lowest visible value."""
    kernel = bounded(kernel)
    if not kernel.any():
        raise NotDefined("the kernel is zero")
    return ((kernel - kernel.mT).norm() / kernel.norm()).item()


def bounded(kernel: Float[Tensor, "heads q n"]) -> Tensor:
    """Return K, or rows of it, with hidden pairs at the lowest visible value of their head."""
    floor = kernel.where(kernel.isfinite(), math.inf).amin((1, 2), keepdim=True)
    return kernel.maximum(floor)


def equivariance_error(before: Tensor, after: Tensor) -> float:
    """Return std(logits after - before) / std(logits before), from 0: how far moving all tokens moves logits."""
    return ((after - before).std() / before.std()).item()


def support_ratio(train: tuple[int, ...], test: tuple[int, ...]) -> tuple[float, float]:
    """Return the share of a test grid's pairs, and of its offsets, whose offset occurs on the training grid; 0 to 1."""
    pairs = offsets = 1.0
    for n, m in zip(train, test, strict=True):
        n = min(n, m)
        pairs *= sum(m - abs(d) for d in range(1 - n, n)) / m**2
        offsets *= (2 * n - 1) / (2 * m - 1)
    return pairs, offsets


def phase_coverage(frequencies: Float[Tensor, "*bands axes"], grid: tuple[int, ...]) -> Tensor:
    """Return min(1, span / 2 pi) of each rotary band, (*bands), 0 to 1.

    span = |(2 (n_a - 1) theta_a)_a| is the range of its phases on the grid. Below 1 a larger grid brings phases never
    seen. A band that never turns meets none: 1.
    """
    steps = frequencies.new_tensor([2.0 * (size - 1) for size in grid])
    span = (frequencies * steps).norm(dim=-1)
    return (span / (2 * math.pi)).clamp(max=1).where(span > 1e-12, 1.0)


def attention_entropy(logits: Float[Tensor, "heads n n"]) -> float:
    """Return the mean entropy of softmax(logits) over rows and heads in nats, 0 to ln N."""
    return torch.special.entr(logits.softmax(-1)).sum(-1).mean().item()


def output_drift(train: Tensor, test: Tensor) -> float:
    """Return the largest |value - mean| / std of the test values, mean and std those of the training values; from 0."""
    seen = train[train.isfinite()]
    if seen.std() <= SAME_SPREAD * seen.abs().max():
        raise NotDefined("all training values are the same")
    return ((test[test.isfinite()] - seen.mean()).abs().max() / seen.std()).item()


def uniqueness(vectors: Float[Tensor, "heads n f"]) -> float:
    """Return the smallest ||e(p) - e(p')|| of two tokens over the largest ||e||; 0 (two tokens look the same) to 2.

    For a bias e(p) is the token's row: what it adds to the attention from p.
    """
    flat = vectors.movedim(0, 1).flatten(1)  # (N, heads f)
    if len(flat) < 2 or not flat.any():
        raise NotDefined("there is nothing to tell apart")
    apart = torch.cdist(flat, flat).fill_diagonal_(math.inf)
    return (apart.min() / flat.norm(dim=-1).max()).item()


def relative_error(values: Tensor, exact: Tensor) -> float:
    """Return max |value - exact| / max |exact|, from 0; hidden pairs left out."""
    seen = exact.isfinite() & values.isfinite()
    if not exact[seen].any():
        raise NotDefined("the encoding is zero")
    return ((values.double() - exact.double())[seen].abs().max() / exact[seen].abs().max()).item()


def numerical_rank(kernel: Kernel, tolerance: float = 1e-2) -> int:
    """Return the smallest rank that reproduces K within `tolerance`, the largest of the heads; 0 to N."""
    if not kernel.isfinite().all():
        raise NotDefined("it hides pairs of tokens")

    def rank(head: Tensor) -> int:
        u, s, v = torch.linalg.svd(head)
        low, high = 0, len(s)
        while low < high:  # the error falls with the rank but for ripples far below the tolerance's scale
            middle = (low + high) // 2
            error = (head - (u[:, :middle] * s[:middle]) @ v[:middle]).abs().max()
            low, high = (low, middle) if error <= tolerance else (middle + 1, high)
        return low

    return max(rank(head) for head in kernel)
