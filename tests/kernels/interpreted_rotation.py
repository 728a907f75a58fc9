"""The rotation kernel in Triton's interpreter, run by test_interpreter.py, or on a GPU: pytest -m gpu and this file."""

import pytest
import torch

from tests.kernels.device import DEVICE, MARKS
from visionpos import kernels
from visionpos.kernels.rotation_triton import RotateQKV, rotate_qk, rotate_qkv_backward

B, T, PREFIX, HEADS, DIM = 2, 20, 2, 3, 24  # 1440 pairs of each part: two programs, one of them half empty
TABLES = {"shared": (1,), "per_head": (HEADS,), "per_sample": (B, 1), "per_sample_and_head": (B, HEADS)}
TOLERANCE = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 1.6e-2}  # the interpreter truncates bfloat16
pytestmark = MARKS


@pytest.fixture(autouse=True)
def _fused():
    with kernels.use("fused"):
        yield


def random(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).to(DEVICE)


def inputs(table_shape="per_head", dtype=torch.float32, dim=DIM):
    angles = random(*TABLES[table_shape], T, dim // 2)
    angles[..., :PREFIX, :] = 0
    return random(B, T, 3, HEADS, dim).to(dtype).requires_grad_(), torch.stack([angles.cos(), angles.sin()]), angles


def oracle(qkv, angles, layout):
    """In float64 and complex numbers."""
    q, k, v = qkv.double().permute(2, 0, 3, 1, 4)
    turn = torch.polar(torch.ones_like(angles).double(), angles.double())
    axis = -1 if layout == "interleaved" else -2

    def rotate(x):
        pairs = x.unflatten(-1, (-1, 2) if layout == "interleaved" else (2, -1)).movedim(axis, -1)
        turned = torch.view_as_real(torch.view_as_complex(pairs.contiguous()) * turn)
        return turned.movedim(-1, axis).flatten(-2)

    return rotate(q), rotate(k), v


@pytest.mark.parametrize(
    ("table_shape", "dtype"),
    [(table, dtype) for table in TABLES for dtype in TOLERANCE if dtype == torch.float32 or table == "per_sample"],
)
@pytest.mark.parametrize("layout", ["interleaved", "half"])
def test_outputs_and_gradients(table_shape, layout, dtype):
    qkv, table, angles = inputs(table_shape, dtype)
    exact = qkv.detach().double().requires_grad_()
    got, expected = kernels.rotate_qkv(qkv, table, layout), oracle(exact, angles, layout)
    weights = [random(B, HEADS, T, DIM + i)[..., i:].to(dtype) for i in range(3)]  # of three different strides
    grad = torch.autograd.grad(got, qkv, weights)[0]
    expected_grad = torch.autograd.grad(expected, exact, [weight.double() for weight in weights])[0]
    for a, b in zip((*got, grad), (*expected, expected_grad), strict=True):
        assert a.dtype == dtype
        assert (a - b).abs().max() <= TOLERANCE[dtype] * b.abs().max()
    assert kernels.report()["rotate_qkv"] == "fused"


@pytest.mark.parametrize("layout", ["interleaved", "half"])
@pytest.mark.parametrize("dim", [8, 64, 80, 128])
def test_heads_of_other_widths(dim, layout):
    qkv, table, angles = inputs(dim=dim)
    got, expected = kernels.rotate_qkv(qkv, table, layout), oracle(qkv.detach().double(), angles, layout)
    for a, b in zip(got, expected, strict=True):
        assert (a - b).abs().max() <= TOLERANCE[torch.float32] * b.abs().max()


@pytest.mark.parametrize("layout", ["interleaved", "half"])
def test_prefix_tokens_and_values_keep_their_bits(layout):
    qkv, table, _ = inputs()
    q, k, v = kernels.rotate_qkv(qkv, table, layout)
    for got, index in ((q, 0), (k, 1), (v, 2)):
        untouched = qkv[:, :, index].transpose(1, 2)
        assert torch.equal(got[:, :, :PREFIX], untouched[:, :, :PREFIX])
        assert torch.equal(got, untouched) == (index == 2)
    assert v.data_ptr() == qkv[:, :, 2].data_ptr()


def test_gradients_that_attention_gives_expanded():
    qkv, table, _ = inputs()
    q, k, v = kernels.rotate_qkv(qkv, table, "half")
    grad = torch.autograd.grad(q.sum() + (2 * k).sum() + v.mean(), qkv)[0]
    with kernels.use("plain"):
        q, k, v = kernels.rotate_qkv(qkv, table, "half")
        assert (torch.autograd.grad(q.sum() + (2 * k).sum() + v.mean(), qkv)[0] - grad).abs().max() < 1e-6


def test_a_table_that_is_not_dense():
    qkv, table, _ = inputs()
    strided = torch.stack([table, table], dim=-1)[..., 0]
    for a, b in zip(kernels.rotate_qkv(qkv, table, "half"), kernels.rotate_qkv(qkv, strided, "half"), strict=True):
        assert torch.equal(a, b)


def test_learned_angles_are_left_to_the_plain_version():
    qkv, table, _ = inputs()
    with pytest.raises(ValueError, match="rotate_qkv cannot run fused: learned angles need a gradient"):
        kernels.rotate_qkv(qkv, table.requires_grad_(), "half")
    with torch.no_grad():
        kernels.rotate_qkv(qkv, table, "half")


def test_one_graph_forward_and_backward():
    qkv, table, _ = inputs()

    def step(qkv, table):
        q, k, v = kernels.rotate_qkv(qkv, table, "interleaved")
        return q @ k.transpose(-2, -1) @ v

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    assert (compiled(qkv, table) - step(qkv, table)).abs().max() < 1e-4
    grads = [torch.autograd.grad(function(qkv, table).sum(), qkv)[0] for function in (compiled, step)]
    assert (grads[0] - grads[1]).abs().max() < 1e-4


@pytest.mark.parametrize("layout", ["interleaved", "half"])
@pytest.mark.parametrize("table_shape", TABLES)
def test_gradient_of_the_gradient(table_shape, layout):
    qkv, table, _ = inputs(table_shape)
    seconds = {}
    for mode in ("fused", "plain"):
        with kernels.use(mode):
            q, k, v = kernels.rotate_qkv(qkv, table, layout)
        (first,) = torch.autograd.grad((q @ k.mT).div(DIM).softmax(-1).matmul(v).sum(), qkv, create_graph=True)
        (seconds[mode],) = torch.autograd.grad(first.square().sum(), qkv)
    assert (seconds["fused"] - seconds["plain"]).abs().max() < 1e-5 * seconds["plain"].abs().max()


def test_operators_are_registered_as_torch_wants_them():
    qkv, table, _ = inputs()
    torch.library.opcheck(rotate_qk, (qkv.detach(), *table, True))
    torch.library.opcheck(
        rotate_qkv_backward, (*(x.detach() for x in RotateQKV.apply(qkv, *table, False)), *table, True)
    )
