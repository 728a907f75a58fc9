"""Models in float64: what they add is as exact as they are, and their gradients of the first and second order."""

import copy

import pytest
import torch
from timm.layers import RmsNormFp32
from torch.nn.attention import SDPBackend, sdpa_kernel

import visionpos as vp
from tests.hosts.families import everywhere, fitting
from tests.small import needs_newer_timm
from visionpos.analysis.zoo import ZOO, build

OWN = None
HVP_SPECS = [OWN, "rope_axial", "alibi2d"]
SIX_HOSTS = ["ViT, class token", "DINOv3", "BEiT", "CaiT", "Swin", "Hiera"]
FLOAT32_IN_TIMM = ["EVA-02", "DINOv3", "RoPE-ViT, axial", "RoPE-ViT, mixed", "ViT, relative bias", "Swin v2", "CoAtNet"]
FLOAT32_IN_TIMM += ["Qwen3-ViT", "DeepSeek-ViT", "Gemma 4", "Swin v2-CR"]
SIX_ENCODINGS = ["learned", "rope_mixed", "relative_table", "decomposed", "fire", "peg"]


@pytest.fixture(autouse=True)
def _operations_with_second_derivatives():
    """torch's fused attention on a CPU has first derivatives only, in timm's models as in converted ones."""
    with sdpa_kernel(SDPBackend.MATH):
        yield


def drawn(model):
    """In float64 and in evaluation, with every parameter away from zeros, ones and kinks."""
    generator = torch.Generator().manual_seed(2)
    for module in model.modules():
        if type(module) is RmsNormFp32:  # in float32 in timm, whatever the dtype of the model
            module.__class__ = torch.nn.RMSNorm
        for name in ("lambda_q1", "lambda_k1", "lambda_q2", "lambda_k2"):  # differential attention, in float32 as well
            if hasattr(module, name):
                getattr(module, name).requires_grad_(False)
    with torch.no_grad():
        for parameter in model.double().eval().parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, dtype=parameter.dtype, generator=generator))
    return model


def converted(family, spec, **options):
    model, size = build(family, **options)
    vp.get_encoding(model) if spec is OWN else vp.set_encoding(model, fitting(family, spec))
    x = torch.randn(2, 3, *size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    return drawn(model), x


def variables_of(model, x):
    return [x.requires_grad_(), *(parameter for parameter in model.parameters() if parameter.requires_grad)]


def loss(model, x):
    return model(x).square().sum()


def inner(a, b):
    return sum((x * y).sum() for x, y in zip(a, b, strict=True))


@everywhere(spec=HVP_SPECS)
def test_hessian_vector_products_are_central_differences(family, spec):
    """By pictures and all parameters together, along a random direction."""
    model, x = converted(family, spec)
    variables = variables_of(model, x)
    generator = torch.Generator().manual_seed(3)
    direction = [torch.randn(v.shape, dtype=v.dtype, generator=generator) for v in variables]
    firsts = torch.autograd.grad(loss(model, x), variables, create_graph=True)
    got = torch.autograd.grad(inner(firsts, direction), variables)

    step, sides = 3e-8, []  # short: ReLU and maxima have kinks
    for sign in (1, -1):
        with torch.no_grad():
            for variable, change in zip(variables, direction, strict=True):
                variable.add_(sign * step * change)
        sides.append(torch.autograd.grad(loss(model, x), variables))
        with torch.no_grad():
            for variable, change in zip(variables, direction, strict=True):
                variable.sub_(sign * step * change)
    want = [(above - below) / (2 * step) for above, below in zip(*sides, strict=True)]
    off = [a - b for a, b in zip(got, want, strict=True)]
    assert (inner(off, off) / inner(want, want)).sqrt() < 1e-6


@everywhere(spec=HVP_SPECS)
def test_a_step_with_a_gradient_penalty(family, spec):
    """The penalty's gradient reaches every parameter that decides on the gradient, and a small step lowers it."""
    model, x = converted(family, spec)
    x.requires_grad_()

    def penalty():
        return torch.autograd.grad(loss(model, x), x, create_graph=True)[0].square().sum()

    before = penalty()
    before.backward()
    parameters = [parameter for parameter in model.parameters() if parameter.grad is not None]
    length = inner(*[[p.grad for p in parameters]] * 2).sqrt()
    with torch.no_grad():
        for parameter in parameters:
            parameter.sub_(1e-5 * parameter.grad / length)
    assert length.isfinite()
    assert penalty() < before


@everywhere(spec=[OWN, "rope_mixed"])
def test_jacobians_of_many_gradients_at_once(family, spec):
    model, x = converted(family, spec)
    one_by_one, at_once = (torch.autograd.functional.jacobian(model, x[:1], vectorize=v) for v in (False, True))
    assert (at_once - one_by_one).abs().max() < 1e-12 * one_by_one.abs().max()


@pytest.mark.parametrize(  # timm's mixed RoPE does not run in float64 before
    "family", [pytest.param(each, marks=needs_newer_timm) if each == "RoPE-ViT, mixed" else each for each in ZOO]
)
def test_keeping_its_own_encoding_changes_no_output_bit_in_float64(family):
    plain, size = build(family)
    plain, x = drawn(plain), torch.randn(2, 3, *size, dtype=torch.float64)
    model = copy.deepcopy(plain)
    vp.get_encoding(model)
    got, want = model(x), plain(x)
    # timm computes the tables of these in float32, whatever the dtype of the model
    float32_in_timm = family in FLOAT32_IN_TIMM
    assert (got - want).abs().max() <= (1e-6 if float32_in_timm else 1e-13) * want.abs().max()


@pytest.mark.parametrize("spec", SIX_ENCODINGS)
@pytest.mark.parametrize("family", SIX_HOSTS)
def test_gradcheck_of_whole_models(family, spec):
    """Along random directions of the pictures and of each parameter, those of the encoding by themselves."""
    model, x = converted(family, spec, num_classes=2)
    named = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    native = set(dict(build(family, num_classes=2)[0].named_parameters()))
    generator = torch.Generator().manual_seed(5)
    ways = {name: torch.randn(p.shape, dtype=p.dtype, generator=generator) for name, p in named.items()}
    into = torch.randn(x.shape, dtype=x.dtype, generator=generator)

    def output(step, of_encoding):
        moved = {n: p + (of_encoding if n not in native else step) * ways[n] for n, p in named.items()}
        return torch.func.functional_call(model, moved, (x.detach() + step * into,))

    steps = [torch.zeros((), dtype=torch.float64, requires_grad=True) for _ in range(2)]
    assert torch.autograd.gradcheck(output, steps, eps=1e-7, atol=1e-6, rtol=1e-6)
