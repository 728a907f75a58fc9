"""Bugs that position code had elsewhere, 12 to 20: grids, windows and their tables.

Each test puts its bug back and must notice it. The others are in the other test_known_bugs files.
"""

import itertools
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from timm.layers import resample_abs_pos_embed

import visionpos as vp
from tests.bugs import SIZE, put_back, vit
from tests.small import pictures, swin
from visionpos import resize, windows
from visionpos.hosts import window_attention
from visionpos.input import learned

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
RIGHT_RESIZE = vp.resize_position_table


def interpolated(table, new_size, old_size, num_prefix_tokens=0, mode="bicubic", antialias=True):
    """What resized a table elsewhere: torch's interpolate."""
    prefix, patches = table.split([num_prefix_tokens, table.shape[1] - num_prefix_tokens], 1)
    grid = patches.unflatten(1, old_size).movedim(-1, 1)
    return torch.cat([prefix, F.interpolate(grid, new_size, mode=mode, antialias=antialias).flatten(2).mT], 1)


def test_bug_12_grid_off_by_one():
    def check():
        for old, new in itertools.product(range(1, 65), repeat=2):
            table = torch.arange(float(old)).square().view(1, old, 1)
            got = vp.resize_position_table(table, (1, new), (1, old), 0, "bilinear", False)
            want = F.interpolate(table.mT, new, mode="linear").mT
            assert got.shape == want.shape, (old, new)
            assert (got - want).abs().max() <= 2e-6 * want.abs().max(), (old, new)

    check()
    right = resize.resize_matrix

    def by_factor(new, old, *options):
        return right(max(1, int(old * (new / old))), old, *options)

    def with_a_tenth(new, old, *options):
        eye = torch.eye(old, dtype=torch.float64)[None]
        return F.interpolate(eye, scale_factor=(new + 0.1) / old, mode="linear", recompute_scale_factor=False)[0].T

    with put_back(resize, RuntimeError, resize_matrix=by_factor):
        check()
    with put_back(resize, resize_matrix=with_a_tenth):
        check()


def test_bug_13_grids_guessed_from_a_number_of_tokens():
    shapes = [(2, 8), (4, 4), (8, 2), (1, 16)]

    def check():
        for old, new in itertools.product(shapes, repeat=2):
            encoding = vp.create_encoding("learned", dim=3, feat_shape=old, num_prefix_tokens=1)
            rows = encoding.pos_embed[0, 1:].unflatten(0, old).double()
            matrices = [resize.resize_matrix(n, o) for n, o in zip(new, old, strict=True)]
            want = torch.einsum("Hh,hwc,Ww->HWc", matrices[0], rows, matrices[1]).flatten(0, 1)
            got = encoding.embed(vp.Positions.grid(new))
            assert torch.equal(got, rows.flatten(0, 1).float()) if old == new else (got - want).abs().max() < 1e-6

    check()
    with pytest.raises(ValueError, match="196 rows, but 1 prefix tokens and a grid of 14 x 14"):
        vp.resize_position_table(torch.zeros(1, 196, 4), (7, 7), (14, 14), num_prefix_tokens=1)

    def by_count(table, new, old, *options):
        return table if new[0] * new[1] == old[0] * old[1] else RIGHT_RESIZE(table, new, old, *options)

    with put_back(learned, resize_position_table=by_count):
        check()


def test_bug_14_interpolation_unlike_upstream():
    old, new = (8, 6), (5, 9)

    def check():
        table = torch.randn(1, 49, 4, generator=torch.Generator().manual_seed(0))
        want = resample_abs_pos_embed(table, new, old, num_prefix_tokens=1)
        assert (vp.resize_position_table(table, new, old, 1) - want).abs().max() < 5e-6  # timm
        for mode, antialias in (("bicubic", False), ("bilinear", True)):  # DeiT, MAE, Swin; SigLIP 2
            want = interpolated(table, new, old, 1, mode, antialias)
            assert (vp.resize_position_table(table, new, old, 1, mode, antialias) - want).abs().max() < 5e-6

    check()
    right, build = resize._kernel, resize.resize_matrix.__wrapped__  # without memory of the right ones
    with put_back(resize, _kernel=lambda x, mode, a: right(x, mode, -0.5), resize_matrix=build):  # ONNX's coefficient
        check()
    with put_back(resize, _kernel=lambda x, mode, a: right(x, mode, -0.75), resize_matrix=build):
        check()


def test_bug_15_antialias_in_low_precision():
    def check():
        for dtype in DTYPES[1:]:
            encoding = vp.create_encoding("learned", dim=4, feat_shape=(8, 6), num_prefix_tokens=1).to(dtype)
            got = encoding(torch.zeros(1, 46, 4, dtype=dtype), vp.Positions.grid((5, 9), 1))
            want = RIGHT_RESIZE(encoding.pos_embed.double(), (5, 9), (8, 6), 1)
            assert got.dtype == dtype
            assert (got - want).abs().max() <= torch.finfo(dtype).eps / 2 * want.abs().max()

    check()
    with put_back(learned, NotImplementedError, resize_position_table=interpolated):
        check()


