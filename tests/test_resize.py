"""Tables carried to other sizes, against torch's interpolation in float64 and golden values."""

import copy
import itertools

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.layers import resample_abs_pos_embed
from torch.fx.experimental.proxy_tensor import make_fx

import visionpos as vp
from visionpos import resize
from visionpos.resize import resize_matrix, sample_table

SIZES = [1, 2, 3, 5, 7, 8, 14, 16]
BUILD = resize_matrix.__wrapped__  # without memory


def reference(grid, size, mode, antialias):
    """(h, w, C) by torch, transposed where the output is one cell wide: there torch's antialias is wrong on the CPU."""
    x = grid.permute(2, 0, 1)[None]
    if size[1] == 1:
        return F.interpolate(x.transpose(2, 3), (1, size[0]), mode=mode, antialias=antialias)[0].permute(2, 1, 0)
    return F.interpolate(x, size, mode=mode, antialias=antialias)[0].permute(1, 2, 0)


@pytest.mark.parametrize("antialias", [True, False])
@pytest.mark.parametrize("mode", ["bicubic", "bilinear"])
def test_equals_interpolate_for_all_pairs_of_sizes(mode, antialias):
    for (h, w), (height, width) in itertools.product(zip(SIZES, reversed(SIZES), strict=True), repeat=2):
        grid = torch.randn(h, w, 3, dtype=torch.float64)
        got = vp.resize_position_table(grid.view(1, h * w, 3), (height, width), (h, w), 0, mode, antialias)
        want = reference(grid, (height, width), mode, antialias).reshape(1, height * width, 3)
        if 1 in (height, width) and h != 1 != w and antialias and height != width:
            want = torch.einsum(  # torch is wrong for one of the two; the matrices by themselves are tested below
                "Hh,hwc,Ww->HWc", resize_matrix(height, h, mode), grid, resize_matrix(width, w, mode)
            ).reshape(1, height * width, 3)
        assert (got - want).abs().max() < 1e-12, (h, w, height, width)


@pytest.mark.parametrize("mode", ["bicubic", "bilinear"])
@pytest.mark.parametrize("antialias", [True, False])
def test_matrix_of_every_length(mode, antialias):
    for old, new in itertools.product(range(1, 25), repeat=2):
        x = torch.eye(old, dtype=torch.float64)[:, None, None].expand(-1, 1, 2, -1)  # two rows: the sound case
        want = F.interpolate(x, (2, new), mode=mode, antialias=antialias)[:, 0, 0].T
        assert (resize_matrix(new, old, mode, antialias) - want).abs().max() < 1e-12, (old, new)


def test_one_cell_wide_output():
    """A ramp 6 x 1 -> 9 x 1 is the transpose of 1 x 6 -> 1 x 9, and not nine zeros."""
    ramp = torch.arange(6.0)[None, :, None]
    tall = vp.resize_position_table(ramp, (9, 1), (6, 1))
    wide = vp.resize_position_table(ramp, (1, 9), (1, 6))
    assert torch.equal(tall, wide)
    assert tall.flatten()[4] == pytest.approx(2.5)


def test_golden_values():
    table = torch.arange(4.0)[None, :, None]
    got = vp.resize_position_table(table, (3, 3), (2, 2)).flatten()
    want = [-0.19736797, 0.36842138, 0.93421096, 0.93421072, 1.5, 2.0657897, 2.0657899, 2.6315792, 3.1973689]
    assert got.tolist() == pytest.approx(want, abs=2e-6)
    got = vp.resize_position_table(table, (3, 3), (2, 2), antialias=False).flatten()
    want = [-0.26041681, 0.32638896, 0.91319442, 0.9131947, 1.5, 2.0868058, 2.0868058, 2.6736109, 3.260417]
    assert got.tolist() == pytest.approx(want, abs=2e-6)
    ramp = torch.arange(16.0)[None, :, None]
    assert vp.resize_position_table(ramp, (2, 2), (4, 4)).flatten().tolist() == pytest.approx(
        [2.934, 4.760, 10.240, 12.066], abs=1e-3
    )
    assert vp.resize_position_table(ramp, (2, 2), (4, 4), antialias=False).flatten().tolist() == pytest.approx(
        [2.031, 4.219, 10.781, 12.969], abs=1e-3
    )


