"""The sampled 2-D table against a plain loop, torch's interpolate and timm's NaFlexVit."""

import math

import pytest
import torch
import torch.nn.functional as F
from timm.models.naflexvit import NaFlexEmbeds

import visionpos as vp

F64 = torch.float64
GRIDS = [(3, 5), (6, 2), (1, 7), (9, 4)]
TABLES = [(4, 4), (3, 5), (7, 2), (1, 1)]


def grid64(grid, prefix=0):
    return vp.Positions(vp.Positions.grid(grid).coords.double(), grid, prefix, is_grid=True)


def build(grid_size, **options):
    torch.manual_seed(0)
    return vp.create_encoding("learned2d", dim=6, grid_size=grid_size, init_std=1.0, **options).double()


def read(table, y, x):
    """Bilinear, with the border repeated."""
    gh, gw = table.shape[:2]
    y, x = min(max(y, 0), gh - 1), min(max(x, 0), gw - 1)
    i, j = math.floor(y), math.floor(x)
    below, right = min(i + 1, gh - 1), min(j + 1, gw - 1)
    top = (1 - (x - j)) * table[i, j] + (x - j) * table[i, right]
    return (1 - (y - i)) * top + (y - i) * ((1 - (x - j)) * table[below, j] + (x - j) * table[below, right])


@pytest.mark.parametrize("keep_aspect", [False, True])
@pytest.mark.parametrize("grid_size", TABLES)
@pytest.mark.parametrize("grid", GRIDS)
def test_sample_oracle(grid, grid_size, keep_aspect):
    encoding, positions = build(grid_size, keep_aspect=keep_aspect), grid64(grid)
    coords = torch.rand(2, 5, 2, generator=torch.Generator().manual_seed(1), dtype=F64) * torch.tensor(grid) - 0.5
    for batch in (positions, vp.Positions(coords, grid)):
        height, width = (max(grid),) * 2 if keep_aspect else grid
        scale = grid_size[0] / height, grid_size[1] / width
        got = encoding.embed(batch)
        for token, (y, x) in zip(got.view(-1, 6), batch.coords.view(-1, 2).tolist(), strict=True):
            want = read(encoding.pos_embed[0], (y + 0.5) * scale[0] - 0.5, (x + 0.5) * scale[1] - 0.5)
            assert (token - want).abs().max() < 1e-10


@pytest.mark.parametrize("grid_size", TABLES[:3])
@pytest.mark.parametrize("grid", GRIDS)
def test_sample_is_bilinear_resizing_without_antialias(grid, grid_size):
    encoding = build(grid_size)
    want = F.interpolate(encoding.pos_embed.permute(0, 3, 1, 2), size=grid, mode="bilinear")
    assert (encoding.embed(grid64(grid)) - want[0].flatten(1).T).abs().max() < 1e-10


@pytest.mark.parametrize("mode", ["bicubic", "bilinear"])
@pytest.mark.parametrize("keep_aspect", [False, True])
@pytest.mark.parametrize("grid", GRIDS)
def test_timms_naflexvit(grid, keep_aspect, mode):
    encoding = build((4, 6), interpolation=mode, keep_aspect=keep_aspect).float()
    embeds = NaFlexEmbeds(
        embed_dim=6, pos_embed_grid_size=(4, 6), pos_embed_interp_mode=mode, pos_embed_ar_preserving=keep_aspect
    )
    embeds.load_state_dict(encoding.state_dict(), strict=False)
    x = torch.zeros(1, grid[0] * grid[1], 6)
    embeds._apply_learned_pos_embed(x, list(grid))
    assert (encoding.embed(vp.Positions.grid(grid)) - x[0]).abs().max() < 2e-6


