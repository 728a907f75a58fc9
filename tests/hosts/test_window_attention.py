"""Window attention and the way into windows, each against the plain version that defines it: timm's block."""

import copy
import itertools
import math

import pytest
import torch
from timm.models.swin_transformer import SwinTransformerBlock
from timm.models.swin_transformer_v2 import SwinTransformerV2Block

import visionpos as vp
from tests.small import needs_newer_timm
from tests.small import swin as small_swin
from visionpos.hosts import swin, swin_v2
from visionpos.positions import Positions
from visionpos.windows import TakeTokens, window_order, window_partition, window_reverse

CPU = torch.device("cpu")
WINDOW, DIM, HEADS = (2, 3), 8, 2
SHIFTS = list(itertools.product(range(2), range(3)))
GRIDS = [(4, 9), (5, 7)]  # the second is no multiple of the window


def timm_block(kind, grid, shift):
    """A block of timm's; shifts on one axis alone are not among those that it makes itself."""
    torch.manual_seed(0)
    padded = [size + -size % window for size, window in zip(grid, WINDOW, strict=True)]
    block = kind(DIM, padded, num_heads=HEADS, window_size=WINDOW, shift_size=shift)
    block.input_resolution = grid
    with torch.no_grad():
        for name, parameter in block.attn.named_parameters():
            if "logit_scale" not in name:
                parameter.normal_() if "table" in name else parameter.mul_(2)
    return block


def converted(block, host):
    block = copy.deepcopy(block)
    host.wrap_block(block)
    return block


def results(block, x):
    """Output of windows, attention and the way back, gradients of the tokens and of every parameter."""
    x = x.clone().requires_grad_()
    out = block._attn(x)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(2))
    return out, torch.autograd.grad((out * weights).sum(), [x, *block.attn.parameters()])


