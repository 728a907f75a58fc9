"""PEG against a plain loop and timm's Twins."""

import pytest
import torch
from timm.models.twins import PosConv

import visionpos as vp

F64 = torch.float64
GRIDS = [(3, 5), (4, 2), (1, 6), (5, 1)]


def grid64(grid, prefix=0):
    return vp.Positions(vp.Positions.grid(grid).coords.double(), grid, prefix, is_grid=True)


def build(dim=4, **options):
    torch.manual_seed(0)
    return vp.create_encoding("peg", dim=dim, **options).double()


def tokens(positions, batch=2, dim=4):
    return torch.randn(batch, positions.num_tokens, dim, generator=torch.Generator().manual_seed(1), dtype=F64)


def oracle(encoding, positions, x):
    """Token by token: what lies in the cells around it, times the kernel."""
    p, margin = positions.num_prefix_tokens, encoding.kernel_size // 2
    height, width = positions.feat_shape
    out, kernel = x.clone(), encoding.proj.weight[:, 0]
    for b in range(len(x)):
        coords = (positions.coords[b] if positions.is_batched else positions.coords).tolist()
        cells = [(round(y), round(x)) for y, x in coords]
        for i, (y, u) in enumerate(cells):
            out[b, p + i] += encoding.proj.bias
            for dy in range(-margin, margin + 1):
                for dx in range(-margin, margin + 1):
                    cell = (y + dy, u + dx)
                    if encoding.padding == "circular":
                        cell = (cell[0] % height, cell[1] % width)
                    for j, other in enumerate(cells):
                        if other == cell:
                            out[b, p + i] += kernel[:, dy + margin, dx + margin] * x[b, p + j]
    return out


@pytest.mark.parametrize("padding", ["zeros", "circular"])
@pytest.mark.parametrize(("kernel_size", "prefix"), [(3, 0), (3, 2), (5, 1), (1, 0)])
@pytest.mark.parametrize("grid", GRIDS)
def test_oracle(grid, kernel_size, prefix, padding):
    encoding, positions = build(kernel_size=kernel_size, padding=padding), grid64(grid, prefix)
    x = tokens(positions)
    want = oracle(encoding, positions, x)
    assert (encoding(x, positions) - want).abs().max() < 1e-10
    assert torch.equal(encoding(x, positions)[:, :prefix], x[:, :prefix])
    loose = vp.Positions(positions.coords, grid, prefix)  # the same tokens, not known to be a whole grid
    assert (encoding(x, loose) - want).abs().max() < 1e-10


@pytest.mark.parametrize("grid", GRIDS)
def test_timms_twins(grid):
    encoding, positions = build(dim=6).float(), vp.Positions.grid(grid)
    conv = PosConv(6, 6)
    conv.load_state_dict({name.replace("proj.", "proj.0."): value for name, value in encoding.state_dict().items()})
    x = tokens(positions, dim=6).float()
    assert (encoding(x, positions) - conv(x, grid)).abs().max() < 2e-6


@pytest.mark.parametrize("padding", ["zeros", "circular"])
@pytest.mark.parametrize("prefix", [0, 1])
@pytest.mark.parametrize("grid", [(3, 5), (4, 2)])
def test_kept_tokens_see_zeros_where_others_were(grid, prefix, padding):
    encoding = build(padding=padding)
    index = torch.stack(
        [torch.randperm(grid[0] * grid[1], generator=torch.Generator().manual_seed(i))[:5] for i in (0, 1)]
    )
    for keep in (index, index[0]):
        positions = grid64(grid, prefix).keep(keep)
        x = tokens(positions)
        assert (encoding(x, positions) - oracle(encoding, positions, x)).abs().max() < 1e-10


def test_real_coordinates_go_to_their_cells_and_a_shared_cell_is_summed():
    encoding = build()
    coords = torch.tensor([[0.2, 0.9], [0.4, 1.1], [1.8, 2.2], [1.2, 0.6]], dtype=F64)
    positions = vp.Positions(coords, (3, 4))
    x = tokens(positions)
    assert (encoding(x, positions) - oracle(encoding, positions, x)).abs().max() < 1e-10


def test_only_zero_padding_knows_the_place():
    """The same content everywhere: a circular convolution cannot tell tokens apart, zero padding shows the border."""
    positions = grid64((4, 5))
    x = torch.ones(1, 20, 4, dtype=F64)
    circular, zeros = (build(padding=padding)(x, positions)[0].view(4, 5, 4) for padding in ("circular", "zeros"))
    assert (circular - circular[0, 0]).abs().max() < 1e-12
    assert (zeros[1:-1, 1:-1] - circular[1:-1, 1:-1]).abs().max() < 1e-12
    assert (zeros[0] - circular[0]).abs().max() > 0.1


def test_options_and_errors():
    assert build().no_weight_decay() == {"proj.bias"}
    for options, word in (
        ({"kernel_size": 2}, "kernel_size"),
        ({"padding": "reflect"}, "padding"),
        ({"dim": 0}, "dim"),
    ):
        with pytest.raises(ValueError, match=word):
            build(**options)
    line = vp.Positions.grid((6,))
    with pytest.raises(ValueError, match="two axes"):
        build()(torch.zeros(1, 6, 4), line)


@pytest.mark.parametrize("padding", ["zeros", "circular"])
@pytest.mark.parametrize("keep", [None, [4, 0, 3]])
@pytest.mark.parametrize("grid", [(2, 3), (5, 1)])
def test_gradients(grid, keep, padding):
    encoding, positions = build(dim=2, padding=padding), grid64(grid, 1)
    positions = positions if keep is None else positions.keep(torch.tensor(keep))

    def forward(x, weight, bias):
        named = {"proj.weight": weight, "proj.bias": bias}
        return torch.func.functional_call(encoding, named, (x, positions))

    inputs = [tokens(positions, 1, 2).requires_grad_(), encoding.proj.weight, encoding.proj.bias]
    assert torch.autograd.gradcheck(forward, inputs)


def test_order_of_the_tokens_does_not_matter():
    encoding, positions = build(), grid64((3, 5), 1)
    x, order = tokens(positions), torch.randperm(15, generator=torch.Generator().manual_seed(2))
    rows = torch.cat([torch.zeros(1, dtype=torch.long), 1 + order])
    assert (encoding(x[:, rows], positions.keep(order)) - encoding(x, positions)[:, rows]).abs().max() < 1e-12
