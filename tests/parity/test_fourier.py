"""Fourier features: Perceiver's against a plain loop and timm, learnable ones against a plain loop."""

import math

import pytest
import torch
from timm.layers.pos_embed_sincos import build_fourier_pos_embed
from timm.models.xcit import PositionalEncodingFourier

import visionpos as vp

F64 = torch.float64
GRIDS = [(3, 5), (6, 2), (1, 7), (4, 1)]


def grid64(grid, prefix=0):
    return vp.Positions(vp.Positions.grid(grid).coords.double(), grid, prefix, is_grid=True)


def build(feat_shape=(4, 6), dim=10, **options):
    torch.manual_seed(0)
    return vp.create_encoding("fourier", dim=dim, feat_shape=feat_shape, **options).double()


def perceiver(y, x, grid, trained, bands):
    box = [2 * p / (n - 1) - 1 if n > 1 else 0.0 for p, n in zip((y, x), grid, strict=True)]
    phases = []
    for u, n in zip(box, trained, strict=True):
        steps = [1 + (n / 2 - 1) * i / max(bands - 1, 1) for i in range(bands)]
        phases += [math.pi * f * u for f in steps]
    return [*box, *map(math.sin, phases), *map(math.cos, phases)]


@pytest.mark.parametrize("bands", [1, 4])
@pytest.mark.parametrize("trained", [(3, 5), (8, 4)])
@pytest.mark.parametrize("grid", GRIDS)
def test_perceiver_oracle(grid, trained, bands):
    encoding = build(trained, num_bands=bands)
    coords = torch.rand(2, 4, 2, generator=torch.Generator().manual_seed(1), dtype=F64) * (torch.tensor(grid) - 1)
    for positions in (grid64(grid), vp.Positions(coords, grid)):
        rows = [perceiver(y, x, grid, trained, bands) for y, x in positions.coords.view(-1, 2).tolist()]
        want = torch.tensor(rows, dtype=F64) @ encoding.proj.weight.T
        assert (encoding.embed(positions).view(-1, 10) - want).abs().max() < 1e-10


@pytest.mark.parametrize("bands", [1, 3, 8])
@pytest.mark.parametrize("grid", [(4, 6), (5, 3), (2, 7)])
def test_timms_features(grid, bands):
    """timm has one set of bands for both axes and lists band before axis."""
    side = max(grid)
    encoding = build((side, side), num_bands=bands)
    parts = build_fourier_pos_embed(list(grid), num_bands=bands, max_res=side, linear_bands=True, include_grid=True)
    want = torch.cat([part.flatten(2).flatten(0, 1) for part in parts], dim=-1)
    assert (encoding.features(grid64(grid)) - want).abs().max() < 2e-5  # timm's phases are float32


@pytest.mark.parametrize("hidden", [3, 8])
@pytest.mark.parametrize("bands", [1, 4])
@pytest.mark.parametrize("grid", GRIDS)
def test_learnable_oracle(grid, bands, hidden):
    encoding = build(grid, preset="learnable", num_bands=bands, hidden_dim=hidden, gamma=1.0)
    first, last = encoding.mlp[0], encoding.mlp[2]
    got = encoding.embed(grid64(grid))
    for token, (y, x) in zip(got, grid64(grid).coords.tolist(), strict=True):
        phases = [y * wy + x * wx for wy, wx in encoding.frequencies.tolist()]
        f = torch.tensor([*map(math.cos, phases), *map(math.sin, phases)], dtype=F64) / math.sqrt(2 * len(phases))
        inner = first.weight @ f + first.bias
        gelu = torch.tensor([v * (1 + math.erf(v / math.sqrt(2))) / 2 for v in inner.tolist()], dtype=F64)
        assert (token - (last.weight @ gelu + last.bias)).abs().max() < 1e-10


