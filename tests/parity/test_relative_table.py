"""The relative position bias table in the dialects of Swin, BEiT, MaxViT and LeViT."""

import pytest
import timm
import torch
from timm.layers import RelPosBias, RelPosBiasTf
from timm.models.levit import Attention as LevitAttention
from timm.models.swin_transformer import WindowAttention

import visionpos as vp
from visionpos.bias.relative_table import PRESETS

GRIDS = [(2, 3), (3, 2), (1, 4), (4, 1), (3, 5)]


def positions_of(grid, whole=True, prefix=0):
    return vp.Positions(vp.Positions.grid(grid).coords.double(), grid, prefix, is_grid=whole)


def table_of(num_heads, grid, preset="swin", **options):
    torch.manual_seed(0)
    options = {"num_heads": num_heads, "feat_shape": grid, "preset": preset, "init_std": 0.5, **options}
    return vp.create_encoding("relative_table", **options).double()


def numbered(grid, preset="swin"):
    """A table in which every row holds its own number: the bias is the index."""
    encoding = table_of(1, grid, preset)
    with torch.no_grad():
        encoding.relative_position_bias_table[:, 0] = torch.arange(len(encoding.relative_position_bias_table))
    return encoding


def row_of(preset, dy, dx, grid):
    """The row of the table for one pair, (dy, dx) = query minus key."""
    h, w = grid
    if preset == "levit":
        return abs(dy) * w + abs(dx)
    sign = -1 if preset == "maxvit" else 1
    return (sign * dy + h - 1) * (2 * w - 1) + sign * dx + w - 1


GOLDEN = {
    ("swin", (2, 2)): [[4, 3, 1, 0], [5, 4, 2, 1], [7, 6, 4, 3], [8, 7, 5, 4]],
    ("maxvit", (2, 2)): [[4, 5, 7, 8], [3, 4, 6, 7], [1, 2, 4, 5], [0, 1, 3, 4]],
    ("levit", (2, 2)): [[0, 1, 2, 3], [1, 0, 3, 2], [2, 3, 0, 1], [3, 2, 1, 0]],
}


@pytest.mark.parametrize(("case", "want"), GOLDEN.items())
def test_golden_index(case, want):
    preset, grid = case
    encoding = numbered(grid, preset)
    assert encoding.relative_position_index.tolist() == want
    assert encoding.bias(positions_of(grid))[0].tolist() == want


def test_golden_index_swin():
    index = numbered((2, 3)).bias(positions_of((2, 3)))[0]
    assert index[0].tolist() == [7, 6, 5, 2, 1, 0]
    assert index[5].tolist() == [14, 13, 12, 9, 8, 7]
    index = numbered((7, 7)).bias(positions_of((7, 7)))[0]
    assert index[0, :9].tolist() == [84, 83, 82, 81, 80, 79, 78, 71, 70]
    assert index[24, :7].tolist() == [126, 125, 124, 123, 122, 121, 120]
    assert (index[0, 48], index[48, 0], index.sum()) == (0, 168, 201684)
    assert (index + index.T == 168).all()


