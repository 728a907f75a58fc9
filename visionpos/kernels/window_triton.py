"""The kernels of `window.py`.

One program has one head and every SPLIT-th window. It holds the head's bias on chip, in a square of M x M, the tokens
of a window rounded up to a power of two.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from .window_reference import reference


@triton.jit
def load_bias(BIAS, h, N: tl.constexpr, M: tl.constexpr):
    """Return the bias of head h, (M, M), -inf for keys that the window does not have."""
    t = tl.arange(0, M)
    real = t < N
    bias = tl.load(BIAS + (h * N + t[:, None]) * N + t[None, :], mask=real[:, None] & real[None, :], other=0.0)
    return tl.where(real[None, :], bias.to(tl.float32), float("-inf"))


@triton.jit
def locate(
    index, H, W, WH: tl.constexpr, WW: tl.constexpr, SY: tl.constexpr, SX: tl.constexpr, M: tl.constexpr
):  # fmt: skip
    """Return where the tokens of window `index` are, numbered through the batch, and their shift regions: (M,) each."""
    t = tl.arange(0, M)
    columns, windows = W // WW, (H // WH) * (W // WW)
    b, window = index // windows, index % windows
    y = window // columns * WH + t // WW  # in the rolled grid
    x = window % columns * WW + t % WW
    region = (y >= H - SY).to(tl.int32) * 2 + (x >= W - SX).to(tl.int32)
    return (b * H + (y + SY) % H) * W + (x + SX) % W, region


@triton.jit
def softmax(q, k, bias, region, scale, N: tl.constexpr, M: tl.constexpr, SHIFTED: tl.constexpr):
    """Return the probabilities (M, M); the rows of tokens that the window does not have are finite."""
    logits = tl.dot(q, tl.trans(k), input_precision="ieee") * scale + bias
    if SHIFTED:
        seen = (region[:, None] == region[None, :]) | (tl.arange(0, M) >= N)[:, None]
        logits = tl.where(seen, logits, float("-inf"))
    weights = tl.exp(logits - tl.max(logits, 1)[:, None])
    return weights / tl.sum(weights, 1)[:, None]


@triton.jit
def forward_kernel(
    QKV, BIAS, OUT, num_windows, H, W, scale,
    HEADS: tl.constexpr, D: tl.constexpr, C: tl.constexpr, WH: tl.constexpr, WW: tl.constexpr, SY: tl.constexpr,
    SX: tl.constexpr, M: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """Compute OUT (B, H, W, HEADS, D) of QKV (B, H, W, 3, HEADS, D), BIAS (HEADS, N, N); C is D rounded up likewise."""
    N: tl.constexpr = WH * WW
    h = tl.program_id(0)
    channel = tl.arange(0, C)
    inside = (tl.arange(0, M) < N)[:, None] & (channel < D)[None, :]
    bias = load_bias(BIAS, h, N, M)
    for index in range(tl.program_id(1), num_windows, SPLIT):
        place, region = locate(index, H, W, WH, WW, SY, SX, M)
        at = QKV + (place * (3 * HEADS * D) + h * D)[:, None] + channel[None, :]
        q = tl.load(at, mask=inside, other=0.0)
        k = tl.load(at + HEADS * D, mask=inside, other=0.0)
        v = tl.load(at + 2 * HEADS * D, mask=inside, other=0.0)
        p = softmax(q, k, bias, region, scale, N, M, SY + SX > 0)
        out = tl.dot(p.to(v.dtype), v, input_precision="ieee")
        tl.store(OUT + (place * (HEADS * D) + h * D)[:, None] + channel[None, :], out.to(v.dtype), mask=inside)


@triton.jit
def backward_kernel(
    QKV, BIAS, GRAD, GRAD_QKV, GRAD_BIAS, num_windows, H, W, scale,
    HEADS: tl.constexpr, D: tl.constexpr, C: tl.constexpr, WH: tl.constexpr, WW: tl.constexpr, SY: tl.constexpr,
    SX: tl.constexpr, M: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """Turn GRAD (B, H, W, HEADS, D) into GRAD_QKV, as QKV, and GRAD_BIAS (SPLIT, HEADS, N, N), a part per program."""
    N: tl.constexpr = WH * WW
    h = tl.program_id(0)
    t = tl.arange(0, M)
    channel = tl.arange(0, C)
    inside = (t < N)[:, None] & (channel < D)[None, :]
    bias = load_bias(BIAS, h, N, M)
    grad_bias = tl.zeros((M, M), tl.float32)
    for index in range(tl.program_id(1), num_windows, SPLIT):
        place, region = locate(index, H, W, WH, WW, SY, SX, M)
        at = (place * (3 * HEADS * D) + h * D)[:, None] + channel[None, :]
        q = tl.load(QKV + at, mask=inside, other=0.0)
        k = tl.load(QKV + at + HEADS * D, mask=inside, other=0.0)
        p = softmax(q, k, bias, region, scale, N, M, SY + SX > 0)
        grad = tl.load(GRAD + (place * (HEADS * D) + h * D)[:, None] + channel[None, :], mask=inside, other=0.0)
        grad_v = tl.dot(tl.trans(p).to(grad.dtype), grad, input_precision="ieee")
        tl.store(GRAD_QKV + at + 2 * HEADS * D, grad_v.to(q.dtype), mask=inside)
        v = tl.load(QKV + at + 2 * HEADS * D, mask=inside, other=0.0)
        grad_p = tl.dot(grad, tl.trans(v), input_precision="ieee")
        grad_logits = p * (grad_p - tl.sum(p * grad_p, 1)[:, None])
        grad_bias += grad_logits
        scaled = (grad_logits * scale).to(q.dtype)
        tl.store(GRAD_QKV + at, tl.dot(scaled, k, input_precision="ieee").to(q.dtype), mask=inside)
        grad_k = tl.dot(tl.trans(scaled), q, input_precision="ieee")
        tl.store(GRAD_QKV + at + HEADS * D, grad_k.to(q.dtype), mask=inside)
    part = ((tl.program_id(1) * HEADS + h) * N + t[:, None]) * N + t[None, :]
    tl.store(GRAD_BIAS + part, grad_bias, mask=(t < N)[:, None] & (t < N)[None, :])


def _split(x: Tensor, heads: int, num_windows: int, per_processor: int) -> int:
    """Return the number of programs for a head: enough to fill the device, and no more than there are windows."""
    processors = torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 1
    return min(num_windows, triton.cdiv(per_processor * processors, heads))


def _sizes(qkv: Tensor, window: list[int], shift: list[int]) -> dict[str, int]:
    """Return what the kernels are compiled for."""
    (h, w), (heads, d) = window, qkv.shape[-2:]
    m, c = (max(triton.next_power_of_2(size), 16) for size in (h * w, d))
    return {"HEADS": heads, "D": d, "C": c, "WH": h, "WW": w, "SY": shift[0], "SX": shift[1], "M": m}


def attend_forward(qkv: Tensor, bias: Tensor, window: list[int], shift: list[int], scale: float) -> Tensor:
    """Return what `window.reference` does."""
    qkv, bias = qkv.contiguous(), bias.contiguous()
    B, H, W, _, heads, d = qkv.shape
    out = qkv.new_empty(B, H, W, heads, d)
    num_windows = B * H * W // (window[0] * window[1])
    split = _split(qkv, heads, num_windows, per_processor=4)
    with torch.cuda.device_of(qkv):
        forward_kernel[(heads, split)](
            qkv, bias, out, num_windows, H, W, scale, **_sizes(qkv, window, shift), SPLIT=split, num_warps=4
        )
    return out


window_attention = torch.library.custom_op("visionpos::window_attention", attend_forward, mutates_args=())


@window_attention.register_fake
def _(qkv: Tensor, bias: Tensor, window: list[int], shift: list[int], scale: float) -> Tensor:
    return qkv.new_empty(*qkv.shape[:3], *qkv.shape[4:])


def attend_backward(
    grad: Tensor, qkv: Tensor, bias: Tensor, window: list[int], shift: list[int], scale: float
) -> tuple[Tensor, Tensor]:
    """Return the gradients of qkv and of the bias."""
    grad, qkv, bias = grad.contiguous(), qkv.contiguous(), bias.contiguous()
    B, H, W, _, heads, _ = qkv.shape
    num_windows = B * H * W // (window[0] * window[1])
    split = _split(qkv, heads, num_windows, per_processor=2)
    grad_qkv, parts = torch.empty_like(qkv), qkv.new_empty(split, *bias.shape, dtype=torch.float32)
    with torch.cuda.device_of(qkv):
        backward_kernel[(heads, split)](
            qkv, bias, grad, grad_qkv, parts, num_windows, H, W, scale, **_sizes(qkv, window, shift), SPLIT=split,
            num_warps=4,
        )  # fmt: skip
    return grad_qkv, parts.sum(0).to(bias.dtype)


window_attention_backward = torch.library.custom_op(
    "visionpos::window_attention_backward", attend_backward, mutates_args=()
)


@window_attention_backward.register_fake
def _(
    grad: Tensor, qkv: Tensor, bias: Tensor, window: list[int], shift: list[int], scale: float
) -> tuple[Tensor, Tensor]:
    return qkv.new_empty(qkv.shape), bias.new_empty(bias.shape)


def _setup_context(ctx, inputs: tuple, output: Tensor) -> None:
    qkv, bias, *ctx.rest = inputs
    ctx.save_for_backward(qkv, bias)


def _backward(ctx, grad: Tensor, attend: Callable[..., tuple[Tensor, Tensor]] = window_attention_backward) -> tuple:
    if torch.is_grad_enabled():  # the gradient's own gradient may be asked for, which the kernel does not have
        _, gradients = torch.func.vjp(lambda qkv, bias: reference(qkv, bias, *ctx.rest), *ctx.saved_tensors)
        return *gradients(grad), None, None, None
    return *attend(grad, *ctx.saved_tensors, *ctx.rest), None, None, None


window_attention.register_autograd(_backward, setup_context=_setup_context)


class WindowAttention(torch.autograd.Function):
    """The same for eager calls, past the operator, which a graph needs: it costs the host more than the launch does."""

    forward = staticmethod(attend_forward)
    setup_context = staticmethod(_setup_context)
    backward = staticmethod(partial(_backward, attend=attend_backward))
