"""What the functions of the offset between two tokens share."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..positions import Positions
from ..windows import offset_index


def bias_of_offsets(function: Callable[[Tensor], Tensor], queries: Positions, keys: Positions) -> Tensor:
    """Return function(delta), delta = query minus key: ([B,] heads, Nq, Nk).

    A whole grid (H, W) of N tokens has N^2 pairs, but fewer than 4N offsets (2N on one axis, 8N on three): there the
    function is evaluated once for each offset, and gathered.

    Args:
        function: offsets (..., A) on A axes, (dy, dx) on two -> (..., heads).
        queries: N_q tokens.
        keys: N_k tokens.
    """
    if queries.is_grid and keys.is_grid and queries.feat_shape == keys.feat_shape:
        sizes = tuple(2 * size - 1 for size in queries.feat_shape)
        offsets = Positions.grid(sizes, device=queries.coords.device).coords.to(queries.coords.dtype)
        table = function(offsets - offsets[-1] / 2)  # from -(h - 1) to h - 1, from -(w - 1) to w - 1
        index = offset_index(queries.feat_shape, table.device)
        return table.t().index_select(1, index.flatten()).unflatten(1, index.shape)
    delta = queries.coords[..., :, None, :] - keys.coords[..., None, :, :]
    return function(delta).movedim(-1, -3)


def distance(delta: Tensor) -> Tensor:
    """Return the Euclidean length of offsets (..., A), (..., 1); at the offset 0 it and all its derivatives are 0."""
    apart = (delta != 0).any(dim=-1, keepdim=True)
    length = torch.linalg.vector_norm(torch.where(apart, delta, 1), dim=-1, keepdim=True)
    return torch.where(apart, length, 0)


def run_mlp(mlp: nn.Sequential, x: Tensor) -> Tensor:
    """Return linear layers and activations of x, in x's dtype whatever the dtype of the weights."""
    for layer in mlp:
        if isinstance(layer, nn.Linear):
            bias = None if layer.bias is None else layer.bias.to(x.dtype)
            x = F.linear(x, layer.weight.to(x.dtype), bias)
        else:
            x = layer(x)
    return x
