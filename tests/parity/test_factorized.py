"""Factorised tables against a plain loop and timm's NaFlexVit."""

import pytest
import torch
from timm.models.naflexvit import NaFlexEmbeds

import visionpos as vp

F64 = torch.float64
GRIDS = [(3, 5), (6, 2), (1, 7), (4, 1)]
TABLES = [(4, 6), (3, 5), (7, 2)]


def grid64(grid, prefix=0):
    return vp.Positions(vp.Positions.grid(grid).coords.double(), grid, prefix, is_grid=True)


def build(feat_shape, **options):
    torch.manual_seed(0)
    return vp.create_encoding("factorized", dim=6, feat_shape=feat_shape, init_std=1.0, **options).double()


def read(table, place):
    place = min(max(place, 0), len(table) - 1)
    low = int(place)
    return (1 - (place - low)) * table[low] + (place - low) * table[min(low + 1, len(table) - 1)]


@pytest.mark.parametrize("combine", ["sum", "product"])
@pytest.mark.parametrize("coordinates", ["fraction", "index"])
@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("real", [False, True])
def test_oracle(grid, coordinates, combine, real):
    size = (6, 7)
    encoding = build(size, combine=combine, coordinates=coordinates)
    coords = grid64(grid).coords
    if real:
        coords = coords + torch.rand(2, len(coords), 2, generator=torch.Generator().manual_seed(1), dtype=F64) / 2
    got = encoding.embed(vp.Positions(coords, grid))
    for token, (y, x) in zip(got.view(-1, 6), coords.view(-1, 2).tolist(), strict=True):
        if coordinates == "fraction":
            y, x = (y + 0.5) / grid[0] * size[0] - 0.5, (x + 0.5) / grid[1] * size[1] - 0.5
        rows, columns = read(encoding.pos_embed_y[0], y), read(encoding.pos_embed_x[0], x)
        assert (token - (rows + columns if combine == "sum" else rows * columns)).abs().max() < 1e-10


@pytest.mark.parametrize("size", TABLES)
@pytest.mark.parametrize("grid", GRIDS)
def test_timms_naflexvit(grid, size):
    encoding = build(size).float()
    embeds = NaFlexEmbeds(embed_dim=6, pos_embed="factorized", pos_embed_grid_size=size)
    embeds.load_state_dict(encoding.state_dict(), strict=False)
    x = torch.zeros(1, grid[0] * grid[1], 6)
    embeds._apply_factorized_pos_embed(x, list(grid))
    assert (encoding.embed(vp.Positions.grid(grid)) - x[0]).abs().max() < 2e-6


def test_index_and_fraction_agree_on_the_tables_own_grid_only():
    index, fraction = build((3, 5), coordinates="index"), build((3, 5))
    assert torch.equal(index.embed(grid64((3, 5))), fraction.embed(grid64((3, 5))))
    assert (index.embed(grid64((2, 4))) - fraction.embed(grid64((2, 4)))).abs().max() > 0.1


def test_errors():
    with pytest.raises(ValueError, match=r"\(3, 5\), got a grid \(4, 5\)"):
        build((3, 5), coordinates="index").embed(grid64((4, 5)))
    wrong = {"combine": "stack", "coordinates": "absolute"}
    for name, value in wrong.items():
        with pytest.raises(ValueError, match=name):
            build((3, 5), **{name: value})
    with pytest.raises(ValueError, match="feat_shape"):
        build((0, 5))


@pytest.mark.parametrize("combine", ["sum", "product"])
@pytest.mark.parametrize("grid", [(2, 3), (4, 1)])
def test_gradients(grid, combine):
    encoding, positions = build((3, 2), combine=combine), grid64(grid)

    def forward(rows, columns):
        tables = {"pos_embed_y": rows, "pos_embed_x": columns}
        x = torch.zeros(1, positions.num_tokens, 6, dtype=F64)
        return torch.func.functional_call(encoding, tables, (x, positions))

    assert torch.autograd.gradcheck(forward, [encoding.pos_embed_y, encoding.pos_embed_x])
