"""Rotary encodings by brute force in float64, one token and one pair at a time, for the tests beside this file."""

import math

import torch
from torch.func import functional_call

import visionpos as vp

F64 = torch.float64
GRIDS = [(2, 3), (4, 2), (1, 5), (3, 1)]


def grid64(grid, prefix=0):
    """The positions of a grid in float64, so that results stay in float64."""
    positions = vp.Positions.grid(grid)
    return vp.Positions(positions.coords.double(), grid, prefix)


def point(y, x, grid):
    """One token at any real place."""
    return vp.Positions(torch.tensor([[y, x]], dtype=F64), grid)


def tokens(encoding, positions, batch=2, dtype=F64):
    """Random queries and keys."""
    generator = torch.Generator().manual_seed(7)
    shape = 2, batch, encoding.num_heads, positions.num_tokens, encoding.head_dim
    return torch.randn(shape, generator=generator, dtype=F64).to(dtype).unbind(0)


def rotate_pairs(x, angles, layout):
    """One vector, pair by pair."""
    out = list(x)
    for i, angle in enumerate(angles):
        a, b = (2 * i, 2 * i + 1) if layout == "interleaved" else (i, i + len(x) // 2)
        out[a] = x[a] * math.cos(angle) - x[b] * math.sin(angle)
        out[b] = x[a] * math.sin(angle) + x[b] * math.cos(angle)
    return out


def rotation_matrix(angles, layout):
    """RoPE of one token as a (D, D) matrix."""
    eye = torch.eye(2 * len(angles), dtype=F64)
    return torch.tensor([rotate_pairs(row.tolist(), angles, layout) for row in eye], dtype=F64).T


def exponential(generator):
    """exp of a skew-symmetric matrix by its eigenvalues, which are imaginary."""
    values, vectors = torch.linalg.eigh(1j * generator)
    return (vectors @ torch.diag((-1j * values).exp()) @ vectors.mH).real


def compare(encoding, grid, matrix_of, prefix=2, tolerance=1e-10):
    """q and k of every head and token against `matrix_of(head, y, x)`, (D, D); prefix tokens bit for bit."""
    positions = grid64(grid, prefix)
    for x, got in zip(tokens(encoding, positions), encoding(*tokens(encoding, positions), positions), strict=True):
        assert got.dtype == F64
        assert torch.equal(got[:, :, :prefix], x[:, :, :prefix])
        for head in range(encoding.num_heads):
            for token in range(positions.num_patches):
                matrix = matrix_of(head, token // grid[1], token % grid[1])
                want = x[:, head, prefix + token] @ matrix.T
                assert (got[:, head, prefix + token] - want).abs().max() < tolerance


def gradcheck(encoding, grid):
    """Gradients of the logits with respect to every parameter, q and k, in float64."""
    encoding = encoding.double()
    positions = grid64(grid, 1)
    names, parameters = zip(*encoding.named_parameters(), strict=True) if encoding.learnable else ((), ())
    q, k = (x[:, :, :4].requires_grad_() for x in tokens(encoding, positions, batch=1))
    positions = vp.Positions(positions.coords[:3], grid, 1)

    def logits(q, k, *values):
        q, k = functional_call(encoding, dict(zip(names, values, strict=True)), (q, k, positions))
        return q @ k.mT

    inputs = q, k, *(parameter.detach().clone().requires_grad_() for parameter in parameters)
    return torch.autograd.gradcheck(logits, inputs)


def relative_residual(encoding, grid=(5, 7)):
    """How far logits move when every token moves by the same step, relative to their size."""
    here = grid64(grid)
    there = vp.Positions(here.coords + torch.tensor([1.25, -2.5], dtype=F64), grid)
    q, k = (x[:, :, :1].expand_as(x) for x in tokens(encoding, here))
    before, after = ((a @ b.mT) for a, b in (encoding(q, k, here), encoding(q, k, there)))
    return ((after - before).abs().max() / before.abs().max()).item()