@pytest.mark.parametrize(("old", "new"), [((14, 14), (16, 12)), ((7, 5), (5, 9)), ((4, 6), (8, 12))])
def test_equals_timm(old, new):
    table = torch.randn(1, 2 + old[0] * old[1], 16)
    want = resample_abs_pos_embed(table, new, old, num_prefix_tokens=2)
    assert (vp.resize_position_table(table, new, old, num_prefix_tokens=2) - want).abs().max() < 5e-6


@pytest.mark.parametrize(("old", "new"), [((8, 2), (4, 4)), ((2, 8), (4, 4)), ((4, 4), (1, 16)), ((1, 16), (2, 8))])
def test_equal_token_counts_are_not_equal_grids(old, new):
    table = torch.randn(1, 16, 4)
    assert not torch.equal(vp.resize_position_table(table, new, old), table)
    assert vp.resize_position_table(table, old, old) is table


def test_tables_in_a_stack_are_resized_one_by_one():
    tables = torch.randn(2, 3, 1 + 12, 5)
    got = vp.resize_position_table(tables, (5, 7), (3, 4), 1)
    alone = [[vp.resize_position_table(table, (5, 7), (3, 4), 1) for table in row] for row in tables]
    assert torch.allclose(got, torch.stack([torch.stack(row) for row in alone]), atol=1e-6)


@pytest.mark.unhooked  # wrong types on purpose
def test_sizes_that_are_no_pairs_are_named():
    for call, name in (
        (lambda: vp.resize_position_table(torch.randn(4, 3), 5, (2, 2)), "new_size"),
        (lambda: vp.resize_position_table(torch.randn(4, 3), (5, 2), 2), "old_size"),
        (lambda: vp.sincos_2d(14, 192), "feat_shape"),
        (lambda: vp.rope_angles_axial(14, 64), "feat_shape"),
    ):
        with pytest.raises(ValueError, match=f"^{name} must be .* positive integers, got "):
            call()


def test_prefix_rows_are_copied_and_dtype_kept():
    table = torch.randn(1, 3 + 15, 4).bfloat16()
    out = vp.resize_position_table(table, (6, 4), (3, 5), num_prefix_tokens=3)
    assert out.dtype == torch.bfloat16
    assert out.shape == (1, 27, 4)
    assert torch.equal(out[:, :3], table[:, :3])


def test_relative_table():
    table = torch.randn(5 * 9, 3)
    assert vp.resize_relative_table(table, (3, 5), (3, 5)) is table
    bicubic = vp.resize_relative_table(table, (4, 7), (3, 5))
    assert bicubic.shape == (7 * 13, 3)
    want = F.interpolate(table.double().T.view(1, 3, 5, 9), (7, 13), mode="bicubic").view(3, -1).T
    assert (bicubic - want).abs().max() < 1e-5
    for mode in ("bicubic", "geometric"):  # the centre, no offset, stays the centre
        assert (vp.resize_relative_table(table, (4, 7), (3, 5), mode)[7 * 13 // 2] - table[22]).abs().max() < 1e-5


def test_geometric_keeps_unit_steps_near_zero():
    ramp = (torch.arange(13.0) - 6).view(1, 13).expand(13, 13).reshape(-1, 1)  # bias = dx, window 7
    out = vp.resize_relative_table(ramp, (12, 12), (7, 7), "geometric").view(23, 23)[11]
    q = 1.240724  # solves 1 + q + ... + q^5 = 11
    assert out[11 : 11 + 2].tolist() == pytest.approx([0, 1], abs=1e-4)
    assert out[-1].item() == pytest.approx(6, abs=1e-3)
    assert out[13].item() == pytest.approx(1 + 1 / q, abs=1e-3)  # offset 2 lies 1 / q of the way from 1 to 1 + q
    stretched = vp.resize_relative_table(ramp, (12, 12), (7, 7)).view(23, 23)[11]
    assert abs(stretched[12].item() - 13 / 23) < 0.05  # bicubic stretches all offsets alike


@pytest.mark.unhooked
@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: vp.resize_position_table(torch.zeros(1, 17, 4), (2, 2), (4, 4)), "17 rows, but 0 prefix tokens and"),
        (lambda: vp.resize_position_table(torch.zeros(1, 16, 4), (2, 2), (4, 4), mode="cubic"), "mode must be"),
        (lambda: vp.resize_relative_table(torch.zeros(9, 4), (2, 2), (3, 3)), "9 rows, but a window of"),
        (lambda: vp.resize_relative_table(torch.zeros(9, 4), (3, 3), (2, 2), "linear"), "mode must be"),
    ],
)
def test_errors(call, words):
    with pytest.raises(ValueError, match=words):
        call()


