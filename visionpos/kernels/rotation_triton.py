"""The kernel of `rotation.py`, in both directions."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..rotary.split import join_gradients

BLOCK = 1024  # pairs that a program rotates


@triton.jit
def rotate_pairs(
    Q, K, V, OUT, COS, SIN, num_pairs, T, x_b, x_h, x_t, table_b, table_h, table_t,
    PARTS: tl.constexpr, HEADS: tl.constexpr, PAIRS: tl.constexpr, STEP: tl.constexpr, GAP: tl.constexpr,
    SIGN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Rotate Q and K, (B, heads, T, d) of any strides, to OUT (B, T, PARTS, heads, d); a third part, V, is copied.

    The channels of pair p are p * STEP and p * STEP + GAP.
    """
    part = tl.program_id(1)
    X = Q
    if part == 1:
        X = K
    if part == 2:
        X = V
    pair = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)  # numbered in the order (b, t, head, p)
    inside = pair < num_pairs
    p, h, row = pair % PAIRS, pair // PAIRS % HEADS, pair // (PAIRS * HEADS)
    b, t = row // T, row % T
    channels = (p * STEP)[:, None] + (tl.arange(0, 2) * GAP)[None, :]  # (BLOCK, 2)

    x = tl.load(X + (b * x_b + h * x_h + t * x_t)[:, None] + channels, mask=inside[:, None])
    first, second = tl.split(x.to(tl.float32))
    angle = b * table_b + h * table_h + t * table_t + p
    rotated = pair < tl.where(part < 2, num_pairs, 0)
    cos = tl.load(COS + angle, mask=rotated, other=1.0)
    sin = tl.load(SIN + angle, mask=rotated, other=0.0) * SIGN
    turned = tl.join(first * cos - second * sin, first * sin + second * cos)
    at = ((row * PARTS + part) * HEADS + h) * (2 * PAIRS)
    tl.store(OUT + at[:, None] + channels, turned.to(OUT.dtype.element_ty), mask=inside[:, None])


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
            PARTS=len(parts), HEADS=H, PAIRS=d // 2, STEP=2 if interleaved else 1, GAP=1 if interleaved else d // 2,
            SIGN=sign, BLOCK=BLOCK,
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
