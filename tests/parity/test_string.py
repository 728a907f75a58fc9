"""STRING: RoPE in a learned basis, its circulant form, and folding into the projection."""

import copy
import math

import pytest
import torch
from timm.layers import Attention

import visionpos as vp
from tests.parity.rotary_oracle import (
    F64,
    GRIDS,
    compare,
    exponential,
    gradcheck,
    grid64,
    point,
    relative_residual,
    rotation_matrix,
    tokens,
)
from visionpos.encoding import AttentionTensors
from visionpos.hosts.attention import Attention as EncodedAttention
from visionpos.hosts.attention import AttentionContext

PRESETS = ["cayley", "circulant"]


def build(**options):
    return vp.create_encoding("string", **{"num_heads": 2, "head_dim": 8, "init_std": 0.4, **options}).double()


def cayley(encoding, head):
    """Q = (I - S)(I + S)^-1 from the upper triangle."""
    s, entry = torch.zeros(8, 8, dtype=F64), 0
    for i in range(8):
        for j in range(i + 1, 8):
            s[i, j] = encoding.skew[head, entry].item()
            s[j, i] = -s[i, j]
            entry += 1
    eye = torch.eye(8, dtype=F64)
    return (eye - s) @ torch.linalg.inv(eye + s)


@pytest.mark.parametrize("layout", ["interleaved", "half"])
@pytest.mark.parametrize("grid", GRIDS)
def test_oracle_cayley(grid, layout):
    encoding = build(layout=layout, temperature=10.0)
    with torch.no_grad():
        encoding.freqs.mul_(1 + torch.rand(2, 4))

    def matrix(head, y, x):
        freqs = encoding.freqs[head].tolist()
        rope = rotation_matrix([x * freqs[0], x * freqs[1], y * freqs[2], y * freqs[3]], layout)
        q = cayley(encoding, head)
        return q @ rope @ q.T

    compare(encoding, grid, matrix)


@pytest.mark.parametrize("layout", ["interleaved", "half"])
@pytest.mark.parametrize("grid", GRIDS)
def test_oracle_circulant(grid, layout):
    """exp(x L_x + y L_y) with L = C - C^T and C circulant: column j is the first column, c, moved down by j."""
    encoding = build(preset="circulant", layout=layout)

    def generator(first):
        c = torch.zeros(8, 8, dtype=F64)
        for j in range(8):
            for k, value in enumerate(first, start=1):
                c[(j + k) % 8, j] = value
        return c - c.T

    def matrix(head, y, x):
        along_x, along_y = (generator(encoding.circulant[axis, head].tolist()) for axis in (0, 1))
        return exponential(x * along_x + y * along_y)

    compare(encoding, grid, matrix)


def test_the_papers_skew_matrix_has_the_other_sign():
    """The paper turns RoPE(p) P q with P = (I - S)(I + S)^-1."""
    encoding, positions = build(), grid64((3, 2))
    rope = vp.create_encoding("rope_axial", num_heads=2, head_dim=8)
    p = torch.stack([cayley(encoding, head) for head in range(2)])
    q, k = tokens(encoding, positions)
    a, b = rope(q @ p.mT, k @ p.mT, positions)
    with torch.no_grad():
        encoding.freqs.copy_(rope.frequencies().T.flatten())
        encoding.skew.neg_()
    c, d = encoding(q, k, positions)
    assert (a @ b.mT - c @ d.mT).abs().max() < 1e-12


def test_a_first_row_of_a_circulant_enters_with_the_other_sign():
    encoding = build(preset="circulant")
    row = torch.cat([torch.zeros(1, dtype=F64), encoding.circulant[0, 1].detach(), torch.zeros(4, dtype=F64)])
    c = torch.stack([row.roll(i) for i in range(8)])  # row i is the first one moved to the right by i
    with torch.no_grad():
        encoding.circulant.neg_()
    turn, basis = encoding.angles(point(0.0, 1.0, (2, 3)))[1, 0].tolist(), encoding.basis()[0]
    assert (basis @ rotation_matrix(turn, "interleaved") @ basis.mT - exponential(c - c.T)).abs().max() < 1e-12


@pytest.mark.parametrize("layout", ["interleaved", "half"])
@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("head_dim", [4, 8, 64])
def test_basis_is_orthogonal(preset, head_dim, layout):
    basis = build(preset=preset, head_dim=head_dim, layout=layout).basis()
    assert (basis @ basis.mT - torch.eye(head_dim, dtype=F64)).abs().max() < 1e-12


