"""Queries, keys and values out of the buffer of their projection, rotated on the way: one pass forward, one back.

`rotate` is the definition. Here q and k are turned together, in the order of the buffer, and the buffer's gradient is
written once, where autograd would copy the gradients of three parts into one.

The buffer of one token, and what is read from it (B, T, 3, heads, D):

    memory    q of head 0 | q of head 1 | .. | k of head 0 | k of head 1 | .. | v of head 0 | v of head 1 | ..
    turned   [--------------- one stretch, q and k together, by one table --------------]
    q, k, v   views (B, heads, T, D) of that stretch and of the rest: no copy
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from ..materialize import is_plain_eager, must_be_differentiable
from ..rotation import Layout, as_pairs, channels, lies_in_pairs, rotate

MIN_BATCH_TO_EXPAND = 4  # samples for which it pays to write a table out for every head


def split_qkv(
    qkv: Float[Tensor, "b t 3 heads d"],
    table: Float[Tensor, "2 *batch some t pairs"] | None = None,
    layout: Layout = "interleaved",
    overwrite: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return q, k, v (B, heads, T, D) of qkv (B, T, 3, heads, D), with q and k turned if there is a table.

    Args:
        qkv: what the projection of an attention layer returned.
        table: cosines and sines of all tokens, (2, [B,] heads or 1, T, D / 2); (1, 0) leaves a prefix token as it is.
        layout: which channels form a pair.
        overwrite: nobody else needs the buffer: without gradients q and k may be turned in it.
    """
    if table is not None:
        table = (table if table.ndim == 5 else table.unsqueeze(1)).transpose(2, 3).unsqueeze(3)  # as qkv[:, :, :2]
    if not is_plain_eager():
        return _by_head(qkv if table is None else rotate(qkv[:, :, :2], *table, layout), qkv)
    if torch.is_grad_enabled():
        return SplitQKV.apply(qkv, table, layout)
    return _split(qkv, table, layout, overwrite)


def _split(qkv: Tensor, table: Tensor | None, layout: Layout, overwrite: bool = False) -> tuple[Tensor, ...]:
    """Return what `split_qkv` does for a table (2, B or 1, T, 1, heads or 1, D / 2), or None."""
    qk = qkv[:, :, :2]  # (B, T, 2, heads, D)
    inside = overwrite and layout == "interleaved" and lies_in_pairs(qk)
    if table is not None:
        turned = _turn(qk, *table, layout, out=qk if inside else None)
        if not inside:
            return _by_head(turned, qkv)
    return tuple(qkv.permute(2, 0, 3, 1, 4))


