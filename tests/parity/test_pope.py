"""PoPE: golden values on one axis and on two, an oracle, and attention whose q and k are wider than its values."""

import math

import pytest
import torch

import visionpos as vp
from tests.parity.rotary_oracle import F64, GRIDS, gradcheck, grid64, relative_residual, tokens
from visionpos.encoding import AttentionTensors

Q = torch.tensor([[1, -1, 0.5, 2], [0, 1, 2, 3], [-2, 0.25, -0.5, 1]], dtype=F64)
GOLDEN = [  # b, logits that are not scaled
    (
        (0, 0, 0, 0),
        [
            [3.281522280, 5.693380687, 3.210782485],
            [5.301752355, 9.739791066, 6.744494235],
            [2.148911694, 3.705000739, 2.631411653],
        ],
    ),
    (
        (-0.5, -7, 0.3, -1),
        [
            [2.278762579, 4.339900860, 2.554283076],
            [3.832195218, 7.296566052, 5.135146056],
            [1.543398344, 2.634659900, 1.823455742],
        ],
    ),
]


def build(**options):
    return vp.create_encoding("pope", **{"num_heads": 2, "head_dim": 8, **options}).double()


def randomised(encoding):
    with torch.no_grad():
        encoding.phases.copy_(-2 * torch.rand(encoding.phases.shape, generator=torch.Generator().manual_seed(3)) - 0.1)
    return encoding


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize(("b", "want"), GOLDEN)
def test_golden_on_one_axis(b, want, axis):
    """Four channels of one axis at 0, 1, 2, while the magnitudes of the other axis' channels are 0."""
    encoding = build(num_heads=1, temperature=10000.0)
    with torch.no_grad():
        encoding.phases[0, 4 * axis : 4 * axis + 4] = torch.tensor(b, dtype=F64)
    nothing = torch.full((3, 4), -1e4, dtype=F64)  # softplus is 0
    q, k = (torch.cat([nothing, x] if axis else [x, nothing], dim=-1) for x in (Q, Q.flip(0) / 2))
    coords = torch.zeros(3, 2, dtype=F64)
    coords[:, axis] = torch.arange(3)
    q, k = encoding(q[None, None], k[None, None], vp.Positions(coords, (3, 3)))
    assert (q @ k.mT)[0, 0].tolist() == [pytest.approx(row, abs=1e-9) for row in want]


def test_golden_on_two_axes():
    encoding = build(num_heads=1, head_dim=4)
    pair = vp.Positions(torch.tensor([[0, 0], [1, 2]], dtype=F64), (2, 3))
    x = torch.stack([Q[0], Q[1]])[None, None]
    q, k = encoding(x, x, pair)
    assert (q @ k.mT)[0, 0, 0, 1].item() == pytest.approx(6.393873146, abs=1e-9)


@pytest.mark.parametrize("prefix", [0, 2])
@pytest.mark.parametrize("grid", GRIDS)
def test_oracle(grid, prefix):
    """Logits channel by channel; prefix tokens are at (0, 0)."""
    encoding, positions = randomised(build(temperature=30.0)), grid64(grid, prefix)
    q, k = tokens(encoding, positions)
    tensors = AttentionTensors(x=q, q=q, k=k, v=k)
    encoding.modify_attention(tensors, encoding.prepare(positions))
    theta = [30 ** (-c / 4) for c in range(4)]
    places = [(0, 0)] * prefix + [divmod(token, grid[1]) for token in range(positions.num_patches)]
    want = torch.zeros(2, 2, len(places), len(places), dtype=F64)
    mu_q, mu_k = (torch.log1p(x.exp()) for x in (q, k))
    for i, (y, x) in enumerate(places):
        for j, (y2, x2) in enumerate(places):
            for c in range(8):
                delta = (y2 - y) * theta[c] if c < 4 else (x2 - x) * theta[c - 4]
                wave = (delta + encoding.phases[:, c].detach()).cos()  # (heads,)
                want[:, :, i, j] += mu_q[:, :, i, c] * mu_k[:, :, j, c] * wave
    assert (tensors.q @ tensors.k.mT - want).abs().max() < 1e-11
    a, b = encoding(q, k, positions)
    assert torch.equal(a, tensors.q)
    assert torch.equal(b, tensors.k)


