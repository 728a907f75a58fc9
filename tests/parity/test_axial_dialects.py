"""The dialects of axial RoPE in released encoders, against golden values, timm's own modules and a plain oracle."""

import math

import pytest
import timm.layers.pos_embed_sincos as timm_ropes
import torch

import visionpos as vp
from tests.parity.rotary_oracle import F64, GRIDS, gradcheck, grid64, point, relative_residual, tokens
from tests.small import pictures, swin, vit

PRESETS = ["rope_vit", "moonvit", "pixtral", "qwen_vit", "gemma4", "mrope"]
GOLDEN = {  # head_dim 8, the token (y, x) = (1, 2), q = 1 .. 8
    "moonvit": (
        [2.0, 1.0, 0.02, 0.01],
        [
            *(-2.234741690, 0.077003754, -1.744977022, 4.685622178),
            *(4.879008033, 6.098793373, 6.919651336, 8.069598837),
        ],
    ),
    "pixtral": (
        [1.0, 0.01, 0.2, 0.002],
        [
            *(-3.667052618, 1.939901001, 1.549514418, 3.983992011),
            *(3.542982514, 6.019699669, 7.456474037, 8.007983995),
        ],
    ),
    "qwen_vit": (
        [1.0, 0.01, 2.0, 0.02],
        [
            *(-3.667052618, 1.939901001, -7.613522497, 3.839210693),
            *(3.542982514, 6.019699669, -0.185135575, 8.078394720),
        ],
    ),
    "gemma4": (
        [2.0, 0.2, 1.0, 0.1],
        [
            *(-3.144039117, 1.165455833, -0.339143083, 4.317604973),
            *(-3.188785364, 5.171357658, 7.989471065, 8.559033822),
        ],
    ),
    "mrope": (  # head_dim 12, q = 1 .. 12
        [0, 0.215443469, 0.092831777, 0, 0.002154435, 0.000928318],
        [
            *(1, 0.243518042, 2.152796165, 4, 4.976289633, 5.988857603),
            *(7, 8.242614813, 9.239343519, 10, 11.010746636, 12.005564735),
        ],
    ),
}


def build(preset, **options):
    return vp.create_encoding("rope_axial", **{"num_heads": 1, "head_dim": 8, "preset": preset, **options})


@pytest.mark.parametrize("preset", list(GOLDEN))
def test_golden(preset):
    angles, turned = GOLDEN[preset]
    encoding = build(preset, head_dim=2 * len(angles))
    assert encoding.angles(point(1.0, 2.0, (2, 3)))[0, 0].tolist() == pytest.approx(angles, abs=1e-9)
    q = torch.arange(1.0, 1 + 2 * len(angles), dtype=F64).expand(1, 1, 1, -1)
    got, _ = encoding(q, q, point(1.0, 2.0, (2, 3)))
    assert got[0, 0, 0].tolist() == pytest.approx(turned, abs=1e-9)


