"""The window attention kernels in Triton's interpreter, run by test_interpreter.py, or on a GPU: pytest -m gpu."""

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from triton.runtime import interpreter

import visionpos as vp
from tests.kernels.device import DEVICE, MARKS
from visionpos import kernels
from visionpos.kernels.window_triton import window_attention as operator

OLD = triton.__version__.startswith("3.4.") and np.lib.NumpyVersion(np.__version__) >= "2.4.0"
pytestmark = [*MARKS, pytest.mark.skipif(OLD, reason="the interpreter of triton 3.4 cannot loop with this NumPy")]

CASES = {  # grid, window, shift, heads, channels per head
    "square": ((8, 12), (4, 4), (2, 2), 2, 16),
    "no_shift": ((8, 12), (4, 4), (0, 0), 2, 16),
    "oblong": ((4, 9), (2, 3), (1, 2), 3, 12),
    "shift_on_one_axis": ((6, 8), (3, 8), (1, 0), 3, 20),
    "swin": ((7, 14), (7, 7), (0, 3), 1, 32),
    "full": ((16, 8), (8, 8), (4, 0), 1, 16),
    "narrow": ((4, 8), (4, 4), (2, 2), 2, 8),
    "wide": ((8, 16), (8, 8), (4, 4), 1, 64),
}
TOLERANCE = {torch.float32: 2e-6, torch.float16: 3e-3, torch.bfloat16: 4e-2}  # the interpreter truncates bfloat16
if DEVICE == "cuda":
    del TOLERANCE[torch.float32]  # which the kernel takes in the interpreter alone
DTYPE = next(iter(TOLERANCE))
CLOSE = 1e-5 if DEVICE == "cpu" else 5e-3  # of the plain version, relative to the largest value


@pytest.fixture(autouse=True)
def _fused(monkeypatch):
    """The interpreter multiplies matrices of bfloat16 as if their bits were integers: give it float32."""
    create_dot = interpreter.InterpreterBuilder.create_dot

    def widened(x):
        bits = x.data.astype(np.uint32) << 16
        return interpreter.TensorHandle(bits.view(np.float32), tl.float32) if x.dtype.scalar == tl.bfloat16 else x

    def dot(self, a, b, *rest):
        return create_dot(self, widened(a), widened(b), *rest)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", dot)
    with kernels.use("fused"):
        yield


def inputs(case, dtype=DTYPE):
    (height, width), (h, w), shift, heads, dim = CASES[case]
    generator = torch.Generator().manual_seed(height * width)
    qkv = torch.randn(2, height, width, 3, heads, dim, generator=generator).to(DEVICE, dtype).requires_grad_()
    bias = torch.randn(heads, h * w, h * w, generator=generator).to(DEVICE).requires_grad_()
    return qkv, bias, (h, w), shift, 0.3