def _by_head(qk: Tensor, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return qk[:, :, 0].transpose(1, 2), qk[:, :, 1].transpose(1, 2), qkv[:, :, 2].transpose(1, 2)


class SplitQKV(torch.autograd.Function):
    """`_split` with gradients.

    The table's gradient is its part along the circle, (-sin, cos) Im(conj(x) dx): all that an angle receives.
    """

    @staticmethod
    def forward(ctx, qkv: Tensor, table: Tensor | None, layout: Layout) -> tuple[Tensor, ...]:
        ctx.layout = layout
        ctx.save_for_backward(table, qkv if ctx.needs_input_grad[1] else None)
        return _split(qkv, table, layout)

    @staticmethod
    def backward(ctx, *grads: Tensor) -> tuple[Tensor, Tensor | None, None]:
        table, qkv = ctx.saved_tensors
        differentiable = must_be_differentiable(*grads)
        if differentiable:
            turn = None if table is None else table.squeeze(3).transpose(2, 3)  # (2, B or 1, heads or 1, T, D / 2)
            buffer = join_gradients(*grads, turn, ctx.layout)
        else:
            buffer = _write_gradients(grads, table, ctx.layout)
        if qkv is None:
            return buffer, None, None
        product = _cross if differentiable else _cross_in_place
        along = product(qkv[:, :, :2], buffer[:, :, :2], ctx.layout, table[0].shape)
        cos, sin = table / table.square().sum(0)  # lengths that a table multiplies by are in `along` twice
        return buffer, torch.stack([-along * sin, along * cos]), None


def join_gradients(q: Tensor, k: Tensor, v: Tensor, table: Tensor | None, layout: Layout) -> Tensor:
    """Return the gradient of the buffer (B, T, 3, heads, D) by operations that have gradients of every order.

    Args:
        q: gradient of the turned q, (B, heads, T, D).
        k: likewise.
        v: gradient of v, which is not turned.
        table: what q and k were turned by, (2, [B,] heads or 1, T, D / 2), or None.
        layout: which channels form a pair.
    """
    if table is not None:
        cos, sin = table.unbind(0)
        q, k = rotate(q, cos, -sin, layout), rotate(k, cos, -sin, layout)
    return torch.stack([q, k, v]).permute(1, 3, 0, 2, 4)


def _write_gradients(grads: tuple[Tensor, ...], table: Tensor | None, layout: Layout) -> Tensor:
    """Return the same, written once; the table is (2, B or 1, T, 1, heads or 1, D / 2)."""
    grads = [grad.transpose(1, 2) for grad in grads]  # (B, T, heads, D)
    b, t, heads, d = grads[0].shape
    buffer = grads[0].new_empty(b, t, 3, heads, d)
    for index, grad in enumerate(grads):
        if table is None or index == 2:
            buffer[:, :, index] = grad
        else:
            cos, sin = table.squeeze(3)
            _turn(grad, cos, -sin, layout, out=buffer[:, :, index])
    return buffer


def _turn(x: Tensor, cos: Tensor, sin: Tensor, layout: Layout, out: Tensor | None = None) -> Tensor:
    """Return the turned x in x's dtype, computed in the wider of both; written to `out`, if it is given.

    That may be x itself where layout is "interleaved".
    """
    wide = torch.promote_types(x.dtype, cos.dtype)
    if x.dtype != wide:  # rounded once, at the end
        exact = x.to(wide, memory_format=torch.contiguous_format)
        turned = _turn(exact, cos, sin, layout, out=exact if layout == "interleaved" else None)
        return turned.to(x.dtype) if out is None else out.copy_(turned)
    cos, sin = cos.to(wide), sin.to(wide)
    if layout == "interleaved":
        circle = torch.complex(cos, sin)
        if circle.shape[0] == 1 and x.shape[0] >= MIN_BATCH_TO_EXPAND:  # a row for all heads makes inner loops long
            circle = circle.expand(1, *x.shape[1:-1], -1).contiguous()
        if out is None:
            return torch.view_as_real(as_pairs(x) * circle).flatten(-2)
        if out is x:
            as_pairs(x).mul_(circle)
        else:
            torch.mul(as_pairs(x), circle, out=as_pairs(out))
        return out
    out = torch.empty_like(x, memory_format=torch.contiguous_format) if out is None else out
    (a, b), (first, second) = x.chunk(2, dim=-1), out.chunk(2, dim=-1)
    torch.mul(x, torch.cat([cos, cos], dim=-1), out=out)
    first.addcmul_(b, sin, value=-1)
    second.addcmul_(a, sin)
    return out


def _cross(x: Tensor, grad: Tensor, layout: Layout, shape: torch.Size) -> Tensor:
    """Return Im(conj(x) grad) of every pair of x (B, T, 2, heads, D), summed to (B or 1, T, 1, heads or 1, D / 2)."""
    wide = torch.promote_types(x.dtype, torch.float32)
    (x1, x2), (grad1, grad2) = (channels(y.to(wide), layout) for y in (x, grad))
    return (x1 * grad2 - x2 * grad1).sum(2, keepdim=True).sum_to_size(shape)


def _cross_in_place(x: Tensor, grad: Tensor, layout: Layout, shape: torch.Size) -> Tensor:
    """Return the same, without a tensor of products."""
    wide = torch.promote_types(x.dtype, torch.float32)
    step = 1 if layout == "interleaved" else x.shape[-1] // 2  # from a pair's first channel to its second
    parts = x.shape[0] if shape[0] == 1 and x.device.type == "cpu" else 1  # a sample fits into the cache
    total = x.new_zeros(x.shape[0] // parts, *x.shape[1:], dtype=wide)
    pairs = total.flatten(2)[..., :-step]  # in one row for all heads; where no pair begins, nobody looks
    x, grad = (y.to(wide).flatten(2) for y in (x, grad))
    firsts_and_seconds = (y.chunk(parts) for z in (x, grad) for y in (z[..., :-step], z[..., step:]))
    for x1, x2, grad1, grad2 in zip(*firsts_and_seconds, strict=True):
        pairs.addcmul_(x1, grad2).addcmul_(x2, grad1, value=-1)
    pairs = total[..., ::2] if layout == "interleaved" else total[..., :step]
    return pairs.sum(2, keepdim=True).sum_to_size(shape)