def tokens(grid, images=2):
    return torch.randn(images, *grid, DIM, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("shift", SHIFTS)
@pytest.mark.parametrize("grid", GRIDS)
def test_swin_block_is_timms_to_the_last_bit(grid, shift):
    theirs = timm_block(SwinTransformerBlock, grid, shift)
    ours = converted(theirs, swin.HOST)
    (want, gradients), (got, found) = results(theirs, tokens(grid)), results(ours, tokens(grid))
    assert torch.equal(got, want)
    names = [name for name, _ in theirs.attn.named_parameters()]
    assert [name for name, _ in ours.attn.named_parameters()] == names
    assert all((a - b).abs().max() <= 1e-5 * b.abs().max() for a, b in zip(found, gradients, strict=True))
    assert found[1 + names.index("relative_position_bias_table")].abs().max() > 1e-3


@pytest.mark.parametrize("tau", [10, 32, 33, 100])
@pytest.mark.parametrize("shift", SHIFTS[::2])
@pytest.mark.parametrize("grid", [GRIDS[0], pytest.param(GRIDS[1], marks=needs_newer_timm)])
def test_swin_v2_block_agrees_with_timms(grid, shift, tau):
    """With a tau of 100, timm's -100 does not hide a key fully; such models are trained so."""
    theirs = timm_block(SwinTransformerV2Block, grid, shift)
    with torch.no_grad():
        theirs.attn.logit_scale[1].fill_(math.log(tau))
    ours = converted(theirs, swin_v2.HOST)
    (want, gradients), (got, found) = results(theirs, tokens(grid)), results(ours, tokens(grid))
    assert (got - want).abs().max() <= 1e-6 * want.abs().max()
    by_name = dict(zip(["x", *dict(ours.attn.named_parameters())], found, strict=True))
    for name, b in zip(["x", *dict(theirs.attn.named_parameters())], gradients, strict=True):
        assert (by_name[name] - b).abs().max() <= 1e-4 * b.abs().max(), name


@pytest.mark.parametrize("shift", SHIFTS[::5])
@torch.no_grad()
def test_bfloat16_costs_no_more_accuracy_than_in_timm(shift):
    """Biases stay in float32, as in timm; v1 has timm's bits."""
    for kind, host in ((SwinTransformerBlock, swin.HOST), (SwinTransformerV2Block, swin_v2.HOST)):
        theirs = timm_block(kind, GRIDS[0], shift)
        for name, parameter in theirs.attn.named_parameters():
            if "bias_table" in name or "cpb_mlp.2" in name:
                parameter.mul_(5)  # large logits, as after training
        ours, x = converted(theirs, host), tokens(GRIDS[0], 8)
        exact = theirs._attn(x)
        with torch.autocast("cpu", torch.bfloat16):
            want, got = theirs._attn(x), ours._attn(x)
        if kind is SwinTransformerBlock:
            assert torch.equal(got, want)
        assert (got - exact).norm() <= 1.05 * (want - exact).norm()
        assert ours.bfloat16()._attn(x.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("host", [swin.HOST, swin_v2.HOST], ids=["v1", "v2"])
@pytest.mark.parametrize("images", [1, 3])
def test_fused_attention_agrees(host, images):
    kind = SwinTransformerBlock if host is swin.HOST else SwinTransformerV2Block
    block = converted(timm_block(kind, GRIDS[0], (1, 2)), host).eval()
    with torch.no_grad():
        plain = block._attn(tokens(GRIDS[0], images))
        block.attn.fused_attn = True
        assert 0 < (block._attn(tokens(GRIDS[0], images)) - plain).abs().max() < 1e-5


@pytest.mark.parametrize("host", [swin.HOST, swin_v2.HOST], ids=["v1", "v2"])
@pytest.mark.parametrize("name", ["none", "rope_axial", "alibi2d", "shaw", "irpe", "pape", "lepe"])
def test_windows_of_a_batch_are_those_of_each_image(name, host):
    """Shift masks and biases of any kind meet the right windows: several images, one, and both paths agree."""
    kind = SwinTransformerBlock if host is swin.HOST else SwinTransformerV2Block
    block = converted(timm_block(kind, GRIDS[0], (1, 1)), host).eval()
    options = {"num_heads": HEADS, "head_dim": DIM // HEADS, "dim": DIM, "feat_shape": WINDOW}
    info = vp.encoding_info(name)
    options = {key: value for key, value in options.items() if key in [*info["required"], *info["options"]]}
    encoding = vp.create_encoding(name, **options)
    with torch.no_grad():
        for parameter in encoding.parameters():
            parameter.normal_()
        block.attn.encodings = torch.nn.ModuleList([] if name == "none" else [encoding])
        x = tokens(GRIDS[0], 3)
        together = block._attn(x)
        assert (together - torch.cat([block._attn(image[None]) for image in x])).abs().max() < 1e-5
        block.attn.fused_attn = True
        assert (together - block._attn(x)).abs().max() < 1e-5
        block.attn_mask = torch.zeros_like(block.attn_mask)
        assert (together - block._attn(x)).abs().max() > 1e-3


@pytest.mark.parametrize("host", [swin.HOST, swin_v2.HOST], ids=["v1", "v2"])
@torch.no_grad()
def test_what_windows_remember_is_never_stale(host):
    """In eval mode bias plus mask is computed once; whatever it was made of, a change in it is seen."""
    kind = SwinTransformerBlock if host is swin.HOST else SwinTransformerV2Block
    block, x = converted(timm_block(kind, GRIDS[0], (1, 2)), host).eval(), tokens(GRIDS[0])

    def changes():
        old, new = block._attn(x), copy.deepcopy(block)._attn(x)  # copies remember nothing
        assert torch.equal(block._attn(x), old)
        assert torch.equal(old, new)
        return old

    seen = [changes()]
    for parameter in [each for name, each in block.attn.named_parameters() if "table" in name or "mlp" in name][:1]:
        parameter.data.mul_(3)
    seen.append(changes())
    block.attn_mask[0, 0, 1] = -torch.inf
    seen.append(changes())
    block.attn_mask = torch.zeros_like(block.attn_mask)
    seen.append(changes())
    if host is swin_v2.HOST:
        block.attn_mask = block.attn_mask.masked_fill(vp.shifted_window_mask(GRIDS[0], WINDOW, (1, 2)) != 0, -torch.inf)
        seen.append(changes())
        block.attn.logit_scale.data.fill_(math.log(100))  # hidden keys are seen, a little
        seen.append(changes())
    assert all((a - b).abs().max() > 1e-6 for a, b in itertools.pairwise(seen))


def test_hidden_keys_get_exactly_nothing():
    """Probabilities of e^-100 are denormal numbers, many times slower than others."""
    block = timm_block(SwinTransformerBlock, GRIDS[0], (1, 1))
    assert sorted(block.attn_mask.unique().tolist()) == [-100, 0]
    mask = converted(block, swin.HOST).attn_mask
    assert torch.equal(mask, vp.shifted_window_mask(GRIDS[0], WINDOW, (1, 1)))
    assert mask.softmax(-1)[mask != 0].abs().max() == 0


@pytest.mark.parametrize("shift", SHIFTS)
@pytest.mark.parametrize("grid", GRIDS)
def test_way_into_windows_and_back(grid, shift):
    """One gather each way is roll, padding and partition, and reverse, crop and roll; so are the gradients."""
    order, place = window_order(grid, WINDOW, shift, CPU)
    x = tokens(grid).double().requires_grad_()
    pad = [-size % window for size, window in zip(grid, WINDOW, strict=True)]
    rolled = torch.nn.functional.pad(x.roll((-shift[0], -shift[1]), (1, 2)), (0, 0, 0, pad[1], 0, pad[0]))
    want = window_partition(rolled, WINDOW)
    got = TakeTokens.apply(x.flatten(1, 2), order, place)
    assert torch.equal(got.view(want.shape), want)
    weights = torch.randn_like(want)
    gradients = [torch.autograd.grad((y.view(want.shape) * weights).sum(), x)[0] for y in (got, want)]
    assert torch.equal(*gradients)

    windows = torch.randn_like(want).requires_grad_()
    padded = tuple(size + more for size, more in zip(grid, pad, strict=True))
    want = window_reverse(windows, WINDOW, padded)[:, : grid[0], : grid[1]].roll(shift, (1, 2))
    got = TakeTokens.apply(windows.view(2, -1, DIM), place, order).view(want.shape)
    assert torch.equal(got, want)
    weights = torch.randn_like(want)
    gradients = [torch.autograd.grad((y * weights).sum(), windows)[0] for y in (got, want)]
    assert torch.equal(*gradients)


def test_gradient_of_the_gradient():
    order, place = window_order((3, 4), (2, 3), (1, 1), CPU)
    x = torch.randn(2, 12, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda x: TakeTokens.apply(x, order, place).square(), x)


def test_windows_of_coordinates_and_of_tokens_have_one_order():
    order, _ = window_order((4, 9), (2, 3), (1, 2), CPU)
    grid = Positions.grid((4, 9))
    assert torch.equal(grid.coords[order], grid.windows((2, 3), (1, 2)).coords.flatten(0, 1))


def test_order_that_was_first_asked_for_in_inference_mode_serves_training():
    grid, window = (14, 22), (2, 11)
    with torch.inference_mode():
        order, place = window_order(grid, window, (1, 5), CPU)
    x = torch.randn(1, 14 * 22, 3, requires_grad=True)
    TakeTokens.apply(x, order, place).sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x))


def rows_and_columns_seen(block, grid):
    """Which rows and columns change when the first row does, and when the first column does."""
    x = tokens(grid, images=1)
    seen = []
    for axis in (1, 2):
        changed = x.clone()
        changed.select(axis, 0).neg_()
        with torch.no_grad():
            change = (block._attn(changed) - block._attn(x)).abs().amax((0, 3 - axis, 3))
        seen.append([index for index, value in enumerate(change.tolist()) if value > 1e-7])
    return seen


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize(
    ("name", "own"),
    [
        ("swin_tiny_patch4_window7_224", "relative_table"),
        pytest.param("swinv2_tiny_window8_256", "log_cpb", marks=needs_newer_timm),
    ],
)
def test_no_encoding_but_timms_own_sees_across_the_border(name, own, dynamic):
    """Grid (16, 23) in windows of (5, 6): timm rolls before it pads, and lets the last rows see the first."""
    options = {"img_size": (64, 92), "window_size": (5, 6), "strict_img_size": not dynamic, "depths": (2,)}
    model = small_swin(name=name, **{**options, "num_heads": (2,), "embed_dim": DIM})
    plain, block = copy.deepcopy(model.layers[0].blocks[1]), model.layers[0].blocks[1]
    assert block.shift_size == (2, 3)
    leak = rows_and_columns_seen(plain, (16, 23))
    assert [max(each) for each in leak] == [15, 22]
    for spec in ("rope_axial", "alibi2d", "none", f"{own}+rope_axial", "learned+rope_axial"):
        vp.set_encoding(model, spec)
        assert rows_and_columns_seen(block, (16, 23)) == [[0], [0, 1, 2]], spec
        assert not model.sees_across_border()
    vp.set_encoding(model, own)
    assert rows_and_columns_seen(block, (16, 23)) == leak
    assert model.sees_across_border()
    model.set_input_size((80, 96), window_size=(5, 6))
    assert not model.sees_across_border()  # windows divide the grid (20, 24)
    vp.set_encoding(model, "alibi2d")
    model.set_input_size((64, 92), window_size=(5, 6))
    assert rows_and_columns_seen(block, (16, 23)) == [[0], [0, 1, 2]]
