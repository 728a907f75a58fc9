"""PaPE against a loop over its parabolas, and against the exact fold into longer q and k."""

import math

import pytest
import torch
from timm.models.vision_transformer import Attention as TimmAttention
from torch import nn

import visionpos as vp
from visionpos.hosts.attention import Attention, AttentionContext

F64 = torch.float64
GRIDS = [(3, 5), (4, 2), (1, 6)]
HEADS, HEAD_DIM, DIM = 2, 4, 8


def grid64(grid, prefix=0):
    return vp.Positions(vp.Positions.grid(grid).coords.double(), grid, prefix, is_grid=True)


def build(heads=HEADS, **options):
    torch.manual_seed(0)
    few = {} if options.get("preset") == "ri" else {"num_parabolas": 3}
    options = {**few, "scaled": False, **options}
    return vp.create_encoding("pape", num_heads=heads, head_dim=HEAD_DIM, dim=DIM, **options).double()


def tokens(positions, batch=2):
    return torch.randn(batch, positions.num_tokens, DIM, generator=torch.Generator().manual_seed(1), dtype=F64)


def parameters(encoding, x):
    """z's map (heads, M, 2), a and b (B, heads, N, M)."""
    heads = encoding.num_heads
    w = encoding.position.weight.view(heads, -1, 2)
    ab = (x @ encoding.ab.weight.T).view(*x.shape[:2], 2, heads, -1).permute(2, 0, 3, 1, 4)
    return w, torch.log1p(ab[0].exp()), ab[1]


def oracle(encoding, positions, x):
    p, bias = positions.num_prefix_tokens, torch.zeros(len(x), encoding.num_heads, x.shape[1], x.shape[1], dtype=F64)
    w, a, b = parameters(encoding, x)
    for s in range(len(x)):
        coords = positions.coords[s] if positions.is_batched else positions.coords
        for h in range(encoding.num_heads):
            z = coords @ w[h].T
            for i in range(len(coords)):
                for j in range(len(coords)):
                    d = z[i] - z[j]
                    bias[s, h, p + i, p + j] = (-a[s, h, p + i] * d**2 + b[s, h, p + i] * d).sum()
    return bias


@pytest.mark.parametrize("prefix", [0, 1])
@pytest.mark.parametrize(("heads", "parabolas"), [(1, 1), (2, 3), (3, 5)])
@pytest.mark.parametrize("grid", GRIDS)
def test_oracle(grid, heads, parabolas, prefix):
    encoding, positions = build(heads, num_parabolas=parabolas), grid64(grid, prefix)
    x = tokens(positions)
    assert (encoding.bias(positions, content=x) - oracle(encoding, positions, x)).abs().max() < 1e-10


def test_real_and_batched_coordinates():
    coords = torch.randn(2, 5, 2, generator=torch.Generator().manual_seed(2), dtype=F64) * 4
    encoding, positions = build(), vp.Positions(coords, (7, 8), 1)
    x = tokens(positions)
    assert (encoding.bias(positions, content=x) - oracle(encoding, positions, x)).abs().max() < 1e-10


@pytest.mark.parametrize("preset", ["pape", "ri"])
@pytest.mark.parametrize("kept", [False, True])
def test_prefix_tokens_at_the_corner(preset, kept):
    """As the reference code counts: the class token at (0, 0), patches from (1, 1); here with two prefix tokens."""
    encoding = build(preset=preset, prefix="corner", reference_shape=(3, 4), extrapolate=False)
    positions = grid64((6, 2), 2)
    if kept:
        positions = positions.keep(torch.tensor([[7, 0, 3], [2, 11, 5]]))
    patches = (positions.coords * torch.tensor([2 / 5, 3.0], dtype=F64) + 1).expand(2, -1, -1)  # in the trained grid
    counted = torch.cat([torch.zeros(2, 2, 2, dtype=F64), patches], dim=1)
    x = tokens(positions)
    if preset == "pape":
        want = oracle(encoding, vp.Positions(counted, (4, 5)), x)
    else:
        a = torch.log1p((x @ encoding.ab.weight.T).exp()).transpose(1, 2)
        want = -(a * encoding.position_scales[:, None] ** 2).unsqueeze(-1) * torch.cdist(counted, counted)[:, None] ** 2
    assert (encoding.bias(positions, content=x) - want).abs().max() < 1e-10
    assert want[:, :, 0].abs().max() > 0.1
    assert build(preset=preset).bias(positions, content=x)[:, :, :2].abs().max() == 0