@pytest.mark.parametrize("host", ["vit_tiny_patch16_224", "swin_tiny_patch4_window7_224"])
def test_attention_keeps_its_scale_and_the_width_of_its_values(host, monkeypatch):
    """The layer's own product, written out: logits are divided by the root of head_dim, not of twice as much."""
    size = {"img_size": (32, 64), "embed_dim": 32, "num_classes": 3}
    size |= {"depth": 1, "num_heads": 2} if "vit" in host else {"depths": (1,), "num_heads": (2,), "window_size": 4}
    model = vp.create_model(host, encoding="pope", **size).double().eval()
    layer = (model.blocks if "vit" in host else model.layers[0].blocks)[0].attn
    (encoding,), x = layer.encodings, torch.randn(2, 3, 32, 64, dtype=F64)
    found = []
    layer.proj.register_forward_pre_hook(lambda module, args: found.append(args[0]))
    layer.qkv.register_forward_hook(lambda module, args, out: found.append(out.clone()))
    seen = []
    original = type(encoding).prepare
    monkeypatch.setattr(type(encoding), "prepare", lambda self, p: seen.append(p) or original(self, p))
    model(x)
    qkv, out = found
    qkv = qkv.flatten(1, -2).unflatten(-1, (3, 2, 16)).permute(2, 0, 3, 1, 4)
    if qkv.shape[-2] > seen[0].num_tokens:  # Swin's windows
        qkv = qkv.unflatten(-2, (-1, seen[0].num_tokens)).transpose(2, 3).flatten(1, 2)
    q, k, v = qkv
    q, k = encoding(q, k, seen[0])
    want = ((q @ k.mT) / 4).softmax(-1) @ v
    got = out.reshape(len(v), v.shape[-2], 2, 16).transpose(1, 2)
    assert (got - want).abs().max() < 1e-10


@pytest.mark.parametrize("after", ["comrope", "rope_axial", "string", "shaw", "decomposed"])
def test_what_needs_queries_of_their_own_width_is_named_in_front(after):
    options = {"img_size": (12, 20), "patch_size": 4, "embed_dim": 32, "depth": 1, "num_heads": 2, "num_classes": 3}
    with pytest.raises(
        ValueError, match=f"{after} .* and pope gives them more channels: name {after} in front of pope"
    ):
        vp.create_model("vit_tiny_patch16_224", encoding=["pope", after], **options)
    model = vp.create_model("vit_tiny_patch16_224", encoding=[after, "pope", "alibi2d"], **options)
    assert model(torch.randn(1, 3, 12, 20)).isfinite().all()


def test_relative():
    assert relative_residual(randomised(build())) < 1e-12


def test_gradients():
    encoding = randomised(build(num_heads=1, head_dim=4))
    assert gradcheck(encoding, (2, 3))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_small_types_are_rounded_once(dtype):
    encoding, positions = randomised(build()), grid64((3, 5), 1)
    q, k = (x.to(dtype) for x in tokens(encoding, positions))
    exact = encoding(q.double(), k.double(), positions)
    for got, want in zip(encoding.float()(q, k, vp.Positions.grid((3, 5), 1)), exact, strict=True):
        assert got.dtype == dtype
        assert ((got.double() - want).abs() <= want.abs() * torch.finfo(dtype).eps / 2 + 3e-6).all()


def test_phases_are_clamped_and_start_at_nothing():
    encoding = build(num_heads=1)
    assert encoding.phases.abs().max() == 0
    q, k = tokens(encoding, grid64((2, 3)))
    turned = {}
    for b in (-3 * math.pi, -2 * math.pi, 0.0, 0.4, -1.0):
        with torch.no_grad():
            encoding.phases.fill_(b)
        turned[b] = encoding(q, k, grid64((2, 3)))[1]
    assert torch.equal(turned[-3 * math.pi], turned[-2 * math.pi])
    assert torch.equal(turned[0.4], turned[0.0])
    assert (turned[-1.0] - turned[0.0]).abs().max() > 0.1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"head_dim": 7}, "head_dim must be a positive multiple of 2 .* got 7"),
        ({"temperature": 0}, "pope: temperature must be a positive, finite number, got 0"),
        ({"layout": "half"}, "pope has no option 'layout'"),
    ],
)
def test_errors(options, message):
    with pytest.raises(ValueError, match=message):
        build(**options)