def test_learnable_similarity_is_a_gaussian_of_width_gamma():
    """f . f' of many frequencies is exp(-d^2 / (2 gamma^2)) / 2: W has standard deviation 1 / gamma."""
    encoding = build(preset="learnable", num_bands=20000, gamma=5.0)
    f = encoding.features(vp.Positions(torch.tensor([[0.0, 0], [3, 4], [0, 10]], dtype=F64), (11, 12)))
    assert (f @ f[0]).tolist() == pytest.approx([0.5, 0.5 * math.exp(-0.5), 0.5 * math.exp(-2)], abs=0.01)


def test_concatenation_before_a_linear_layer_is_this_sum():
    """Perceiver concatenates: W [x | f] = W_x (x + P f) wherever W_f = W_x P."""
    encoding, x = build(num_bands=3), torch.randn(1, 24, 10, dtype=F64)
    f, w = encoding.features(grid64((4, 6))), torch.randn(7, 10, dtype=F64)
    joint = torch.cat([w, w @ encoding.proj.weight], dim=1)
    want = torch.cat([x[0], f], dim=1) @ joint.T
    assert (encoding(x, grid64((4, 6)))[0] @ w.T - want).abs().max() < 1e-10


def test_options_and_errors():
    assert build(num_bands=64).proj.weight.shape == (10, 258)  # the paper's 258 features
    assert build(preset="learnable", num_bands=4).no_weight_decay() >= {"frequencies"}
    wrong = {"preset": "random", "num_bands": 0, "hidden_dim": 0, "gamma": 0.0}
    for name, value in wrong.items():
        with pytest.raises(ValueError, match=name):
            build(**{"preset": "learnable", name: value})
    with pytest.raises(ValueError, match="hidden_dim and gamma belong to preset 'learnable'"):
        build(hidden_dim=8)


@pytest.mark.parametrize("preset", ["perceiver", "learnable"])
@pytest.mark.parametrize("grid", [(2, 3), (4, 1)])
def test_gradients(grid, preset):
    hidden = {"hidden_dim": 3} if preset == "learnable" else {}
    encoding, positions = build(grid, dim=3, preset=preset, num_bands=2, **hidden), grid64(grid)
    named = dict(encoding.named_parameters())

    def forward(*values):
        x = torch.zeros(1, positions.num_tokens, 3, dtype=F64)
        return torch.func.functional_call(encoding, dict(zip(named, values, strict=True)), (x, positions))

    assert torch.autograd.gradcheck(forward, list(named.values()))


@pytest.mark.parametrize("bands", [1, 4])
@pytest.mark.parametrize("grid", GRIDS)
def test_xcits(grid, bands):
    """A plain loop in float64, at any coordinates, and timm's module, which computes in float32."""
    encoding = build(preset="xcit", num_bands=bands)
    layer = encoding.token_projection
    coords = torch.rand(2, 4, 2, generator=torch.Generator().manual_seed(1), dtype=F64) * (torch.tensor(grid) - 1)
    for positions in (grid64(grid), vp.Positions(coords, grid)):
        for token, place in zip(encoding.embed(positions).view(-1, 10), positions.coords.view(-1, 2), strict=True):
            f = []
            for p, n in zip(place.tolist(), grid, strict=True):
                u = 2 * math.pi * (p + 1) / (n + 1e-6)
                phases = [u / 10000 ** (band / bands) for band in range(bands)]
                f += [value for phase in phases for value in (math.sin(phase), math.cos(phase))]
            want = layer.weight.flatten(1) @ torch.tensor(f, dtype=F64) + layer.bias
            assert (token - want).abs().max() < 1e-10
    timms = PositionalEncodingFourier(hidden_dim=2 * bands, dim=10).double()
    timms.load_state_dict(encoding.state_dict())
    assert (encoding.embed(grid64(grid)) - timms(1, *grid)[0].flatten(1).T).abs().max() < 2e-6
    assert vp.create_encoding("fourier", dim=8, feat_shape=grid, preset="xcit").num_bands == 16
