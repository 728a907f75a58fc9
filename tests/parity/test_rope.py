"""RoPE over the flat index and axial RoPE."""

import math

import pytest
import torch
from timm.layers.pos_embed_sincos import RotaryEmbeddingCat, apply_rot_embed_cat

import visionpos as vp

F64 = torch.float64
Q8 = torch.arange(1.0, 9, dtype=F64)


def rotate_oracle(x, angles, layout):
    """One vector, pair by pair."""
    out = list(x)
    for i, angle in enumerate(angles):
        a, b = (2 * i, 2 * i + 1) if layout == "interleaved" else (i, i + len(x) // 2)
        out[a] = x[a] * math.cos(angle) - x[b] * math.sin(angle)
        out[b] = x[a] * math.sin(angle) + x[b] * math.cos(angle)
    return out


def test_golden_one_axis():
    x = torch.tensor([[1.0, 2, 3, 4]], dtype=F64)
    angles = torch.tensor([[3.0, 0.03]], dtype=F64)  # m = 3, T = 1e4
    interleaved = vp.apply_rotary(x, angles)[0]
    assert interleaved.tolist() == pytest.approx([-1.27223251, -1.83886499, 2.8786681, 4.08818664], abs=1e-8)
    half = vp.apply_rotary(x, angles, layout="half")[0]
    assert half.tolist() == pytest.approx([-1.41335252, 1.87911807, -2.82885748, 4.05819114], abs=1e-8)
    encoding = vp.create_encoding("rope1d", num_heads=1, head_dim=4)
    assert encoding.angles(vp.Positions.grid((2, 2)))[0, 3].tolist() == pytest.approx([3.0, 0.03], abs=1e-7)


def test_golden_axial():
    angles = vp.rope_angles_axial((2, 2), 8, dtype=F64)
    want = [[0, 0, 0, 0], [1, 0.1, 0, 0], [0, 0, 1, 0.1], [1, 0.1, 1, 0.1]]
    assert (angles - torch.tensor(want, dtype=F64)).abs().max() < 1e-12
    rotated = vp.apply_rotary(Q8.expand(4, 8), angles)
    want = [-1.14263966, 1.9220756, 2.58567883, 4.27951691, 5, 6, 7, 8]
    assert rotated[1].tolist() == pytest.approx(want, abs=1e-8)
    want = [1, 2, 3, 4, -2.34731438, 7.44916876, 6.16636182, 8.65886724]
    assert rotated[2].tolist() == pytest.approx(want, abs=1e-8)
    gram = rotated @ rotated.T
    assert gram[0].tolist() == pytest.approx([204, 201.57661566, 175.39391133, 172.970527], abs=1e-8)


@pytest.mark.parametrize("layout", ["interleaved", "half"])
@pytest.mark.parametrize("grid", [(2, 3), (5, 2), (1, 4)])
@pytest.mark.parametrize("name", ["rope1d", "rope_axial"])
def test_oracle(name, grid, layout):
    head_dim, temperature = 8, 50.0
    encoding = vp.create_encoding(name, num_heads=2, head_dim=head_dim, temperature=temperature, layout=layout)
    positions = vp.Positions.grid(grid, num_prefix_tokens=1)
    q, k = torch.randn(2, 3, 2, positions.num_tokens, head_dim, dtype=F64)
    turned = encoding(q, k, vp.Positions(positions.coords.double(), grid, 1))
    for x, got in zip((q, k), turned, strict=True):
        assert torch.equal(got[:, :, 0], x[:, :, 0])
        for token in range(grid[0] * grid[1]):
            y, x_ = divmod(token, grid[1])
            if name == "rope1d":
                angles = [token * temperature ** (-2 * i / head_dim) for i in range(head_dim // 2)]
            else:
                theta = [temperature ** (-4 * i / head_dim) for i in range(head_dim // 4)]
                angles = [x_ * t for t in theta] + [y * t for t in theta]
            want = rotate_oracle(x[1, 0, 1 + token].tolist(), angles, layout)
            assert got[1, 0, 1 + token].tolist() == pytest.approx(want, abs=1e-12)


@pytest.mark.parametrize("grid", [(4, 4), (3, 5)])
def test_axial_against_timm(grid):
    """timm 1.0.31 is right for 'xy' with pixels off, also on grids that are not square."""
    rope = RotaryEmbeddingCat(
        16, max_res=0, in_pixels=False, feat_shape=list(grid), temperature=100.0, grid_indexing="xy"
    )
    q = torch.randn(1, 2, grid[0] * grid[1], 16)
    want = apply_rot_embed_cat(q, rope.get_embed())
    got, _ = vp.create_encoding("rope_axial", num_heads=2, head_dim=16)(q, q, vp.Positions.grid(grid))
    assert (got - want).abs().max() < 2e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_apply_rotary_rounds_once(dtype):
    x, angles = torch.randn(2, 6, 8).to(dtype), torch.rand(6, 4) * 50
    exact = vp.apply_rotary(x.double(), angles.double())
    got = vp.apply_rotary(x, angles)
    assert got.dtype == dtype
    error = (got.double() - exact).abs()
    assert (error <= exact.abs() * torch.finfo(dtype).eps / 2 + 3e-6).all()


@pytest.mark.parametrize("layout", ["interleaved", "half"])
def test_the_form_for_compilers_equals_the_eager_one(layout, monkeypatch):
    x, angles = torch.randn(2, 5, 8), torch.rand(5, 4) * 9
    eager = vp.apply_rotary(x, angles, layout)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert (vp.apply_rotary(x, angles, layout) - eager).abs().max() < 1e-6


def test_layouts_are_one_permutation_apart():
    x, angles = torch.randn(5, 8), torch.rand(5, 4)
    order = torch.tensor([0, 2, 4, 6, 1, 3, 5, 7])  # evens, then odds
    half = vp.apply_rotary(x[:, order], angles, layout="half")
    assert torch.equal(half, vp.apply_rotary(x, angles)[:, order])


def test_relative_and_norm_preserving():
    encoding = vp.create_encoding("rope_axial", num_heads=1, head_dim=8)
    q, k = torch.randn(2, 1, 1, 1, 8).expand(2, 1, 1, 15, 8)
    a, b = encoding(q, k, vp.Positions.grid((3, 5)))
    logits = (a @ b.mT)[0, 0]
    assert logits[0, 6].item() == pytest.approx(logits[7, 13].item(), abs=1e-5)  # both one down, one right
    assert (a.norm(dim=-1) - q.norm(dim=-1)).abs().max() < 1e-6


def test_large_grids_keep_their_precision():
    """512 x 512: a float32 product of index and frequency would be off by 1e-2."""
    coords = torch.tensor([[511.0, 511.0], [300.0, 77.0]])
    for name in ("rope1d", "rope_axial"):
        encoding = vp.create_encoding(name, num_heads=1, head_dim=64)
        exact = encoding.prepare(vp.Positions(coords.double(), (512, 512)))
        assert (encoding.prepare(vp.Positions(coords, (512, 512))).double() - exact).abs().max() < 1e-6
    table = vp.create_encoding("sinusoidal", dim=64)
    exact = table.embed(vp.Positions(coords.double(), (512, 512)))
    assert (table.embed(vp.Positions(coords, (512, 512))).double() - exact).abs().max() < 1e-6


@pytest.mark.unhooked
def test_errors():
    with pytest.raises(ValueError, match="layout must be"):
        vp.apply_rotary(torch.zeros(3, 4), torch.zeros(3, 2), layout="both")
    with pytest.raises(ValueError, match=r"angles of shape .* needed for x \(3, 4\), got \(3, 4\)"):
        vp.apply_rotary(torch.zeros(3, 4), torch.zeros(3, 4))
    q = torch.zeros(1, 2, 6, 8)
    with pytest.raises(ValueError, match="q has 2 heads of 8 channels, but rope_axial was built with num_heads=3"):
        vp.create_encoding("rope_axial", num_heads=3, head_dim=8)(q, q, vp.Positions.grid((2, 3)))
    with pytest.raises(ValueError, match="q has 6 tokens, but the positions describe 7: 1 prefix"):
        vp.create_encoding("rope_axial", num_heads=2, head_dim=8)(q, q, vp.Positions.grid((2, 3), 1))
