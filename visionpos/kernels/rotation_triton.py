"""The kernel of `rotation.py`, in both directions."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..rotary.split import join_gradients

BLOCK = 1024  # pairs that a program rotates


@triton.jit
def unravel(index, T, HEADS: tl.constexpr, WIDTH: tl.constexpr):
    """Return the sample, token, head and place in the head of things numbered in that order, WIDTH in a head."""
    row = index // (WIDTH * HEADS)
    return row // T, row % T, index // WIDTH % HEADS, index % WIDTH


@triton.jit
def rotate_pairs(
    Q, K, V, OUT, COS, SIN, num_pairs, T, x_b, x_h, x_t, table_b, table_h, table_t,
    PARTS: tl.constexpr, HEADS: tl.constexpr, PAIRS: tl.constexpr, INTERLEAVED: tl.constexpr, SIGN: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Rotate Q and K, (B, heads, T, d) of any strides, to OUT (B, T, PARTS, heads, d); a third part, V, is copied.

    The channels of pair p are 2 p and 2 p + 1 if INTERLEAVED, else p and PAIRS + p. Either way a thread reads and
    writes runs of 16 bytes, if PAIRS is a multiple of 8.
    """
    part = tl.program_id(1)
    X = Q
    if part == 1:
        X = K
    if part == 2:
        X = V
    pair = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = pair < num_pairs
    b, t, h, p = unravel(pair, T, HEADS, PAIRS)
    angle = b * table_b + h * table_h + t * table_t + p
    rotated = pair < tl.where(part < 2, num_pairs, 0)
    cos = tl.load(COS + angle, mask=rotated, other=1.0)
    sin = tl.load(SIN + angle, mask=rotated, other=0.0) * SIGN
    if INTERLEAVED:
        channel = tl.program_id(0) * (2 * BLOCK) + tl.arange(0, 2 * BLOCK)
        inside = channel < 2 * num_pairs
        b, t, h, c = unravel(channel, T, HEADS, 2 * PAIRS)
        x = tl.load(X + b * x_b + h * x_h + t * x_t + c, mask=inside)
        first, second = tl.split(tl.reshape(x.to(tl.float32), (BLOCK, 2)))
        turned = tl.reshape(tl.join(first * cos - second * sin, first * sin + second * cos), (2 * BLOCK,))
        at = OUT + (((b * T + t) * PARTS + part) * HEADS + h) * (2 * PAIRS) + c
        tl.store(at, turned.to(OUT.dtype.element_ty), mask=inside)
    else:
        at = X + b * x_b + h * x_h + t * x_t + p
        first = tl.load(at, mask=inside).to(tl.float32)
        second = tl.load(at + PAIRS, mask=inside).to(tl.float32)
        at = OUT + (((b * T + t) * PARTS + part) * HEADS + h) * (2 * PAIRS) + p
        tl.store(at, (first * cos - second * sin).to(OUT.dtype.element_ty), mask=inside)
        tl.store(at + PAIRS, (first * sin + second * cos).to(OUT.dtype.element_ty), mask=inside)


def launch(parts: list[Tensor], cos: Tensor, sin: Tensor, interleaved: bool, sign: float) -> Tensor:
    """Rotate q and k, and copy v if it is given: (B, heads, T, d) each -> (B, T, parts, heads, d)."""
    if any(x.stride() != parts[0].stride() or x.stride(-1) != 1 for x in parts):
        parts = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in parts]
    if cos.stride() != sin.stride() or cos.stride(-1) != 1:
        cos, sin = cos.contiguous(), sin.contiguous()
    B, H, T, d = parts[0].shape
    out = parts[0].new_empty(B, T, len(parts), H, d)
    cos, sin = (table.expand(B, H, T, d // 2) for table in (cos, sin))
    num_pairs = B * T * H * d // 2
    with torch.cuda.device_of(out):
        rotate_pairs[(triton.cdiv(num_pairs, BLOCK), len(parts))](
            parts[0], parts[1], parts[-1], out, cos, sin, num_pairs, T, *parts[0].stride()[:3], *cos.stride()[:3],
            PARTS=len(parts), HEADS=H, PAIRS=d // 2, INTERLEAVED=interleaved, SIGN=sign, BLOCK=BLOCK,
        )  # fmt: skip
    return out


def rotate_forward(qkv: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """Return q and k of a buffer (B, T, 3, heads, d), rotated: (B, T, 2, heads, d)."""
    return launch([qkv[:, :, i].transpose(1, 2) for i in (0, 1)], cos, sin, interleaved, 1.0)


rotate_qk = torch.library.custom_op("visionpos::rotate_qk", rotate_forward, mutates_args=())


@rotate_qk.register_fake
def _(qkv: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    return torch.empty_like(qkv[:, :, :2], memory_format=torch.contiguous_format)


def rotate_backward(
    grad_q: Tensor, grad_k: Tensor, grad_v: Tensor, cos: Tensor, sin: Tensor, interleaved: bool
) -> Tensor:
    """Return the gradient of the buffer, (B, T, 3, heads, d), from those of q, k and v, (B, heads, T, d) each."""
    return launch([grad_q, grad_k, grad_v], cos, sin, interleaved, -1.0)


rotate_qkv_backward = torch.library.custom_op("visionpos::rotate_qkv_backward", rotate_backward, mutates_args=())


@rotate_qkv_backward.register_fake
def _(grad_q: Tensor, grad_k: Tensor, grad_v: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    B, H, T, d = grad_q.shape
    return grad_q.new_empty(B, T, 3, H, d)


class RotateQKV(torch.autograd.Function):
    """qkv -> q, k, v. A function around the operators, since v is a view of the buffer and theirs may not be one.

    Eager calls go past the operators, which a graph needs: half of the time that the host takes for a call is theirs.
    """

    @staticmethod
    def forward(ctx, qkv: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> tuple[Tensor, Tensor, Tensor]:
        """See `split_qkv`; cos and sin ([B,] heads or 1, T, d / 2)."""
        ctx.save_for_backward(cos, sin)
        ctx.interleaved = interleaved
        qk = (rotate_qk if torch.compiler.is_compiling() else rotate_forward)(qkv, cos, sin, interleaved)
        return qk[:, :, 0].transpose(1, 2), qk[:, :, 1].transpose(1, 2), qkv[:, :, 2].transpose(1, 2)

    @staticmethod
    def backward(ctx, grad_q: Tensor, grad_k: Tensor, grad_v: Tensor) -> tuple[Tensor, None, None, None]:
        if torch.is_grad_enabled():  # the gradient's own gradient may be asked for, which the kernel does not have
            layout = "interleaved" if ctx.interleaved else "half"
            return join_gradients(grad_q, grad_k, grad_v, torch.stack(ctx.saved_tensors), layout), None, None, None
        rotate = rotate_qkv_backward if torch.compiler.is_compiling() else rotate_backward
        return rotate(grad_q, grad_k, grad_v, *ctx.saved_tensors, ctx.interleaved), None, None, None