def test_presets():
    tables = {"siglip2": (16, 16, 0.02), "moonvit": (64, 64, 1.0), "qwen3_vl": (48, 48, 0.02)}
    for preset, (height, width, std) in tables.items():
        torch.manual_seed(0)
        encoding = vp.create_encoding("learned2d", dim=6, preset=preset)
        assert encoding.pos_embed.shape == (1, height, width, 6)
        assert encoding.pos_embed.std().item() == pytest.approx(std, rel=0.05)
        own = vp.create_encoding(
            "learned2d", dim=6, preset=preset, grid_size=(3, 5), interpolation="bilinear", init_std=3
        )
        assert (own.grid_size, own.interpolation, own.init_std) == ((3, 5), "bilinear", 3)


@pytest.mark.parametrize("grid", GRIDS)
def test_qwen3_vl_equals_timm_end_to_end(grid):
    qwen3_vit = pytest.importorskip("timm.models.qwen3_vit", reason="timm before 1.0.30 has no such model")
    for side, new in ((4, grid), (48, (3, 5))):
        encoding = build((side, side), preset="qwen3_vl")
        want = qwen3_vit.resample_pos_embed_grid(encoding.pos_embed.flatten(1, 2), side, new)[0]
        assert (encoding.embed(grid64(new)) - want).abs().max() < 1e-10


@pytest.mark.parametrize("keep_aspect", [False, True])
def test_end_to_end_of_real_coordinates_and_the_longer_side(keep_aspect):
    encoding, grid = build((4, 7), preset="qwen3_vl", keep_aspect=keep_aspect), (3, 5)
    coords = torch.rand(2, 9, 2, generator=torch.Generator().manual_seed(1), dtype=F64) * torch.tensor([2.0, 4.0])
    got = encoding.embed(vp.Positions(coords, grid))
    height, width = (5, 5) if keep_aspect else grid
    for token, (y, x) in zip(got.view(-1, 6), coords.view(-1, 2).tolist(), strict=True):
        want = read(encoding.pos_embed[0], y * 3 / (height - 1), x * 6 / (width - 1))
        assert (token - want).abs().max() < 1e-10


@pytest.mark.parametrize("grid", GRIDS)
def test_moonvit_is_bicubic_without_antialias(grid):
    for table in ((4, 6), (9, 8)):  # larger and smaller than most grids
        encoding = build(table, preset="moonvit")
        image = encoding.pos_embed.permute(0, 3, 1, 2)
        want = F.interpolate(image, size=grid, mode="bicubic", align_corners=False, antialias=False)[0].flatten(1).T
        assert (encoding.embed(grid64(grid)) - want).abs().max() < 1e-10


@pytest.mark.parametrize("mode", ["sample", "ends", "bicubic", "bilinear"])
@pytest.mark.parametrize("grid", [(3, 5), (5, 2)])
def test_exact_on_its_own_grid_and_zero_for_prefix_tokens(grid, mode):
    encoding = build(grid, interpolation=mode)
    out = encoding(torch.zeros(1, 2 + grid[0] * grid[1], 6, dtype=F64), grid64(grid, 2))[0]
    assert torch.equal(out[2:], encoding.pos_embed[0].flatten(0, 1))
    assert not out[:2].any()


def test_errors():
    for options, word in (({"interpolation": "nearest"}, "interpolation"), ({"keep_aspect": 1}, "keep_aspect")):
        with pytest.raises(ValueError, match=word):
            build((4, 4), **options)
    with pytest.raises(ValueError, match="grid_size"):
        build((4, 0))


@pytest.mark.parametrize("mode", ["sample", "ends", "bicubic"])
@pytest.mark.parametrize("grid", [(2, 3), (4, 1)])
def test_gradients(grid, mode):
    encoding, positions = build((3, 2), interpolation=mode), grid64(grid)

    def forward(table):
        x = torch.zeros(1, positions.num_tokens, 6, dtype=F64)
        return torch.func.functional_call(encoding, {"pos_embed": table}, (x, positions))

    assert torch.autograd.gradcheck(forward, encoding.pos_embed)