@pytest.mark.parametrize("grid", GRIDS)
def test_equals_the_fold(grid):
    """[-sum a z^2, a, 2 a z, sum b z, b] . [1, -z^2, z, 1, -z]: 3 M + 2 more dimensions."""
    encoding, positions = build(), grid64(grid)
    x = tokens(positions)
    w, a, b = parameters(encoding, x)
    z = torch.einsum("nc,hmc->hnm", positions.coords, w).expand(2, -1, -1, -1)
    one = torch.ones_like(z[..., :1])
    on_q = torch.cat([-(a * z**2).sum(-1, True), a, 2 * a * z, (b * z).sum(-1, True), b], dim=-1)
    on_k = torch.cat([one, -(z**2), z, one, -z], dim=-1)
    assert on_q.shape[-1] == 3 * 3 + 2
    assert (encoding.bias(positions, content=x) - on_q @ on_k.transpose(-2, -1)).abs().max() < 1e-12


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("heads", [1, 3])
def test_rotation_invariant_preset(grid, heads):
    encoding, positions = build(heads, preset="ri"), grid64(grid, 1)
    assert (encoding.position_scales.abs() <= 0.5**0.5).all()
    x = tokens(positions)
    a = torch.log1p((x @ encoding.ab.weight.T).exp())
    want = torch.zeros(2, heads, x.shape[1], x.shape[1], dtype=F64)
    coords = positions.coords.tolist()
    for h in range(heads):
        for i, p in enumerate(coords):
            for j, other in enumerate(coords):
                square = math.dist(p, other) ** 2
                want[:, h, 1 + i, 1 + j] = -a[:, 1 + i, h] * encoding.position_scales[h] ** 2 * square
    got = encoding.bias(positions, content=x)
    assert (got - want).abs().max() < 1e-10
    cos, sin = math.cos(0.7), math.sin(0.7)
    turned = positions.coords @ torch.tensor([[cos, sin], [-sin, cos]], dtype=F64)
    assert (encoding.bias(vp.Positions(turned, grid, 1), content=x) - got).abs().max() < 1e-10


@pytest.mark.parametrize("preset", ["pape", "ri"])
@pytest.mark.parametrize("scaled", [False, True])
def test_whole_layer_pins_the_scale(preset, scaled):
    torch.manual_seed(3)
    positions = grid64((3, 2), 1)
    layer = TimmAttention(DIM, num_heads=HEADS, qkv_bias=True).double().eval()
    layer.__class__ = Attention
    plain, encoding = build(preset=preset), build(preset=preset, scaled=scaled)
    layer.encodings = nn.ModuleList([encoding])
    x = tokens(positions)
    q, k, v = layer.qkv(x).reshape(2, 7, 3, HEADS, HEAD_DIM).permute(2, 0, 3, 1, 4)
    bias = plain.bias(positions, content=x)
    qk = q @ k.transpose(-2, -1)
    logits = (qk + bias) / 2 if scaled else qk / 2 + bias  # sqrt(head_dim) is 2
    want = layer.proj((logits.softmax(-1) @ v).transpose(1, 2).flatten(2))
    assert (layer(x, AttentionContext(positions)) - want).abs().max() < 1e-10


def test_float32_stays_exact_far_from_the_origin():
    """The fold would lose the bias in squares of large coordinates."""
    encoding = build(num_parabolas=50)
    near = vp.Positions.grid((3, 5))
    far = vp.Positions(near.coords + 4096, (3, 5))
    x = tokens(near)
    want = encoding.bias(grid64((3, 5)), content=x)
    assert (encoding.float().bias(far, content=x.float()) - want).abs().max() < 2e-6 * want.abs().max()


def test_options_and_errors():
    assert build(num_parabolas=7).position.weight.shape == (14, 2)
    assert set(build(preset="ri").state_dict()) == {"ab.weight", "position_scales"}
    assert build().no_weight_decay() == {"ab.weight", "position.weight"}
    for options, word in (({"preset": "rotation"}, "preset"), ({"num_parabolas": 0}, "num_parabolas")):
        with pytest.raises(ValueError, match=word):
            build(**options)
    with pytest.raises(ValueError, match="num_parabolas belongs to preset 'pape'"):
        build(preset="ri", num_parabolas=3)
    assert vp.encoding_info("pape")["options"]["scaled"]  # as the reference code
    assert len(vp.create_encoding("pape", num_heads=1, head_dim=4, dim=8).position.weight) == 50
    with pytest.raises(ValueError, match="content"):
        build().bias(grid64((3, 5)))


@pytest.mark.parametrize("grid", [(2, 3), (3, 1)])
@pytest.mark.parametrize("preset", ["pape", "ri"])
def test_gradients(preset, grid):
    encoding, positions = build(preset=preset), grid64(grid, 1)
    named = dict(encoding.named_parameters())

    def bias(x, *values):
        logits = torch.zeros(1, HEADS, x.shape[1], x.shape[1], dtype=F64)
        given = dict(zip(named, values, strict=True))
        return torch.func.functional_call(encoding, given, (logits, positions), {"content": x})

    assert torch.autograd.gradcheck(bias, [tokens(positions, 1).requires_grad_(), *named.values()])