def oracle(qkv, bias, window, shift, scale):
    """Attention of all tokens in float64, where tokens of another window or from across the border are hidden."""
    _, height, width, _, heads, dim = qkv.shape
    y, x = torch.cartesian_prod(torch.arange(height), torch.arange(width)).to(qkv.device).unbind(-1)
    rolled_y, rolled_x = (y - shift[0]) % height, (x - shift[1]) % width
    labels = torch.stack([rolled_y // window[0], rolled_x // window[1], y < shift[0], x < shift[1]])
    together = (labels[:, :, None] == labels[:, None, :]).all(0)
    place = rolled_y % window[0] * window[1] + rolled_x % window[1]
    q, k, v = qkv.double().flatten(1, 2).permute(2, 0, 3, 1, 4)
    logits = q @ k.transpose(-2, -1) * scale + bias.double()[:, place[:, None], place[None, :]]
    out = logits.masked_fill(~together, float("-inf")).softmax(-1) @ v
    return out.transpose(1, 2).reshape(-1, height, width, heads, dim)


@pytest.mark.parametrize(
    ("case", "dtype"),
    [(case, dtype) for case in CASES for dtype in TOLERANCE if dtype == DTYPE or case in ("oblong", "swin", "wide")],
)
def test_outputs_and_gradients(case, dtype):
    qkv, bias, *rest = inputs(case, dtype)
    exact = qkv.detach().double().requires_grad_(), bias.detach().double().requires_grad_()
    got, expected = kernels.window_attention(qkv, bias, *rest), oracle(*exact, *rest)
    weight = torch.randn(got.shape, generator=torch.Generator().manual_seed(1)).to(got)
    grads = torch.autograd.grad(got, (qkv, bias), weight)
    expected_grads = torch.autograd.grad(expected, exact, weight.double())
    assert got.dtype == grads[0].dtype == dtype
    for a, b in zip((got, *grads), (expected, *expected_grads), strict=True):
        assert (a - b).abs().max() <= TOLERANCE[dtype] * b.abs().max()
    assert kernels.report()["window_attention"] == "fused"


@pytest.mark.parametrize("case", CASES)
def test_plain_version(case):
    qkv, bias, *rest = inputs(case)
    with kernels.use("plain"):
        out = kernels.window_attention(qkv, bias, *rest)
    exact = oracle(qkv, bias, *rest)
    assert (out - exact).abs().max() < CLOSE * exact.abs().max()


def test_gradient_of_a_relative_table():
    qkv, _, *rest = inputs("oblong")
    encoding = vp.create_encoding("relative_table", num_heads=3, feat_shape=(2, 3)).to(DEVICE)
    grads = {}
    for mode in ("fused", "plain"):
        with kernels.use(mode):
            out = kernels.window_attention(qkv, encoding.bias(vp.Positions.grid((2, 3), device=DEVICE)), *rest)
        grads[mode] = torch.autograd.grad(out.cos().sum(), encoding.relative_position_bias_table)[0]
    assert (grads["fused"] - grads["plain"]).abs().max() < CLOSE * grads["plain"].abs().max()


@pytest.mark.parametrize("case", ["square", "oblong"])
def test_gradient_of_the_gradient(case):
    qkv, bias, *rest = inputs(case)
    seconds = {}
    for mode in ("fused", "plain"):
        with kernels.use(mode):
            out = kernels.window_attention(qkv, bias, *rest)
        firsts = torch.autograd.grad(out.cos().sum(), (qkv, bias), create_graph=True)
        seconds[mode] = torch.autograd.grad(sum(first.float().square().sum() for first in firsts), (qkv, bias))
    for got, want in zip(*seconds.values(), strict=True):
        assert (got - want).abs().max() < CLOSE * want.abs().max()


def test_results_repeat_bit_for_bit():
    qkv, bias, *rest = inputs("square")
    first, second = (
        torch.autograd.grad(kernels.window_attention(qkv, bias, *rest).cos().sum(), (qkv, bias)) for _ in range(2)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_tensors_of_other_strides():
    qkv, bias, *rest = inputs("oblong")
    strided = qkv.detach().transpose(1, 2).contiguous().transpose(1, 2), bias.detach().mT.contiguous().mT
    assert torch.equal(kernels.window_attention(qkv, bias, *rest), kernels.window_attention(*strided, *rest))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"window": (4, 5)}, r"the window \(4, 5\) does not divide the grid \(8, 12\)"),
        ({"window": (8, 12)}, "a window has 96 tokens of 16 channels per head, more than 64"),
        ({"bias": torch.zeros(2, 2, 16, 16, device=DEVICE)}, "the bias differs between samples"),
        ({"qkv": torch.zeros(1, 8, 12, 3, 2, 16, device=DEVICE).double()}, "it takes float16 and bfloat16"),
    ],
)
def test_what_does_not_fit_is_one_line(change, message):
    arguments = dict(zip(("qkv", "bias", "window", "shift", "scale"), inputs("square"), strict=True)) | change
    with pytest.raises(ValueError, match=f"window_attention cannot run fused: {message}"):
        kernels.window_attention(*arguments.values())


def test_one_graph_forward_and_backward():
    qkv, bias, *rest = inputs("oblong")

    def step(qkv, bias):
        return kernels.window_attention(qkv, bias, *rest).cos()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    assert (compiled(qkv, bias) - step(qkv, bias)).abs().max() < CLOSE / 10
    grads = [torch.autograd.grad(function(qkv, bias).sum(), (qkv, bias)) for function in (compiled, step)]
    assert all((a - b).abs().max() < CLOSE / 10 for a, b in zip(*grads, strict=True))


def test_operator_is_registered_as_torch_wants_it():
    qkv, bias, window, shift, scale = inputs("oblong")
    torch.library.opcheck(operator, (qkv, bias, list(window), list(shift), scale))
