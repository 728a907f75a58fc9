"""exp of skew-symmetric matrices by matrix products alone; and the last ones, which eval mode on a CPU keeps."""

import copy
import math
import pickle

import pytest
import torch

import visionpos as vp
from visionpos.rotary import blocks
from visionpos.rotary.blocks import skew, skew_exp

F64 = torch.float64


def generators(block, norm, count=5):
    """Random ones, one small among them, of a spectral norm of at most `norm`, which one has."""
    upper = torch.randn(count, block * (block - 1) // 2, generator=torch.Generator().manual_seed(block), dtype=F64)
    matrices = skew(upper, block)
    matrices = matrices * (norm / torch.linalg.matrix_norm(matrices, 2).max())
    return torch.cat([matrices, matrices[:1] * 1e-9])


def exact(matrix):
    """By eigenvalues, which are imaginary."""
    values, vectors = torch.linalg.eigh(1j * matrix)
    return ((vectors * (-1j * values).exp()[..., None, :]) @ vectors.mH).real


@pytest.mark.parametrize("norm", [1e-3, 1.0, 30.0, 800.0, 8192.0])
@pytest.mark.parametrize("block", [2, 3, 4, 8, 16, 64])
def test_as_torch_and_orthogonal(block, norm):
    matrices = generators(block, norm)
    got, rounding = skew_exp(matrices), torch.finfo(F64).eps * max(norm, 1.0)
    eye = torch.eye(block, dtype=F64)
    assert (got - exact(matrices)).abs().max() < 8 * rounding + 4e-14  # eigenvectors are good to some 1e-15
    assert (got - torch.linalg.matrix_exp(matrices)).abs().max() < 16 * rounding + 1e-14
    assert (got @ got.mT - eye).abs().max() < max(1e-12, 2 * rounding)
    assert (got[-1] - eye - matrices[-1] - matrices[-1] @ matrices[-1] / 2).abs().max() < 4e-16


def test_beyond_the_norm_it_holds_for():
    matrices = generators(8, 16384.0)
    assert (skew_exp(matrices) - exact(matrices)).abs().max() < 1e-6


def test_float32_where_there_is_nothing_wider():
    matrices = generators(8, 30.0)
    got = skew_exp(matrices.float())
    assert got.dtype == torch.float32
    assert (got - skew_exp(matrices)).abs().max() < 30 * 4 * torch.finfo(torch.float32).eps


@pytest.mark.parametrize("block", [2, 3, 4])
def test_gradients_of_both_orders(block):
    upper = torch.randn(2, block * (block - 1) // 2, generator=torch.Generator().manual_seed(0), dtype=F64)
    upper.requires_grad_()
    assert torch.autograd.gradcheck(lambda u: skew_exp(skew(u, block)), upper)
    assert torch.autograd.gradgradcheck(lambda u: skew_exp(skew(u, block)), upper)


@pytest.mark.parametrize("block", [2, 8])
def test_gradients_of_large_generators_are_those_of_torch(block):
    gradients = []
    for function in (skew_exp, torch.linalg.matrix_exp):
        matrices = generators(block, 2 * math.pi * block).requires_grad_()
        weights = torch.linspace(-1, 1, matrices.numel(), dtype=F64).view_as(matrices)
        gradient = torch.autograd.grad((function(matrices) * weights).sum(), matrices)[0]
        gradients.append(gradient - gradient.mT)  # what a skew-symmetric generator receives
    assert (gradients[0] - gradients[1]).abs().max() < 1e-12


@pytest.fixture
def computed(monkeypatch):
    """How often matrices were computed, in a list that grows."""
    calls = []
    monkeypatch.setattr(blocks, "skew_exp", lambda generators: calls.append(1) or skew_exp(generators))
    return calls


def fresh(encoding, positions):
    """What an encoding prepares that has never prepared anything."""
    return copy.deepcopy(encoding).prepare(positions)


@pytest.mark.parametrize(("name", "options"), [("liere", {}), ("comrope", {}), ("comrope", {"preset": "ap"})])
@torch.no_grad()
def test_matrices_are_computed_again_where_anything_changes(name, options, computed):
    encoding = vp.create_encoding(name, num_heads=2, head_dim=16, block=4, **options)
    positions = vp.Positions.grid((3, 5), 1)
    first = encoding.prepare(positions)
    assert torch.equal(encoding.prepare(vp.Positions.grid((3, 5), 1)), first)
    assert len(computed) == 1
    for parameter in encoding.parameters():
        parameter.data.view(-1)[0] += 0.25
        assert torch.equal(encoding.prepare(positions), fresh(encoding, positions))
        assert not torch.equal(encoding.prepare(positions), first)
    for other in (
        vp.Positions.grid((3, 5), 2),
        vp.Positions.grid((5, 3), 1),
        vp.Positions(positions.coords / 2, (3, 5)),
    ):
        assert torch.equal(encoding.prepare(other), fresh(encoding, other))
    for other in (copy.deepcopy(encoding), pickle.loads(pickle.dumps(encoding))):
        assert other not in blocks._last


def test_gradients_and_transformations_compute_anew(computed):
    encoding, positions = vp.create_encoding("liere", num_heads=2, head_dim=16, block=4), vp.Positions.grid((2, 3))
    with torch.no_grad():
        encoding.prepare(positions)
    encoding.prepare(positions).square().sum().backward()
    assert encoding.generators.grad.abs().sum() > 0

    def matrices(generators):
        return torch.func.functional_call(Prepared(), {"encoding.generators": generators}, ())

    class Prepared(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.encoding = encoding

        def forward(self):
            return self.encoding.prepare(positions)

    own = encoding.generators.detach()
    stack = torch.stack([own, own / 2])
    want = torch.stack([matrices(own), matrices(own / 2)])
    assert (torch.func.vmap(matrices)(stack) - want).abs().max() < 1e-6
    with torch.no_grad():
        _, tangent = torch.func.jvp(matrices, (own,), (torch.ones_like(own),))
    assert tangent.abs().sum() > 0


def test_matrices_of_inference_mode_serve_outside_of_it(computed):
    encoding = vp.create_encoding("comrope", num_heads=2, head_dim=16, block=8).requires_grad_(False)
    positions = vp.Positions.grid((2, 3))
    with torch.inference_mode():
        inside = encoding.prepare(positions)
    q = torch.randn(1, 2, 6, 16, requires_grad=True)
    encoding(q, q, vp.Positions(positions.coords.double(), (2, 3)))[0].sum().backward()
    encoding(q, q, positions)[0].sum().backward()  # would fail with a tensor of inference mode
    assert torch.equal(encoding.prepare(positions), inside)
    assert len(computed) == 1
