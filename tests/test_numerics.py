"""Gradients and precision of the whole catalogue, in float64."""

import pytest
import torch

import visionpos as vp
from visionpos.probe import content, small_encoding
from visionpos.registry import get_encoding_class

NAMES = [name for name in vp.list_encodings() if name != "none"]
FORMULAS = [n for n in NAMES if not vp.encoding_info(n)["learnable"]]


def output(encoding, positions):
    """What a layer computes with an encoding, on content that differs from token to token."""
    shape = content(encoding, positions).shape
    tokens = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    if encoding.place == "rotary":
        q, k = encoding(tokens, tokens.flip(-1), positions)
        return q @ k.mT
    if encoding.place == "bias":
        more = {"content": tokens} if encoding.content_dependent else {}
        return encoding(torch.zeros(2, 4, shape[-2], shape[-2], dtype=torch.float64), positions, **more)
    return encoding(tokens, positions)


@pytest.mark.parametrize("prefix", [0, 2])
@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize("grid", [(2, 3), (3, 2), (1, 3)])
@pytest.mark.parametrize("name", NAMES)
def test_gradcheck(name, grid, kept, prefix):
    """Of the parameters, in random directions; of the coordinates where there are none."""
    encoding = small_encoding(get_encoding_class(name), grid, prefix=0).double()
    coords = vp.Positions.grid(grid).coords.double()
    if kept:
        coords = coords[[len(coords) - 1, 0]]
    with torch.no_grad():  # away from the kinks where some begin: zero biases before a ReLU, FIRE's L at its threshold
        for value in encoding.parameters():
            value.add_(0.05 * torch.randn(value.shape, dtype=value.dtype, generator=torch.Generator().manual_seed(3)))
    parameters = {key: value.detach().clone() for key, value in encoding.named_parameters()}
    inputs = list(parameters.values()) or [coords + 0.1 * torch.rand(coords.shape, dtype=torch.float64)]
    generator = torch.Generator().manual_seed(7)
    directions = [torch.randn(value.shape, dtype=torch.float64, generator=generator) for value in inputs]

    def along(step):
        values = [value + step * direction for value, direction in zip(inputs, directions, strict=True)]
        if not parameters:
            return output(encoding, vp.Positions(values[0], grid, prefix))
        for key, value in zip(parameters, values, strict=True):
            module, _, leaf = key.rpartition(".")
            owner = encoding.get_submodule(module)
            owner._parameters.pop(leaf, None)
            setattr(owner, leaf, value)
        return output(encoding, vp.Positions(coords, grid, prefix, is_grid=not kept))

    assert_derivatives_are_central_differences(along)


def assert_derivatives_are_central_differences(along):
    """Of a function of one number at 0: the first at every element, with gradcheck's step and tolerances; the second.

    gradcheck takes one backward pass an element. A backward pass is linear in what comes in, so its derivative by that
    has all elements at once; two more passes, with random numbers coming in, say that it is the same without a graph.
    The second derivative is that of the sum of the elements times these numbers.
    """
    at = torch.zeros((), dtype=torch.float64, requires_grad=True)
    out = along(at) + 0 * at  # steps, as those of `binary`, have no graph
    incoming = torch.zeros_like(out, requires_grad=True)
    weighted = torch.autograd.grad(out, at, incoming, create_graph=True)
    derivative = torch.autograd.grad(weighted, incoming)[0]
    with torch.no_grad():
        difference = (along(at + 1e-6) - along(at - 1e-6)) / 2e-6
    torch.testing.assert_close(derivative, difference, atol=1e-5, rtol=1e-3)
    incoming = torch.randn(out.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(8))
    passes = [torch.autograd.grad(along(at) + 0 * at, at, incoming)[0] for _ in range(2)]
    torch.testing.assert_close(passes[0], (incoming * derivative).sum())
    assert torch.equal(*passes)

    def slope(step):
        at = torch.full((), step, dtype=torch.float64, requires_grad=True)
        return at, torch.autograd.grad(along(at) + 0 * at.square(), at, incoming, create_graph=True)[0]

    at, first = slope(0.0)
    second = torch.autograd.grad(first, at)[0]
    difference = (slope(1e-5)[1] - slope(-1e-5)[1]).detach() / 2e-5
    torch.testing.assert_close(second, difference, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kept", [False, True], ids=["grid", "kept"])
@pytest.mark.parametrize("name", NAMES)
def test_float64_tokens_or_parameters_get_all_of_float64(name, kept):
    """Positions are float32 until then; on another grid than the reference their coordinates are fractions."""
    encoding, index = small_encoding(get_encoding_class(name), (3, 5)).double(), torch.tensor([4, 0, 13])
    encoding.reference_shape = (4, 7)
    narrow = vp.Positions.grid((3, 5), 1)
    exact = vp.Positions(narrow.coords.double(), (3, 5), 1, is_grid=True)
    narrow, exact = (positions.keep(index) if kept else positions for positions in (narrow, exact))
    got, want = output(encoding, narrow), output(encoding, exact)
    assert got.dtype == torch.float64
    assert torch.equal(got, want)
    if encoding.learnable and encoding.place in ("input", "bias") and not encoding.content_dependent:
        read = encoding.embed if encoding.place == "input" else encoding.bias
        assert torch.equal(read(narrow), read(exact))


def test_no_tokens_make_positions_less_exact_than_float32():
    positions = vp.Positions.grid((2, 3))
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        assert positions.promote(dtype) is positions
    exact = positions.promote(torch.float64)
    assert exact.coords.dtype == torch.float64
    assert exact.is_grid
    assert exact.promote(torch.float32) is exact


@pytest.mark.parametrize("size", [(64, 48), (512, 512)])
@pytest.mark.parametrize("name", FORMULAS)
def test_float32_is_right_on_large_grids(name, size):
    """Within 2e-5 of float64, relative to numbers above 1; also after .bfloat16() and under autocast."""
    rows = torch.randint(0, size[0], (40,), generator=torch.Generator().manual_seed(1))
    columns = torch.randint(0, size[1], (40,), generator=torch.Generator().manual_seed(2))
    coords = torch.stack([rows, columns], dim=-1)
    encoding = small_encoding(get_encoding_class(name), size)

    def numbers(module, dtype):
        positions = vp.Positions(coords.to(dtype), size)
        return module.embed(positions) if module.place == "input" else module.prepare(positions)

    exact = numbers(encoding, torch.float64)
    limit = 2e-5 * exact.abs().clamp(min=1)
    assert ((numbers(encoding, torch.float32).double() - exact).abs() <= limit).all()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert ((numbers(encoding.bfloat16(), torch.float32).double() - exact).abs() <= limit).all()