def test_golden_index_beit():
    encoding = numbered((2, 2), "beit")
    assert len(encoding.relative_position_bias_table) == 12
    index = encoding.bias(positions_of((2, 2), prefix=1))[0]
    assert index[0].tolist() == [11, 9, 9, 9, 9]
    assert index[1:, 0].tolist() == [10] * 4
    assert index[1:, 1:].tolist() == GOLDEN["swin", (2, 2)]


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("preset", PRESETS)
def test_oracle(preset, grid, whole):
    encoding = table_of(3, grid, preset)
    table, count = encoding.relative_position_bias_table.detach(), grid[0] * grid[1]
    bias = encoding.bias(positions_of(grid, whole))
    for i in range(count):
        for j in range(count):
            row = row_of(preset, i // grid[1] - j // grid[1], i % grid[1] - j % grid[1], grid)
            assert encoding.relative_position_index[i, j] == row
            assert (bias[:, i, j] - table[row]).abs().max() < 1e-10


@pytest.mark.parametrize("prefix", [0, 1, 3])
@pytest.mark.parametrize("preset", PRESETS)
def test_prefix_tokens(preset, prefix):
    encoding, grid = table_of(2, (2, 3), preset), (2, 3)
    bias = encoding.bias(positions_of(grid, prefix=prefix))
    assert torch.equal(bias[:, prefix:, prefix:], encoding.bias(positions_of(grid)))
    to_patch, to_class, between = encoding.relative_position_bias_table[-3:] if preset == "beit" else torch.zeros(3, 2)
    assert (bias[:, :prefix, prefix:] == to_patch[:, None, None]).all()
    assert (bias[:, prefix:, :prefix] == to_class[:, None, None]).all()
    assert (bias[:, :prefix, :prefix] == between[:, None, None]).all()


def test_prefix_tokens_of_batches_and_of_other_keys():
    encoding, positions = table_of(2, (2, 3), "beit"), positions_of((2, 3), prefix=2)
    full = encoding.bias(positions)
    index = torch.tensor([[4, 0], [1, 5]])
    for sample, rows in zip(encoding.bias(positions.keep(index)), index, strict=True):
        rows = torch.cat([torch.arange(2), rows + 2])
        assert torch.allclose(sample, full[:, rows][:, :, rows])
    bare = encoding.bias(positions, keys=positions_of((2, 3)))
    assert torch.allclose(bare, full[:, :, 2:])


@pytest.mark.parametrize("window", GRIDS)
def test_equals_timm_swin(window):
    theirs = WindowAttention(24, num_heads=3, window_size=window).double()
    torch.nn.init.normal_(theirs.relative_position_bias_table)
    ours = table_of(3, window)
    ours.load_state_dict({"relative_position_bias_table": theirs.relative_position_bias_table})
    assert torch.equal(ours.bias(positions_of(window)), theirs._get_rel_pos_bias()[0])
    assert torch.equal(ours.relative_position_index.flatten(), theirs.relative_position_index.flatten())


@pytest.mark.parametrize("window", GRIDS)
@pytest.mark.parametrize("prefix", [0, 1])
def test_equals_timm_beit(window, prefix):
    theirs = RelPosBias(window, num_heads=3, prefix_tokens=prefix).double()
    torch.nn.init.normal_(theirs.relative_position_bias_table)
    ours = table_of(3, window, "beit" if prefix else "swin")
    ours.load_state_dict({"relative_position_bias_table": theirs.relative_position_bias_table})
    assert torch.equal(ours.bias(positions_of(window, prefix=prefix)), theirs.get_bias()[0])


@pytest.mark.parametrize("window", GRIDS)
def test_equals_timm_maxvit(window):
    theirs = RelPosBiasTf(window, num_heads=3).double()
    torch.nn.init.normal_(theirs.relative_position_bias_table)
    ours = table_of(3, window, "maxvit")
    ours.load_state_dict({"relative_position_bias_table": theirs.relative_position_bias_table.flatten(1).t()})
    assert (ours.bias(positions_of(window)) - theirs.get_bias()).abs().max() < 1e-12


@pytest.mark.parametrize("window", GRIDS)
def test_equals_timm_levit(window):
    theirs = LevitAttention(24, key_dim=8, num_heads=3, resolution=window).double()
    torch.nn.init.normal_(theirs.attention_biases)
    ours = table_of(3, window, "levit")
    ours.load_state_dict({"relative_position_bias_table": theirs.attention_biases.t()})
    assert torch.equal(ours.bias(positions_of(window)), theirs.get_attention_biases(torch.device("cpu")))


@pytest.mark.parametrize("interpolation", ["bicubic", "geometric"])
@pytest.mark.parametrize("new", [(4, 7), (2, 3), (3, 8)])
@pytest.mark.parametrize("preset", PRESETS)
def test_resizing_equals_swins(preset, new, interpolation):
    """Swin's table that gives the same bias gives the same bias on the other window."""
    old = (3, 5)
    encoding, swin = (table_of(2, old, name, interpolation=interpolation) for name in (preset, "swin"))
    h, w = old
    with torch.no_grad():
        table = encoding.relative_position_bias_table
        for dy in range(1 - h, h):
            for dx in range(1 - w, w):
                swin.relative_position_bias_table[row_of("swin", dy, dx, old)] = table[row_of(preset, dy, dx, old)]
    last = table[-3:].clone()
    assert torch.equal(encoding.bias(positions_of(old)), swin.bias(positions_of(old)))
    want, positions = swin.bias(positions_of(new)), positions_of(new)
    assert (encoding.bias(positions) - want).abs().max() < 1e-12
    encoding.set_feat_shape(new)
    assert (encoding.bias(positions) - want).abs().max() < 1e-12
    assert (encoding.bias(positions_of(new, whole=False)) - want).abs().max() < 1e-12
    fresh = table_of(2, new, preset)
    assert encoding.relative_position_bias_table.shape == fresh.relative_position_bias_table.shape
    assert torch.equal(encoding.relative_position_index, fresh.relative_position_index)
    if preset == "beit":
        assert torch.equal(encoding.relative_position_bias_table[-3:], last)


@pytest.mark.parametrize("preset", PRESETS)
def test_offsets_between_cells(preset):
    grid, encoding = (3, 4), table_of(2, (3, 4), preset)
    positions = vp.Positions(torch.tensor([[0.5, 2.25], [1.0, 1.0]], dtype=torch.float64), grid)
    table, want = encoding.relative_position_bias_table, 0.0
    for dy in (-1, 0):
        for dx, share in ((1, 0.75), (2, 0.25)):
            want = want + 0.5 * share * table[row_of(preset, dy, dx, grid)]
    assert (encoding.bias(positions)[:, 0, 1] - want).abs().max() < 1e-10


def test_levit_does_not_tell_left_from_right():
    bias = table_of(2, (3, 4), "levit").bias(positions_of((3, 4)))
    assert torch.equal(bias, bias.transpose(1, 2))
    bias = table_of(2, (3, 4), "swin").bias(positions_of((3, 4)))
    assert not torch.equal(bias, bias.transpose(1, 2))


INITIAL = [("swin", 45, 0.02), ("beit", 48, 0.0), ("maxvit", 45, 0.02), ("levit", 15, 0.0)]


@pytest.mark.parametrize(("preset", "rows", "std"), INITIAL)
def test_names_shapes_and_initial_weights(preset, rows, std):
    torch.manual_seed(0)
    encoding = vp.create_encoding("relative_table", num_heads=64, feat_shape=(3, 5), preset=preset)
    assert {n: tuple(v.shape) for n, v in encoding.state_dict().items()} == {"relative_position_bias_table": (rows, 64)}
    assert encoding.relative_position_bias_table.std().item() == pytest.approx(std, rel=0.1)
    assert set(dict(encoding.named_buffers())) == {"relative_position_index"}
    assert encoding.interpolation == ("geometric" if preset == "beit" else "bicubic")


@pytest.mark.parametrize("preset", PRESETS)
def test_lives_where_swin_has_its_table(preset):
    model = timm.create_model(
        "swin_tiny_patch4_window7_224",
        img_size=(32, 48),
        window_size=(4, 3),
        depths=(2,),
        num_heads=(3,),
        num_classes=4,
    )
    vp.set_encoding(model, {"name": "relative_table", "preset": preset, "init_std": 0.5})
    name = "layers.0.blocks.1.attn.relative_position_bias_table"
    assert name in model.state_dict()
    model.set_input_size(img_size=(40, 48), window_size=(5, 4))
    encoding = vp.get_encoding(model)[1]
    assert encoding.feat_shape == (5, 4)
    assert encoding.relative_position_bias_table is dict(model.named_parameters())[name]
    model.eval()(torch.randn(1, 3, 40, 48)).square().sum().backward()
    assert encoding.relative_position_bias_table.grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"preset": "coatnet"}, "preset must be one of 'swin', 'beit', 'maxvit', 'levit', got 'coatnet'"),
        ({"interpolation": "linear"}, "interpolation must be one of 'bicubic', 'geometric'"),
        ({"feat_shape": (0, 3)}, r"must be two positive integers \(one or three on as many axes\), got \(0, 3\)"),
    ],
)
def test_errors(options, message):
    with pytest.raises(ValueError, match=message):
        vp.create_encoding("relative_table", **{"num_heads": 2, "feat_shape": (2, 3), **options})


def test_queries_and_keys_on_different_grids():
    with pytest.raises(ValueError, match="queries and keys must live on one grid"):
        table_of(2, (2, 3)).bias(positions_of((2, 3)), keys=positions_of((3, 3)))
