"""Windows of a grid and their shift mask, as Swin Transformer defines them (Liu et al. 2021, arXiv 2103.14030).

Tokens of a grid of 2 x 4, in windows of 2 x 2 without a shift, and with the shift (0, 1), which rolls them to the left:

    0  1  2  3      0 1 | 2 3      0 1 4 5      1 2 | 3 0      1 2 5 6
    4  5  6  7      4 5 | 6 7      2 3 6 7      5 6 | 7 4      3 0 7 4    3 and 7 must not see 0 and 4
    grid            cut            windows      rolled, cut    windows
"""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor


def check_size(name: str, size: tuple[int, ...], axes: int | None = 2) -> tuple[int, ...]:
    """Return a size as a tuple of positive integers, one for each axis, or of symbols while a graph is exported.

    Raises:
        ValueError: anything else, or another number of axes; None takes any number.
    """
    given, size = size, tuple(size) if isinstance(size, (tuple, list)) else ()
    if torch.jit.is_tracing():  # where sizes are tensors; a trace is for the size that it was made with
        size = tuple(map(int, size))
    whole = all(isinstance(n, torch.SymInt) or (isinstance(n, int) and n is not True and n < 2**31) for n in size)
    if not size or len(size) != (axes or len(size)) or not whole or min(size) < 1:
        raise ValueError(f"{name} must be {axes or len(size) or 'one or more'} positive integers, got {given!r}")
    return size


def same_grid(a: tuple[int, ...], b: tuple[int, ...]) -> bool:
    """Return whether two grids are known to be equal; a size that is a symbol of an exported graph equals no number."""
    return all(type(x) is type(y) and x == y for x, y in zip(a, b, strict=True))


def window_partition(x: Tensor, window_size: tuple[int, int]) -> Tensor:
    """Return tokens (B, H, W, C) cut into windows, (B * windows, wh * ww, C), both in row-major order.

    Raises:
        ValueError: H or W is not a multiple of the window.
    """
    (height, width), (wh, ww) = x.shape[1:3], window_size
    if wh < 1 or ww < 1 or height % wh or width % ww:
        raise ValueError(f"window_size {(wh, ww)} does not divide the grid {(height, width)}")
    return rearrange(x, "b (i wh) (j ww) c -> (b i j) (wh ww) c", wh=wh, ww=ww)


