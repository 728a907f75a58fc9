"""HARoPE: axial RoPE behind a learned matrix of each head, its golden values, and folding into the projection."""

import copy

import pytest
import torch
from timm.layers import Attention

import visionpos as vp
from tests.parity.rotary_oracle import F64, GRIDS, gradcheck, grid64, relative_residual, rotation_matrix, tokens
from visionpos.encoding import AttentionTensors
from visionpos.hosts.attention import Attention as EncodedAttention
from visionpos.hosts.attention import AttentionContext


def build(**options):
    return vp.create_encoding("harope", **{"num_heads": 2, "head_dim": 8, "init_std": 0.4, **options}).double()


def randomised(encoding):
    with torch.no_grad():
        encoding.sigma.add_(torch.randn(encoding.sigma.shape, generator=torch.Generator().manual_seed(3)))
    return encoding


def golden_encoding():
    """head_dim 4, A_u: (0, 1) = .6, (2, 3) = -.4, (0, 2) = .2; A_v: (1, 3) = .5; sigma = (.5413, 0, 1, -.5)."""
    encoding = build(num_heads=1, head_dim=4, init_std=0.0)
    with torch.no_grad():
        encoding.skew_u.copy_(torch.tensor([[0.6, 0.2, 0, 0, 0, -0.4]], dtype=F64))
        encoding.skew_v.copy_(torch.tensor([[0, 0, 0, 0, 0.5, 0]], dtype=F64))
        encoding.sigma.copy_(torch.tensor([[0.5413, 0, 1, -0.5]], dtype=F64))
    return encoding


def test_golden():
    encoding = golden_encoding()
    a, b = (basis[0] for basis in encoding.bases())  # M^T and M^-1
    assert a.T[0].tolist() == pytest.approx([0.950417832, 0.196980127, 0.128279454, -0.055133305], abs=1e-9)
    assert a.T[3].tolist() == pytest.approx([-0.009883632, 0.114285835, 0.260471193, 0.450361729], abs=1e-9)
    q, k = torch.tensor([1.0, 2, 3, 4], dtype=F64), torch.tensor([-1, 0.5, 2, 0], dtype=F64)
    assert (q @ a).tolist() == pytest.approx([1.508683227, 0.276544642, 3.323481160, 2.801548533], abs=1e-9)
    assert (k @ b).tolist() == pytest.approx([-0.598065580, 0.940442298, 1.520633062, 0.566979968], abs=1e-9)
    tensors = AttentionTensors(x=q, q=q.view(1, 1, 1, 4), k=k.view(1, 1, 1, 4), v=k)
    encoding.modify_attention(tensors, encoding.prepare(grid64((1, 1))))
    assert tensors.q.flatten().tolist() == pytest.approx((q @ a).tolist(), abs=1e-12)
    assert (tensors.q @ tensors.k.mT).item() == pytest.approx(6, abs=1e-12)


def matrix_of(encoding, head):
    """M by torch's own exponential, entry by entry from the triangles."""
    d = encoding.head_dim
    turns = []
    for upper in (encoding.skew_u[head], encoding.skew_v[head]):
        a, entry = torch.zeros(d, d, dtype=F64), 0
        for i in range(d):
            for j in range(i + 1, d):
                a[i, j], entry = upper[entry].item(), entry + 1
        turns.append(torch.linalg.matrix_exp((a - a.T) / 2))
    s = torch.log1p(encoding.sigma[head].detach().exp()) + 1e-6
    return turns[0] @ torch.diag(s) @ turns[1].T


