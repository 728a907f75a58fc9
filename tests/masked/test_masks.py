"""Which patches are hidden: how many, how they lie, and that they can be put back in order."""

import pytest
import torch

import visionpos as vp

RATIOS = [0, 0.25, 0.5, 0.6, 0.75, 0.95]
GRIDS = [(4, 6), (1, 5), (7, 3), (14, 10)]
MASKINGS = ["random", "block", "grid"]
KEPT = {  # patches that stay visible, in the order of RATIOS: (1 - ratio) of all rounded down, and at least one
    (4, 6): [24, 18, 12, 9, 6, 1],
    (1, 5): [5, 3, 2, 2, 1, 1],
    (7, 3): [21, 15, 10, 8, 5, 1],
    (14, 10): [140, 105, 70, 56, 35, 7],
}


def draw(shape=(8, 12), batch=64, ratio=0.75, masking="random", seed=0, **options):
    return vp.draw_mask(shape, batch, ratio, masking, torch.Generator().manual_seed(seed), **options)


@pytest.mark.parametrize("masking", MASKINGS)
@pytest.mark.parametrize("shape", GRIDS, ids=str)
def test_every_patch_is_visible_or_hidden_and_can_be_put_back(shape, masking):
    for ratio, kept in zip(RATIOS, KEPT[shape], strict=True):
        keep, restore, hidden = draw(shape, 5, ratio, masking)
        patches = shape[0] * shape[1]
        assert keep.shape == (5, kept)
        assert hidden.dtype == torch.bool
        assert restore.shape == hidden.shape == (5, patches)
        assert (hidden.sum(1) == patches - kept).all()
        assert not hidden.gather(1, keep).any()
        for sample in range(5):
            rest = torch.arange(patches)[hidden[sample]]
            assert sorted([*keep[sample].tolist(), *rest.tolist()]) == list(range(patches))
            visible_first = torch.argsort(restore[sample])  # the patches as a decoder gets them
            assert torch.equal(visible_first[:kept], keep[sample])
            assert torch.equal(visible_first[restore[sample]], torch.arange(patches))


@pytest.mark.parametrize("masking", MASKINGS)
def test_samples_differ_and_a_seed_is_a_mask(masking):
    first, again, other = draw(masking=masking), draw(masking=masking), draw(masking=masking, seed=1)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first.hidden, other.hidden)
    assert len({tuple(row) for row in first.keep.tolist()}) > 60
    torch.manual_seed(3)
    unseeded = vp.draw_mask((8, 12), 4, 0.75, masking)
    assert not torch.equal(unseeded.keep, vp.draw_mask((8, 12), 4, 0.75, masking).keep)
    torch.manual_seed(3)
    assert torch.equal(unseeded.keep, vp.draw_mask((8, 12), 4, 0.75, masking).keep)


@pytest.mark.parametrize("masking", MASKINGS)
@pytest.mark.parametrize("ratio", [0.25, 0.75])
def test_the_visible_patches_come_in_no_order(masking, ratio):
    """No model may learn a place from the order of its tokens."""
    keep = draw(batch=500, ratio=ratio, masking=masking).keep
    rising = (keep[:, 1:] > keep[:, :-1]).float().mean()
    assert 0.45 < rising < 0.55


def test_random_hides_every_patch_alike():
    draws = 4000
    share = draw((3, 5), draws, 0.6).hidden.float().mean(0)
    deviation = (0.6 * 0.4 / draws) ** 0.5
    assert (share - 0.6).abs().max() < 4.5 * deviation
    together = draw((3, 5), draws, 0.6).hidden.float()
    pairs = (together.T @ together / draws)[~torch.eye(15, dtype=torch.bool)]
    assert (pairs - 9 * 8 / (15 * 14)).abs().max() < 0.04  # nine of fifteen, without putting back


def alike(hidden, shape):
    """The share of neighbours, across and down, that are both hidden or both visible."""
    grid = hidden.unflatten(1, shape)
    across, down = grid[:, :, 1:] == grid[:, :, :-1], grid[:, 1:] == grid[:, :-1]
    return (across.float().mean() + down.float().mean()).item() / 2


@pytest.mark.parametrize("ratio", [0.25, 0.5, 0.75])
def test_block_hides_connected_areas(ratio):
    shape = (14, 10)
    random, block = (alike(draw(shape, 200, ratio, masking).hidden, shape) for masking in ("random", "block"))
    assert random == pytest.approx(ratio**2 + (1 - ratio) ** 2, abs=0.01)
    assert block > random + 0.15
    share = draw(shape, 2000, ratio, "block").hidden.float().mean(0)
    assert share.min() > 0.02  # corners, which few rectangles reach
    assert share.max() < 0.98


def test_grid_keeps_one_of_four_or_a_diagonal():
    for _, _, hidden in (draw((6, 8), 16, 0.75, "grid", seed=seed) for seed in range(3)):
        squares = (~hidden).unflatten(1, (3, 2, 4, 2)).sum((2, 4))
        assert (squares == 1).all()
        visible = (~hidden).unflatten(1, (6, 8)).nonzero()
        for sample in range(16):
            cells = visible[visible[:, 0] == sample, 1:]
            assert len({tuple(cell) for cell in (cells % 2).tolist()}) == 1
    _, _, hidden = draw((6, 8), 16, 0.5, "grid")
    assert alike(hidden, (6, 8)) == 0  # a chessboard


def test_the_generator_decides_where_the_mask_is_drawn():
    mask = draw(device="meta")
    assert {part.device.type for part in mask} == {"meta"}
    assert all(torch.equal(a, b) for a, b in zip(draw(device="cpu"), draw(), strict=True))


WRONG = [
    ({"ratio": 0.96}, "mask_ratio must lie between 0 and 0.95, got 0.96"),
    ({"ratio": -0.1}, "mask_ratio must lie between 0 and 0.95, got -0.1"),
    ({"ratio": float("nan")}, "mask_ratio must lie between 0 and 0.95, got nan"),
    ({"masking": "blocks"}, "masking must be one of random, block, grid, got 'blocks'"),
    ({"shape": (0, 5)}, "feat_shape must be 2 positive integers, got (0, 5)"),
    ({"shape": (4,)}, "feat_shape must be 2 positive integers, got (4,)"),
]


@pytest.mark.unhooked
@pytest.mark.parametrize(("options", "line"), WRONG, ids=str)
def test_errors_are_one_line(options, line):
    with pytest.raises(ValueError, match="must") as error:
        draw(**options)
    assert str(error.value) == line
