"""Bias index tables and shift masks, against their definitions by brute force."""

import itertools

import pytest
import torch
from timm.models.swin_transformer import SwinTransformerBlock, get_relative_position_index

import visionpos as vp
from visionpos.windows import window_partition, window_reverse

WINDOWS = list(itertools.product(range(1, 13), range(1, 13)))


def index_faults(index: torch.Tensor, h: int, w: int) -> int:
    """How many (query, key) pairs of an index table break the definition; 0 for a right one.

    The definition: rows numbered by offset (dy, dx), query minus key, dy first, both from most negative to most
    positive. So the index depends on the offset alone, and different offsets have different indices.
    """
    numbers = {offset: n for n, offset in enumerate(itertools.product(range(1 - h, h), range(1 - w, w)))}
    cells = list(itertools.product(range(h), range(w)))
    want = [[numbers[qy - ky, qx - kx] for ky, kx in cells] for qy, qx in cells]
    return int((index != torch.tensor(want)).sum())


@pytest.mark.parametrize(("h", "w"), WINDOWS)
def test_relative_position_index_is_its_definition(h, w):
    index = vp.relative_position_index((h, w))
    assert index.dtype == torch.int64
    assert index.shape == (h * w, h * w)
    assert index_faults(index, h, w) == 0
    assert index.unique().numel() == (2 * h - 1) * (2 * w - 1)
    assert (index + index.T == (2 * h - 1) * (2 * w - 1) - 1).all()
    assert torch.equal(index, get_relative_position_index(h, w))


def test_a_wrong_stride_is_caught_on_every_window_that_is_not_square():
    """The classic mistake, (2h - 1) in place of (2w - 1): perfect on squares, so squares alone prove nothing."""
    for h, w in WINDOWS:
        y, x = torch.arange(h * w) // w, torch.arange(h * w) % w
        mutant = (y[:, None] - y + h - 1) * (2 * h - 1) + (x[:, None] - x + w - 1)
        assert (index_faults(mutant, h, w) > 0) == (h != w and h > 1), (h, w)


def test_golden_indices():
    assert vp.relative_position_index((2, 2)).tolist() == [[4, 3, 1, 0], [5, 4, 2, 1], [7, 6, 4, 3], [8, 7, 5, 4]]
    index = vp.relative_position_index((2, 3))
    assert index[0].tolist() == [7, 6, 5, 2, 1, 0]
    assert index[5].tolist() == [14, 13, 12, 9, 8, 7]
    index = vp.relative_position_index((7, 7))
    assert index[0, :9].tolist() == [84, 83, 82, 81, 80, 79, 78, 71, 70]
    assert index[24, :7].tolist() == [126, 125, 124, 123, 122, 121, 120]
    assert (index[0, 48], index[48, 0], index.sum()) == (0, 168, 201684)
    assert (index.diagonal() == 84).all()


