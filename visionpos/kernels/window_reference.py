"""Attention inside the windows of a grid in PyTorch: what defines the kernel, and gives its second derivatives."""

from __future__ import annotations

from torch import Tensor

from ..windows import shifted_window_mask, window_partition, window_reverse


def reference(qkv: Tensor, bias: Tensor, window: tuple[int, int], shift: tuple[int, int], scale: float) -> Tensor:
    """Return softmax(scale q k^T + bias + shift mask) v inside every window: (B, H, W, heads, d).

    Args:
        qkv: (B, H, W, 3, heads, d), the whole grid in row-major order, neither rolled nor cut.
        bias: (heads, N, N), N = h w: the relative table's, or that of any encoding without samples of its own.
        window: (h, w), which divides (H, W).
        shift: (sy, sx), how far the grid is rolled up and left before it is cut; see `shifted_window_mask`.
        scale: of the logits, before the bias is added.
    """
    B, H, W, _, heads, d = qkv.shape
    tokens = qkv.flatten(3).roll((-shift[0], -shift[1]), (1, 2))
    q, k, v = window_partition(tokens, window).unflatten(-1, (3, heads, d)).permute(2, 0, 3, 1, 4).unbind(0)
    added = bias.unsqueeze(0)
    if any(shift):
        added = added + shifted_window_mask((H, W), window, shift, device=qkv.device).unsqueeze(1)
    logits = (q * scale) @ k.transpose(-2, -1)  # (B * windows, heads, N, N)
    probabilities = (logits.unflatten(0, (B, -1)) + added.to(q.dtype)).softmax(dim=-1).flatten(0, 1)
    out = (probabilities @ v).transpose(1, 2).flatten(2)  # (B * windows, N, C)
    return window_reverse(out, window, (H, W)).roll(tuple(shift), (1, 2)).unflatten(-1, (heads, d))