@pytest.mark.parametrize("layout", ["interleaved", "half"])
@pytest.mark.parametrize("grid", GRIDS)
def test_oracle(grid, layout):
    """Attention and the encoding by itself give the logits of the formula, those of prefix tokens included."""
    encoding, positions = randomised(build(layout=layout, temperature=30.0)), grid64(grid, 2)
    q, k = tokens(encoding, positions)
    tensors = AttentionTensors(x=q, q=q, k=k, v=k)
    encoding.modify_attention(tensors, encoding.prepare(positions))
    turned = encoding(q, k, positions)
    for x, got in zip((q, k), turned, strict=True):
        assert torch.equal(got[:, :, :2], x[:, :, :2])
    for head in range(2):
        m = matrix_of(encoding, head)
        rotations = [torch.eye(8, dtype=F64)] * 2
        for token in range(positions.num_patches):
            y, x = divmod(token, grid[1])
            rotations.append(rotation_matrix([x, x * 30**-0.5, y, y * 30**-0.5], layout))
        r = torch.stack(rotations)
        left = torch.einsum("tij,btj->bti", r, q[:, head] @ m.T)
        right = torch.einsum("tij,btj->bti", r, k[:, head] @ torch.linalg.inv(m))
        for a, b in ((tensors.q, tensors.k), turned):
            assert (a[:, head] @ b[:, head].mT - left @ right.mT).abs().max() < 1e-11
        assert (tensors.q[:, head] - left).abs().max() < 1e-11


def test_without_an_offset_logits_are_those_without_the_encoding():
    encoding = randomised(build())
    one = vp.Positions(torch.tensor([[1.3, 2.6]] * 4, dtype=F64), (3, 5))
    q, k = tokens(encoding, one)
    a, b = encoding(q, k, one)
    assert (a @ b.mT - q @ k.mT).abs().max() < 1e-11


def test_before_training_it_is_axial():
    encoding = build(init_std=0.0)
    axial = vp.create_encoding("rope_axial", num_heads=2, head_dim=8)
    q, k = tokens(encoding, grid64((3, 4)))
    for got, want in zip(encoding(q, k, grid64((3, 4))), axial(q, k, grid64((3, 4))), strict=True):
        assert (got - want).abs().max() < 1e-6
    for basis in encoding.bases():  # M, and not only what it leaves of q . k
        assert (basis - torch.eye(8, dtype=F64)).abs().max() < 2e-6
    assert vp.create_encoding("harope", num_heads=1, head_dim=8).skew_u.abs().max() == 0


@pytest.mark.parametrize("layout", ["interleaved", "half"])
@pytest.mark.parametrize("grid", [(2, 3), (4, 1)])
def test_folding_is_exact(grid, layout):
    """An attention layer, and the same with M and M^-T in its projection and axial RoPE for the encoding."""
    layer = Attention(16, num_heads=2, qkv_bias=True).double()
    layer.__class__ = EncodedAttention
    encoding = randomised(build(layout=layout, temperature=20.0))
    layer.encodings = torch.nn.ModuleList([encoding])
    folded = copy.deepcopy(layer)
    with torch.no_grad():
        folded.qkv.weight.copy_(encoding.fold(layer.qkv.weight))
        folded.qkv.bias.copy_(encoding.fold(layer.qkv.bias))
    folded.encodings = torch.nn.ModuleList([encoding.folded()])
    x = torch.randn(2, 1 + grid[0] * grid[1], 16, dtype=F64)
    context = AttentionContext(grid64(grid, 1))
    assert (layer(x, context) - folded(x, context)).abs().max() < 1e-10
    assert torch.equal(folded.qkv.weight[32:], layer.qkv.weight[32:])
    for rows, keys in ((slice(0, 16), False), (slice(16, 32), True)):
        single = encoding.fold(layer.qkv.weight[rows], fused=False, keys=keys)
        assert torch.equal(single, folded.qkv.weight[rows])


def test_frame():
    inside = build(reference_shape=(2, 3), extrapolate=False)
    assert (inside.angles(grid64((4, 5)))[:, -1] - inside.angles(grid64((2, 3)))[:, -1]).abs().max() < 1e-12
    assert inside.folded().reference_shape == (2, 3)


def test_relative():
    assert relative_residual(randomised(build())) < 1e-12


@pytest.mark.parametrize("layout", ["interleaved", "half"])
def test_gradients(layout):
    assert gradcheck(randomised(build(num_heads=1, head_dim=4, layout=layout)), (2, 3))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"head_dim": 6}, "head_dim must be a positive multiple of 4 .* got 6"),
        ({"init_std": -1.0}, "harope: init_std must be a number from 0 to 10000, got -1.0"),
        ({"layout": "half_per_axis"}, "harope: layout must be one of 'interleaved', 'half', got"),
    ],
)
def test_errors(options, message):
    with pytest.raises(ValueError, match=message):
        build(**options)