def pairs_of(preset, head_dim, temperature):
    """(axis, frequency, first channel, second channel) of every pair, as each code base reads."""
    half, quarter = head_dim // 2, head_dim // 4
    series = [temperature ** (-2 * i / head_dim) for i in range(half)]
    by_axis = {
        "rope_vit": [*("x" * quarter), *("y" * quarter)],
        "gemma4": [*("x" * quarter), *("y" * quarter)],
        "moonvit": ["x", "y"] * quarter,
        "pixtral": [*("y" * quarter), *("x" * quarter)],
        "qwen_vit": [*("y" * quarter), *("x" * quarter)],
        "mrope": (["t", "y", "x"] * half)[:half],
    }[preset]
    each = series[::2]
    speed = {
        "rope_vit": each * 2,
        "gemma4": each * 2,
        "qwen_vit": each * 2,
        "moonvit": [f for f in each for _ in "xy"],
        "pixtral": series[::2] + series[1::2],
        "mrope": series,
    }[preset]
    neighbours, halves = [(2 * i, 2 * i + 1) for i in range(half)], [(i, i + half) for i in range(half)]
    blocks = [(i + i // quarter * quarter, i + i // quarter * quarter + quarter) for i in range(half)]
    channels = {"rope_vit": neighbours, "moonvit": neighbours, "gemma4": blocks}.get(preset, halves)
    return list(zip(by_axis, speed, channels, strict=True))


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("head_dim", [8, 20])
@pytest.mark.parametrize("preset", PRESETS)
def test_oracle(preset, head_dim, grid):
    encoding = build(preset, num_heads=2, head_dim=head_dim, temperature=37.0)
    positions = grid64(grid, 2)
    q, k = tokens(encoding, positions)
    for x, got in zip((q, k), encoding(q, k, positions), strict=True):
        assert torch.equal(got[:, :, :2], x[:, :, :2])
        want = x[:, :, 2:].clone()
        for token in range(positions.num_patches):
            place = {"y": token // grid[1], "x": token % grid[1], "t": 0}
            for axis, speed, (a, b) in pairs_of(preset, head_dim, 37.0):
                cos, sin = math.cos(place[axis] * speed), math.sin(place[axis] * speed)
                u, v = x[:, :, 2 + token, a], x[:, :, 2 + token, b]
                want[:, :, token, a], want[:, :, token, b] = u * cos - v * sin, u * sin + v * cos
        assert (got[:, :, 2:] - want).abs().max() < 1e-12


@pytest.mark.parametrize("grid", [(3, 5), (4, 2)])
@pytest.mark.parametrize(("preset", "indexing"), [("qwen_vit", "ij"), ("rope_vit", "xy")])
def test_against_timms_axial_rope(preset, indexing, grid):
    rope = timm_ropes.RotaryEmbeddingCat(
        24, max_res=0, in_pixels=False, feat_shape=list(grid), temperature=900.0, grid_indexing=indexing
    )
    q = torch.randn(2, 3, grid[0] * grid[1], 24)
    if preset == "qwen_vit":  # sines and cosines of neighbours, spread over the halves
        sin, cos = (part[:, ::2].repeat(1, 2) for part in rope.get_embed().chunk(2, dim=-1))
        want = timm_ropes.apply_rot_embed_cat(q, torch.cat([sin, cos], dim=-1), half=True)
    else:
        want = timm_ropes.apply_rot_embed_cat(q, rope.get_embed())
    got, _ = build(preset, num_heads=3, head_dim=24, temperature=900.0)(q, q, vp.Positions.grid(grid))
    assert (got - want).abs().max() < 3e-6


@pytest.mark.skipif(not hasattr(timm_ropes, "RotaryEmbeddingMRope"), reason="this timm has no M-RoPE")
@pytest.mark.parametrize("grid", [(3, 5), (4, 2)])
@pytest.mark.parametrize(
    ("head_dim", "sections"), [(72, (8, 12, 12)), (64, (8, 12, 12)), (24, (4, 2, 3)), (24, (9, 0, 1))]
)
def test_against_timms_mrope(head_dim, sections, grid):
    rope = timm_ropes.RotaryEmbeddingMRope(head_dim, mrope_section=sections, temperature=500.0)
    q = torch.randn(2, 3, grid[0] * grid[1], head_dim)
    want = timm_ropes.apply_rot_embed_cat(q, rope.get_embed(list(grid)), half=True)
    options = {"head_dim": head_dim, "sections": sections, "temperature": 500.0}
    got, _ = build("mrope", num_heads=3, **options)(q, q, vp.Positions.grid(grid))
    assert (got - want).abs().max() < 3e-6


@pytest.mark.parametrize(("pairs", "sections"), [(64, (24, 20, 20)), (32, (12, 9, 11)), (12, (4, 2, 3))])
def test_pairs_that_the_sections_of_mrope_leave_turn_with_the_time_of_a_video(pairs, sections):
    """As Qwen3-VL deals them out: pairs 1, 4, ... to y and 2, 5, ... to x, as many as the section has, others to t."""
    rope = build("mrope", num_heads=1, head_dim=2 * pairs, sections=sections)
    positions = vp.Positions.grid((3, 4, 5))
    theta = 10000.0 ** (-torch.arange(pairs, dtype=torch.float64) / pairs)
    axis = torch.zeros(pairs, dtype=torch.long)
    for which in (1, 2):
        axis[which : 3 * sections[which] : 3] = which
    want = positions.coords.double()[:, axis] * theta
    assert (rope.angles(positions)[0] - want).abs().max() < 1e-6
    assert (rope.angles(positions.keep(torch.tensor([59, 7])))[0] - want[[59, 7]]).abs().max() < 1e-6


@pytest.mark.parametrize("grid", [(3, 5), (4, 2)])
@pytest.mark.parametrize("head_dim", [8, 24])
def test_against_timms_gemma4(head_dim, grid):
    gemma4 = pytest.importorskip("timm.models.gemma4_vit")
    positions = vp.Positions.grid(grid)
    x = torch.randn(2, positions.num_patches, 3, head_dim)
    cos, sin = gemma4.Gemma4RotaryEmbedding2D(head_dim)(x, positions.coords.flip(-1).expand(2, -1, -1))
    want = gemma4.apply_multidimensional_rope(x, cos, sin, ndim=2, unsqueeze_dim=2).transpose(1, 2)
    q = x.transpose(1, 2)
    got, _ = build("gemma4", num_heads=3, head_dim=head_dim)(q, q, positions)
    assert (got - want).abs().max() < 3e-6


def test_qwen_vit_is_rope_eva_with_halves_on_its_own_grid():
    eva = vp.create_encoding("rope_eva", num_heads=1, head_dim=8, layout="half")
    q, k = tokens(eva, grid64((2, 5)))
    for got, want in zip(build("qwen_vit")(q, k, grid64((2, 5))), eva(q, k, grid64((2, 5))), strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("preset", PRESETS)
def test_relative_and_gradients(preset):
    assert relative_residual(build(preset, head_dim=12)) < 1e-12
    assert gradcheck(build(preset), (2, 3))


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize(("host", "size"), [(vit, (32, 48)), (swin, (64, 96))])
@pytest.mark.parametrize("preset", ["pixtral", "gemma4"])
def test_in_a_model_a_layout_that_kernels_do_not_know_is_turned_all_the_same(preset, host, size, grad, monkeypatch):
    model, x = host({"name": "rope_axial", "preset": preset}), pictures(size)
    with torch.set_grad_enabled(grad):
        got = model(x)
        monkeypatch.setattr(vp.RotaryEncoding, "turns_pairs", False)
        assert (got - model(x)).abs().max() < 1e-5


def test_half_per_axis_is_half_with_the_middle_quarters_swapped():
    x, angles = torch.randn(5, 12), torch.rand(5, 6)
    order = [0, 1, 2, 6, 7, 8, 3, 4, 5, 9, 10, 11]
    want = vp.apply_rotary(x[:, order], angles, layout="half")[:, order]
    assert torch.equal(vp.apply_rotary(x, angles, layout="half_per_axis"), want)


@pytest.mark.parametrize("heads", ["shared", "per_head"])
@pytest.mark.parametrize("preset", [preset for preset in PRESETS if preset != "mrope"])
def test_learned_frequencies_start_as_the_formula(preset, heads):
    options = {"num_heads": 3, "head_dim": 16, "temperature": 50.0}
    learned, fixed = build(preset, learn_frequencies=heads, **options), build(preset, **options)
    assert learned.log_frequencies.shape == (3 if heads == "per_head" else 1, 4, 2)
    got, want = learned.angles(grid64((3, 5))), fixed.angles(grid64((3, 5)))
    assert (got - want).abs().max() < 1e-6
    assert learned.no_weight_decay() == {"log_frequencies"}


@pytest.mark.parametrize("preset", ["rope_vit", "moonvit", "pixtral"])
def test_an_angle_grows_with_its_logarithm_at_the_rate_of_the_angle(preset):
    encoding = build(preset, num_heads=2, learn_frequencies="per_head").double()
    token = point(3.0, 5.0, (6, 7))
    before = encoding.angles(token)
    jacobian = torch.autograd.functional.jacobian(
        lambda value: torch.func.functional_call(Angles(encoding), {"encoding.log_frequencies": value}, (token,)),
        encoding.log_frequencies,
    )  # (heads, 1, pairs, heads, rounds, axes)
    assert (jacobian.sum((3, 4, 5)) - before).abs().max() < 1e-12
    assert ((jacobian.abs() > 0).sum((3, 4, 5)) == 1).all()  # each pair has one frequency, of its own head
    assert gradcheck(encoding, (2, 3))


class Angles(torch.nn.Module):
    def __init__(self, encoding):
        super().__init__()
        self.encoding = encoding

    def forward(self, positions):
        return self.encoding.angles(positions)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_learned_frequencies_stay_in_float32(dtype):
    model = vit({"name": "rope_axial", "learn_frequencies": "per_head"})
    encoding = vp.get_encoding(model)[1]
    before = encoding.log_frequencies.detach().clone()
    model(pictures()).sum().backward()
    model.to(dtype)
    assert encoding.log_frequencies.grad.dtype == torch.float32
    assert model.blocks[0].attn.qkv.weight.dtype == dtype
    assert encoding.log_frequencies.dtype == torch.float32
    assert torch.equal(encoding.log_frequencies, before)
    assert model(pictures().to(dtype)).dtype == dtype
    model.double()
    assert encoding.log_frequencies.dtype == torch.float64


def test_learned_frequencies_learn_in_every_layer():
    model = vit({"name": "rope_axial", "learn_frequencies": "shared"})
    first, second = vp.get_encoding(model)
    assert first is not second
    model(pictures()).square().sum().backward()
    for encoding in (first, second):
        assert encoding.log_frequencies.grad.abs().min() > 0
    assert vp.get_encoding(vit("rope_axial"))[0].log_frequencies is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"preset": "llama"}, "rope_axial: preset must be one of 'rope_vit', 'moonvit', .* got 'llama'"),
        ({"preset": "moonvit", "sections": (1, 2, 3)}, r"sections belong to preset 'mrope', got \(1, 2, 3\) with"),
        ({"preset": "mrope", "sections": (1, 2)}, r"rope_axial: sections must be a tuple of 3, .* got \(1, 2\)"),
        ({"preset": "mrope", "learn_frequencies": "shared"}, "learn_frequencies must be None with preset 'mrope'"),
        ({"preset": "gemma4", "learn_frequencies": "both"}, "learn_frequencies must be one of 'shared', 'per_head'"),
        ({"preset": "gemma4", "head_dim": 6}, "head_dim must be a positive multiple of 4 .* got 6"),
    ],
)
def test_errors(options, message):
    with pytest.raises(ValueError, match=message):
        build(**{"preset": "rope_vit", **options})