def brute_force_mask(feat_shape, window, shift):
    """Two tokens see each other if they are as far apart in the picture as in the window; padding goes on."""

    def row_or_column(place, size, shift):  # of the picture, at a place of the rolled and padded axis
        return place + shift if place < size - shift or not shift else place + shift - size

    padded = [size + -size % w for size, w in zip(feat_shape, window, strict=True)]
    masks = []
    for wy, wx in itertools.product(range(padded[0] // window[0]), range(padded[1] // window[1])):
        places = itertools.product(range(window[0]), range(window[1]))
        places = [(wy * window[0] + y, wx * window[1] + x) for y, x in places]
        moved = [[row_or_column(*each) - each[0] for each in zip(p, feat_shape, shift, strict=True)] for p in places]
        masks.append([[a != b for b in moved] for a in moved])
    return torch.tensor(masks)


def random_cases(count):
    generator = torch.Generator().manual_seed(0)

    def draw(low, high):
        return int(torch.randint(low, high + 1, (), generator=generator))

    cases = []
    while len(cases) < count:
        window = draw(1, 5), draw(1, 5)
        feat_shape = tuple(draw(w, 4 * w) for w in window)
        shift = tuple(draw(0, w - 1) if size > w else 0 for size, w in zip(feat_shape, window, strict=True))
        cases.append((feat_shape, window, shift))
    return cases


@pytest.mark.parametrize(("feat_shape", "window", "shift"), random_cases(200))
def test_shift_mask_against_region_labels(feat_shape, window, shift):
    mask = vp.shifted_window_mask(feat_shape, window, shift)
    hidden = brute_force_mask(feat_shape, window, shift)
    assert mask.shape == hidden.shape
    assert torch.equal(mask == float("-inf"), hidden)
    assert torch.equal(mask == 0, ~hidden)
    assert (mask.diagonal(dim1=1, dim2=2) == 0).all()  # a token always sees itself, so -inf makes no NaN


@pytest.mark.parametrize(("feat_shape", "window", "shift"), [((8, 12), (4, 4), (2, 2)), ((6, 9), (2, 3), (1, 1))])
def test_shift_mask_against_timm(feat_shape, window, shift):
    block = SwinTransformerBlock(8, feat_shape, num_heads=1, window_size=window, shift_size=shift)
    assert torch.equal(block.attn_mask != 0, vp.shifted_window_mask(feat_shape, window, shift) != 0)


def test_shift_mask_golden_and_padding():
    hidden = vp.shifted_window_mask((4, 4), (2, 2), (1, 1)) != 0
    assert hidden.sum((1, 2)).tolist() == [0, 8, 8, 12]
    assert vp.shifted_window_mask((5, 7), (3, 4), (1, 2)).shape == (4, 12, 12)  # padded to 6 x 8, as timm does
    rows = vp.shifted_window_mask((8, 3), (7, 3), (3, 0))[0, ::3, 0]  # what row 3 sees of 3 4 5 6 7 0 1
    assert (rows == 0).tolist() == [True] * 5 + [False] * 2


@pytest.mark.parametrize(
    ("feat_shape", "window", "shift", "words"),
    [
        ((4, 6), (5, 2), (0, 0), "fit into the grid"),
        ((4, 6), (2, 2), (2, 0), "shift"),
        ((4, 6), (2, 2), (-1, 0), "shift"),
    ],
)
def test_shift_mask_errors(feat_shape, window, shift, words):
    with pytest.raises(ValueError, match=words):
        vp.shifted_window_mask(feat_shape, window, shift)


def test_partition_and_reverse():
    x = torch.randn(2, 6, 8, 3)
    windows = window_partition(x, (3, 2))
    assert windows.shape == (16, 6, 3)
    assert torch.equal(windows[5], x[0, 3:6, 2:4].reshape(6, 3))
    assert torch.equal(window_reverse(windows, (3, 2), (6, 8)), x)
    with pytest.raises(ValueError, match=r"\(4, 2\) does not divide the grid \(6, 8\)"):
        window_partition(x, (4, 2))


def test_windows_of_positions_follow_the_tokens():
    """Coordinates are partitioned exactly as tokens are, and the shift mask is where they are too far apart."""
    positions = vp.Positions.grid((6, 9))
    tokens = positions.coords.view(1, 6, 9, 2).roll((-1, -2), (1, 2))
    windows = positions.windows((2, 3), shift=(1, 2))
    assert torch.equal(windows.coords, window_partition(tokens, (2, 3)))
    delta = (windows.coords[:, :, None] - windows.coords[:, None]).abs()
    far = (delta >= torch.tensor([2, 3])).any(-1)
    assert torch.equal(far, vp.shifted_window_mask((6, 9), (2, 3), (1, 2)) != 0)
    assert vp.Positions.grid((4, 4)).windows((2, 2), (1, 1)).coords[3].tolist() == [[3, 3], [3, 0], [0, 3], [0, 0]]


def test_windows_of_a_subset_is_one_clear_line():
    with pytest.raises(ValueError, match="whole two-axis grid"):
        vp.Positions.grid((4, 6)).keep(torch.arange(5)).windows((2, 2))


@pytest.mark.parametrize("window", [(1, 4), (3, 5), (4, 2)])
def test_gradient_of_the_table_is_the_sum_over_pairs(window):
    encoding = vp.create_encoding("relative_table", num_heads=3, feat_shape=window).double()
    weight = torch.randn(3, window[0] * window[1], window[0] * window[1], dtype=torch.float64)
    positions = vp.Positions.grid(window)
    positions = vp.Positions(positions.coords.double(), window, is_grid=True)
    (encoding.bias(positions) * weight).sum().backward()
    index = vp.relative_position_index(window)
    want = torch.zeros_like(encoding.relative_position_bias_table)
    for q, k in itertools.product(range(len(index)), repeat=2):
        want[index[q, k]] += weight[:, q, k]
    assert (encoding.relative_position_bias_table.grad - want).abs().max() < 1e-12


def test_index_buffer_is_not_saved_and_comes_back_after_meta_initialisation():
    with torch.device("meta"):
        encoding = vp.create_encoding("relative_table", num_heads=2, feat_shape=(3, 4))
    assert list(encoding.state_dict()) == ["relative_position_bias_table"]
    encoding.to_empty(device="cpu")
    encoding.relative_position_index.fill_(-12345)
    encoding.reinit_buffers()
    assert torch.equal(encoding.relative_position_index, vp.relative_position_index((3, 4)))