def test_sample_table_is_exact_on_cells_linear_between_and_clamped_outside():
    table = torch.randn(3, 5, 2)
    grid = vp.Positions.grid((3, 5)).coords
    assert torch.equal(sample_table(table, grid), table.view(15, 2))
    half = sample_table(table, torch.tensor([[1.5, 2.25]]))
    want = 0.5 * (0.75 * table[1, 2] + 0.25 * table[1, 3]) + 0.5 * (0.75 * table[2, 2] + 0.25 * table[2, 3])
    assert (half - want).abs().max() < 1e-6
    assert torch.equal(sample_table(table, torch.tensor([[-3.0, 9.0]])), table[0, 4][None])


@pytest.fixture
def built(monkeypatch):
    """The sizes of every matrix that is built from now on; none is remembered yet."""
    sizes = []

    def counted(new, old, *options, **more):
        sizes.append((new, old, *options))
        return BUILD(new, old, *options, **more)

    monkeypatch.setattr(resize, "resize_matrix", resize._once_per_size(counted))
    return sizes


GRID = vp.Positions.grid((9, 4))


def learned():
    return vp.create_encoding("learned", dim=3, feat_shape=(5, 7), init_std=1.0)


def is_fresh(encoding, table):
    """Whether the table (1, 35, 3) that the encoding has now is what it carries to the grid."""
    rows, columns = (BUILD(*sizes) for sizes in ((9, 5), (4, 7)))
    want = torch.einsum("Hh,hwc,Ww->HWc", rows, table.detach().double().view(5, 7, 3), columns).flatten(0, 1)
    return (encoding.embed(GRID).detach().double() - want).abs().max() < 1e-6


def test_no_matrix_is_built_twice(built):
    encodings = learned(), vp.create_encoding("relative_table", num_heads=2, feat_shape=(5, 7), init_std=1.0)
    grids = GRID, vp.Positions.grid((6, 8))

    def results():
        return [result for grid in grids for result in (encodings[0].embed(grid), encodings[1].bias(grid))]

    first = results()
    assert len(built) == len(set(built)) == 2 * 2 * 2
    assert all(torch.equal(a, b) for a, b in zip(first, results(), strict=True))
    assert len(built) == 8
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=16, patch_size=4, embed_dim=12, depth=1, num_heads=3, dynamic_img_size=True
    )
    vp.set_encoding(model.train(), "learned")
    for _ in range(2):
        model(torch.randn(1, 3, 24, 8)).sum().backward()
    assert len(built) == 8 + 2


def test_remembered_matrices_leave_no_table_stale(built):
    encoding, other = learned(), learned()
    assert is_fresh(encoding, encoding.pos_embed)
    encoding.load_state_dict(other.state_dict())
    assert is_fresh(encoding, other.pos_embed)
    encoding.embed(GRID).square().sum().backward()
    torch.optim.SGD(encoding.parameters(), lr=0.1).step()
    assert not torch.equal(encoding.pos_embed, other.pos_embed)
    assert is_fresh(encoding, encoding.pos_embed)
    encoding.pos_embed.data.mul_(2)
    assert is_fresh(encoding, encoding.pos_embed)
    copied = copy.deepcopy(encoding)
    copied.pos_embed.data.zero_()
    assert copied.embed(GRID).abs().max() == 0
    assert is_fresh(encoding, encoding.pos_embed)
    assert is_fresh(encoding.double(), encoding.pos_embed)
    assert len(built) == 2


class Embed(torch.nn.Module):
    """What training does with an encoding's table, as a function of the table."""

    def __init__(self):
        super().__init__()
        self.encoding = learned()

    def forward(self):
        return self.encoding.embed(GRID).square().sum()


def loss(table):
    return torch.func.functional_call(Embed(), {"encoding.pos_embed": table})


@pytest.mark.parametrize(
    "before",
    [
        torch.inference_mode()(loss),
        torch.func.grad(loss),
        lambda table: torch.func.jvp(loss, (table,), (table,)),
        lambda table: make_fx(loss, tracing_mode="fake")(table),
    ],
    ids=["inference mode", "grad", "jvp", "trace"],
)
def test_a_matrix_first_built_elsewhere_is_of_use_in_training(built, before):
    table = torch.randn(1, 35, 3)
    before(table)
    table.requires_grad_()
    loss(table).backward()
    gradient = table.grad.clone()
    built.clear()
    loss(table).backward()
    assert not built
    assert torch.equal(table.grad, 2 * gradient)
    assert gradient.abs().max() > 0.1