def window_reverse(windows: Tensor, window_size: tuple[int, int], feat_shape: tuple[int, int]) -> Tensor:
    """Return windows (B * windows, wh * ww, C) put together as (B, H, W, C): the inverse of `window_partition`."""
    (wh, ww), (height, width) = window_size, feat_shape
    return rearrange(windows, "(b i j) (wh ww) c -> b (i wh) (j ww) c", wh=wh, ww=ww, i=height // wh, j=width // ww)


@lru_cache(maxsize=256)
@torch.inference_mode(False)
def window_order(
    feat_shape: tuple[int, int], window_size: tuple[int, int], shift: tuple[int, int], device: torch.device
) -> tuple[Tensor, Tensor]:
    """Return the way of a grid's tokens into windows and back: rolled by -shift, padded at the end, cut.

    Returns:
        order (windows * N,): the token, in row-major order, at each place in the windows; H * W at a padded place.
        place (H * W,): the place of each token.
    """
    (height, width), (wh, ww) = feat_shape, window_size
    tokens = torch.arange(height * width, device=device).view(height, width).roll((-shift[0], -shift[1]), (0, 1))
    tokens = F.pad(tokens, (0, -width % ww, 0, -height % wh), value=height * width)  # multiples of the window
    order = window_partition(tokens[None, :, :, None], window_size).flatten()  # (windows * N,)
    return order, order.argsort()[: height * width]


class TakeTokens(torch.autograd.Function):
    """Function x (B, L, C) -> x[:, order], zeros where the order says L; `place` is the way back, for gradients.

    Both ways are a gather. Autograd would add gradients up by index, which is slower, though no token occurs twice.
    """

    @staticmethod
    def forward(ctx, x: Tensor, order: Tensor, place: Tensor) -> Tensor:
        ctx.save_for_backward(order, place)
        padded = F.pad(x, (0, 0, 0, 1)) if order.shape[0] > x.shape[1] else x  # (B, L or L + 1, C)
        return padded.index_select(1, order)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        order, place = ctx.saved_tensors
        return TakeTokens.apply(grad, place, order), None, None


def offset_index(window_size: tuple[int, ...], device=None) -> Int[Tensor, "n n"]:
    """Return `relative_position_index` of a window on any number of axes: (N, N) int64, row the query, column the key.

    A token of n cells of an axis counts on in steps of the 2n - 1 offsets of that axis. So the difference of two tokens
    is that of the rows of two offsets, and the row of the offset 0 is the number of the last token.
    """
    token = torch.zeros((), dtype=torch.long, device=device)
    for size in window_size:
        token = token.unsqueeze(-1) * (2 * size - 1) + torch.arange(size, device=device)  # one more axis
    token = token.flatten()  # (N,)
    return token[:, None] - token + token[-1]


def relative_position_index(window_size: tuple[int, int], device=None) -> Int[Tensor, "n n"]:
    """Return the row of the bias table for each (query, key) pair of a window.

    The result is (N, N) int64, N = h * w in row-major order.

    index = (dy + h - 1) * (2 w - 1) + (dx + w - 1) with (dy, dx) = query minus key, Swin's convention.
    Source: Liu et al. 2021 (arXiv 2103.14030).

    Raises:
        ValueError: a window that is not two positive integers.

    Example:
        >>> vp.relative_position_index((1, 2)).tolist()  # offsets -1, 0 and 1 are rows 0, 1 and 2
        [[1, 0], [2, 1]]
    """
    return offset_index(check_size("window_size", window_size), device)


def shifted_window_mask(
    feat_shape: tuple[int, int], window_size: tuple[int, int], shift: tuple[int, int], device=None
) -> Float[Tensor, "windows n n"]:
    """Return the additive mask of shifted windows: 0 where tokens see each other, -inf where the shift joined them.

    After the grid is rolled by -shift, windows hold tokens of both borders of the picture. On each axis the places
    L - s .. L - 1 then come from the other border; a token sees another if both do, or neither. Where the window does
    not divide the grid, the rolled grid is padded at its end, as timm does, and the last row of the picture and the
    first may meet in any of the last windows, where timm's own masks let them see each other. Padding counts as what
    it follows.

    Args:
        feat_shape: (H, W) of the grid.
        window_size: (h, w).
        shift: (sy, sx), each in [0, window).
        device: of the mask; by default torch's default device.

    Returns:
        (windows, N, N) float32, N = h * w.

    Raises:
        ValueError: sizes that are not two positive integers, a window larger than the grid, or a shift that is not
            two integers in [0, window).

    Example:
        >>> vp.shifted_window_mask((1, 4), (1, 2), (0, 1)).tolist()  # the second window holds both ends of the row
        [[[0.0, 0.0], [0.0, 0.0]], [[0.0, -inf], [-inf, 0.0]]]
    """
    feat_shape, window_size = check_size("feat_shape", feat_shape), check_size("window_size", window_size)
    if any(window > length for window, length in zip(window_size, feat_shape, strict=True)):
        raise ValueError(f"window_size {window_size} must fit into the grid {feat_shape}")
    shift = check_shift(shift, window_size)
    return shift_mask(feat_shape, window_size, shift, device)


def check_shift(shift: tuple[int, int], window_size: tuple[int, int]) -> tuple[int, int]:
    """Return a shift of windows as a tuple.

    Raises:
        ValueError: it is not two integers in [0, window).
    """
    pair = isinstance(shift, (tuple, list)) and len(shift) == 2 and all(type(each) is int for each in shift)
    if not pair or not all(0 <= each < window for each, window in zip(shift, window_size, strict=True)):
        raise ValueError(f"shift must be two integers in [0, window) for window_size {window_size}, got {shift!r}")
    return tuple(shift)


def shift_mask(feat_shape: tuple[int, int], window_size: tuple[int, int], shift: tuple[int, int], device) -> Tensor:
    """Return `shifted_window_mask` of any grid, smaller than the window or of symbolic size as well."""
    wrapped = []  # of each axis: which of its places, after the roll, come from the other border
    for length, window, offset in zip(feat_shape, window_size, shift, strict=True):
        place = torch.arange(length + -length % window, device=device)
        wrapped.append((place >= length - offset).long() if offset else torch.zeros_like(place))
    labels = 2 * wrapped[0][:, None] + wrapped[1]  # (H, W), padded
    tokens = window_partition(labels[None, :, :, None], window_size).squeeze(-1)  # (windows, N)
    apart = tokens[:, :, None] != tokens[:, None, :]  # (windows, N, N)
    return torch.zeros(apart.shape, device=device).masked_fill(apart, float("-inf"))