@pytest.mark.parametrize("preset", PRESETS)
def test_relative(preset):
    assert relative_residual(build(preset=preset)) < 1e-12


@pytest.mark.parametrize("prefix", [0, 2])
@pytest.mark.parametrize("preset", PRESETS)
def test_attention_leaves_the_outer_basis_out(preset, prefix):
    """The same logits, those of prefix tokens included, for q and k that differ by the orthogonal Q."""
    encoding, positions = build(preset=preset), grid64((2, 3), prefix)
    q, k = tokens(encoding, positions)
    tensors = AttentionTensors(x=q, q=q, k=k, v=k)
    encoding.modify_attention(tensors, encoding.prepare(positions))
    a, b = encoding(q, k, positions)
    assert (tensors.q @ tensors.k.mT - a @ b.mT).abs().max() < 1e-12
    assert (tensors.q @ encoding.basis().mT - a).abs().max() < 1e-12


@pytest.mark.parametrize("layout", ["interleaved", "half"])
@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("grid", [(2, 3), (4, 1)])
def test_folding_is_exact(grid, preset, layout):
    """An attention layer, and the same with Q^T in its projection and plain RoPE for the encoding."""
    layer = Attention(16, num_heads=2, qkv_bias=True).double()
    layer.__class__ = EncodedAttention
    encoding = build(preset=preset, layout=layout)
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
    single = encoding.fold(layer.qkv.weight[16:32], fused=False)
    assert torch.equal(single, folded.qkv.weight[16:32])


def test_without_a_basis_it_is_axial():
    encoding = build(init_std=0.0)
    axial = vp.create_encoding("rope_axial", num_heads=2, head_dim=8)
    q, k = tokens(encoding, grid64((3, 4)))
    got, want = encoding(q, k, grid64((3, 4))), axial(q, k, grid64((3, 4)))
    assert (got[0] - want[0]).abs().max() < 1e-6  # the frequencies were rounded to float32 parameters
    assert torch.equal(encoding.basis(), torch.eye(8, dtype=F64).expand(2, 8, 8))


def test_initialisation_and_default():
    encoding = vp.create_encoding("string", num_heads=3, head_dim=64)
    assert encoding.skew.shape == (3, 64 * 63 // 2)
    assert encoding.skew.std().item() == pytest.approx(0.02, rel=0.1)
    assert encoding.freqs[1].tolist() == pytest.approx([100 ** (-4 * k / 64) for k in range(16)] * 2)
    circulant = vp.create_encoding("string", num_heads=3, head_dim=64, preset="circulant")
    assert circulant.circulant.shape == (2, 3, 31)
    assert circulant.angles(vp.Positions.grid((2, 3))).shape == (3, 6, 32)
    assert circulant.angles(vp.Positions.grid((2, 3)))[..., 0].abs().max() == 0
    wave = 2 * circulant.circulant[0, 0, 0].item() * math.sin(2 * math.pi / 64)
    with torch.no_grad():
        circulant.circulant[:, :, 1:] = 0
    assert circulant.frequencies()[0, 0, 1].item() == pytest.approx(wave)


def test_frame():
    inside = build(reference_shape=(2, 3), init_std=0.0, extrapolate=False)
    assert (inside.angles(grid64((4, 5)))[:, -1] - inside.angles(grid64((2, 3)))[:, -1]).abs().max() < 1e-12
    assert inside.folded().reference_shape == (2, 3)


@pytest.mark.parametrize("layout", ["interleaved", "half"])
@pytest.mark.parametrize("preset", PRESETS)
def test_gradients(preset, layout):
    assert gradcheck(build(num_heads=1, head_dim=4, preset=preset, layout=layout), (2, 3))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"preset": "householder"}, "preset must be one of 'cayley', 'circulant', got 'householder'"),
        ({"head_dim": 6}, "head_dim must be a positive multiple of 4 .* got 6"),
        ({"temperature": -1.0}, "string: temperature must be a positive, finite number, got -1.0"),
    ],
)
def test_errors(options, message):
    with pytest.raises(ValueError, match=message):
        build(**options)
    with pytest.raises(ValueError, match="rows must be a positive multiple of 6 .* got 16"):
        build().fold(torch.zeros(16, 16))
