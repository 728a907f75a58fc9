"""Absolute win: the golden row, a plain loop, and timm's Hiera."""

import pytest
import torch
import torch.nn.functional as F
from timm.models.hiera import Hiera

import visionpos as vp

F64 = torch.float64
GRIDS = [(4, 6), (3, 5), (8, 2), (1, 7)]


def grid64(grid, prefix=0):
    return vp.Positions(vp.Positions.grid(grid).coords.double(), grid, prefix, is_grid=True)


def build(window_size, global_size, dim=3, **options):
    torch.manual_seed(0)
    options = {"init_std": 1.0, **options}
    sizes = {"window_size": window_size, "global_size": global_size}
    return vp.create_encoding("abs_win", dim=dim, **sizes, **options).double()


def test_golden():
    encoding = build((2, 2), (2, 2), dim=1)
    encoding.pos_embed.data = torch.tensor([[[[0.0, 1], [2, 3]]]], dtype=F64)
    encoding.pos_embed_win.data = torch.tensor([[[[0.0, 10], [20, 30]]]], dtype=F64)
    row = encoding.embed(grid64((4, 4)))[:4, 0]
    assert row.tolist() == pytest.approx([-0.26470587, 10.03067207, 0.61638653, 10.91176414], abs=2e-6)


@pytest.mark.parametrize("mode", ["bicubic", "bilinear"])
@pytest.mark.parametrize("antialias", [True, False])
@pytest.mark.parametrize("window_size", [(2, 3), (3, 2), (1, 4)])
@pytest.mark.parametrize("grid", GRIDS)
def test_oracle(grid, window_size, antialias, mode):
    encoding = build(window_size, (3, 4), interpolation=mode, antialias=antialias).double()
    table = F.interpolate(encoding.pos_embed, size=grid, mode=mode, antialias=antialias)[0]
    window, got = encoding.pos_embed_win[0], encoding.embed(grid64(grid)).view(*grid, 3)
    for y in range(grid[0]):
        for x in range(grid[1]):
            want = table[:, y, x] + window[:, y % window_size[0], x % window_size[1]]
            assert (got[y, x] - want).abs().max() < 1e-10


@pytest.mark.parametrize("size", [(64, 96), (96, 64)])
def test_timms_hiera(size):
    """timm tiles W over its mask units; the grid is a quarter of the image here."""
    torch.manual_seed(1)
    hiera = Hiera(
        size, embed_dim=8, num_heads=1, stages=(1, 1), q_pool=1, abs_win_pos_embed=True, global_pos_size=(5, 3)
    )
    state = {name: hiera.state_dict()[name] * 50 for name in ("pos_embed", "pos_embed_win")}
    hiera.load_state_dict(state, strict=False)
    grid, window = (size[0] // 4, size[1] // 4), tuple(state["pos_embed_win"].shape[2:])
    assert tuple(hiera.tokens_spatial_shape) == grid
    encoding = build(window, (5, 3), dim=8).float()
    encoding.load_state_dict(state)
    want = hiera._pos_embed(torch.zeros(1, grid[0] * grid[1], 8))[0]
    assert (encoding.embed(vp.Positions.grid(grid)) - want).abs().max() < 2e-5  # values up to 5


@pytest.mark.parametrize("shift", [(2, 0), (0, 3), (4, 6)])
def test_the_window_repeats_also_between_cells(shift):
    encoding = build((2, 3), (2, 2))
    encoding.pos_embed.data.zero_()
    coords = torch.rand(2, 6, 2, generator=torch.Generator().manual_seed(1), dtype=F64) * 3
    here = encoding.embed(vp.Positions(coords, (9, 9)))
    there = encoding.embed(vp.Positions(coords + torch.tensor(shift), (9, 9)))
    assert (here - there).abs().max() < 1e-10
    seam = encoding.embed(vp.Positions(torch.tensor([[1.5, 2.25]], dtype=F64), (9, 9)))[0]
    w = encoding.pos_embed_win[0]
    want = 0.75 * (w[:, 1, 2] + w[:, 0, 2]) / 2 + 0.25 * (w[:, 1, 0] + w[:, 0, 0]) / 2
    assert (seam - want).abs().max() < 1e-10


def test_options_and_errors():
    assert vp.encoding_info("abs_win")["options"]["window_size"] == (8, 8)
    assert build((8, 8), (14, 14), dim=16, init_std=0.1).pos_embed.std().item() == pytest.approx(0.1, rel=0.05)
    for name, value in {"interpolation": "nearest", "antialias": "yes"}.items():
        with pytest.raises(ValueError, match=name):
            build((2, 2), (2, 2), **{name: value})
    for sizes, word in ((((0, 2), (2, 2)), "window_size"), (((2, 2), (2, -1)), "global_size")):
        with pytest.raises(ValueError, match=word):
            build(*sizes)


@pytest.mark.parametrize("grid", [(2, 3), (4, 1)])
@pytest.mark.parametrize("window_size", [(2, 2), (1, 3)])
def test_gradients(grid, window_size):
    encoding = build(window_size, (3, 2))
    coords = grid64(grid).coords + 0.3
    positions = vp.Positions(coords, grid)

    def forward(table, window):
        x = torch.zeros(1, positions.num_tokens, 3, dtype=F64)
        tables = {"pos_embed": table, "pos_embed_win": window}
        return torch.func.functional_call(encoding, tables, (x, positions))

    assert torch.autograd.gradcheck(forward, [encoding.pos_embed, encoding.pos_embed_win])