@pytest.mark.slow
@pytest.mark.unhooked
def test_bug_16_export_of_one_size_only():
    """ONNX Runtime at other sizes: test_compile.py."""

    def check():
        model = vp.set_encoding(vit(dynamic_img_size=True), "learned+rope_axial+relative_table")
        dynamic = ({2: torch.export.Dim.DYNAMIC, 3: torch.export.Dim.DYNAMIC},)
        program = torch.export.export(model, (pictures((40, 56)),), dynamic_shapes=dynamic)
        assert "_aa" not in program.graph_module.print_readable(print_output=False), "other runtimes lack it"
        for size in (SIZE, (24, 40), (64, 48)):
            assert (program.module()(pictures(size)) - model(pictures(size))).abs().max() < 1e-5, size

    check()
    with put_back(learned, resize_position_table=interpolated):
        check()


class WhereTokensAre(vp.InputEncoding):
    """Holds the first two channels of every token against its coordinates."""

    name = "where_tokens_are"

    def forward(self, x, positions):
        assert torch.equal(x[0, positions.num_prefix_tokens :, :2], positions.coords)
        return x


@pytest.mark.parametrize("host", [vit, swin])
def test_bug_17_axes_swapped(host):
    """A picture in which every patch shows its row and its column."""
    model = host()
    model.patch_embed.norm = torch.nn.Identity()
    kernel = model.patch_embed.proj
    torch.nn.init.zeros_(kernel.bias)
    kernel.weight.data.zero_()
    kernel.weight.data[:2, :2] = torch.eye(2)[:, :, None, None] / 16  # the mean of a patch
    height, width = model.patch_embed.grid_size
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    picture = torch.stack([y, x, x])[None].float().repeat_interleave(4, -1).repeat_interleave(4, -2)
    vp.set_encoding(model, WhereTokensAre(kernel.out_channels))
    model(picture)
    right = vp.Positions.grid

    def swapped(feat_shape, *options, **more):
        positions = right(feat_shape, *options, **more)
        return replace(positions, coords=positions.coords.flip(-1))

    with put_back(vp.Positions, grid=swapped):
        model(picture)


def test_bug_18_stride_of_the_relative_index():
    def check():
        for h, w in itertools.product(range(1, 9), repeat=2):
            index = windows.relative_position_index((h, w))
            numbers = {offset: n for n, offset in enumerate(itertools.product(range(1 - h, h), range(1 - w, w)))}
            cells = list(itertools.product(range(h), range(w)))
            want = [[numbers[qy - ky, qx - kx] for ky, kx in cells] for qy, qx in cells]
            assert index.tolist() == want, (h, w)

    def wrong(window):
        (h, w), token = window, torch.arange(window[0] * window[1])
        y, x = token // w, token % w
        return (y[:, None] - y + h - 1) * (2 * h - 1) + (x[:, None] - x + w - 1)

    check()
    with put_back(windows, relative_position_index=wrong):
        check()


def far_apart(feat_shape, window, shift):
    """Pairs of a window that are no neighbours in the picture; the grid has two windows or more on each axis."""
    coords = vp.Positions.grid(feat_shape).windows(window, shift).coords
    return ((coords[:, :, None] - coords[:, None]).abs() >= torch.tensor(window)).any(-1)


def test_bug_19_shift_mask_of_another_size():
    def check():
        for feat_shape in ((8, 12), (12, 8), (8, 16), (16, 24)):
            for shift in ((2, 2), (1, 3), (0, 2)):
                hidden = windows.shifted_window_mask(feat_shape, (4, 4), shift) != 0
                assert torch.equal(hidden, far_apart(feat_shape, (4, 4), shift)), feat_shape

    check()
    right = windows.shifted_window_mask

    def of_one_size(feat_shape, window, shift):
        mask = right((8, 12), window, shift)
        return mask.repeat(feat_shape[0] * feat_shape[1] // 96 + 1, 1, 1)[: feat_shape[0] * feat_shape[1] // 16]

    with put_back(windows, shifted_window_mask=of_one_size):
        check()
    model = vp.set_encoding(swin(), "rope_axial")
    for size in ((96, 64), (64, 128)):
        model.set_input_size(size, window_size=4)
        for block in (block for stage in model.layers for block in stage.blocks if any(block.shift_size)):
            want = far_apart(tuple(block.input_resolution), tuple(block.window_size), tuple(block.shift_size))
            assert torch.equal(block.attn_mask != 0, want)


def test_bug_20_window_changed_and_table_not():
    def check():
        for old, new in ((4, 8), (8, 4), (4, (6, 10))):
            model = vp.set_encoding(swin(window_size=old), {"name": "relative_table", "init_std": 0.5})
            tables = [table.clone() for table in model.state_dict().values() if table.ndim == 2 and table.shape[1] == 2]
            model.set_input_size(model.patch_embed.img_size, window_size=new)
            fresh = swin(window_size=new)
            shapes = {key: value.shape for key, value in fresh.state_dict().items()}
            assert {key: value.shape for key, value in model.state_dict().items()} == shapes  # no derived buffers
            fresh.load_state_dict(model.state_dict(), strict=True)
            assert (fresh(pictures((64, 96))) - model(pictures((64, 96)))).abs().max() < 1e-6
            table = model.layers[0].blocks[0].attn.relative_position_bias_table
            sizes = [(size, size) if isinstance(size, int) else size for size in (new, old)]
            assert torch.equal(table, vp.resize_relative_table(tables[0], *sizes))

    def keeps_its_table(self, window_size):
        self.window_size, self.window_area = tuple(window_size), window_size[0] * window_size[1]

    check()
    with put_back(window_attention.WindowAttention, set_window_size=keeps_its_table):
        check()
