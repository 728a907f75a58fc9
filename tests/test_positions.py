import pytest
import torch

import visionpos as vp


def test_grid_is_row_major_y_first():
    positions = vp.Positions.grid((2, 3), num_prefix_tokens=1)
    assert positions.coords.tolist() == [[0, 0], [0, 1], [0, 2], [1, 0], [1, 1], [1, 2]]
    assert positions.coords.dtype == torch.float32
    assert (positions.feat_shape, positions.num_prefix_tokens) == ((2, 3), 1)
    assert (positions.num_patches, positions.num_tokens, positions.is_batched) == (6, 7, False)


def test_grids_of_one_and_three_axes():
    assert vp.Positions.grid((4,)).coords.tolist() == [[0], [1], [2], [3]]
    assert vp.Positions.grid((2, 2, 3)).coords[7].tolist() == [1, 0, 1]


def test_keep_takes_any_order_per_sample_or_shared():
    positions = vp.Positions.grid((3, 5), num_prefix_tokens=2)
    index = torch.tensor([[14, 0, 7], [3, 3, 1]])
    kept = positions.keep(index)
    assert kept.coords.tolist() == [[[2, 4], [0, 0], [1, 2]], [[0, 3], [0, 3], [0, 1]]]
    assert (kept.feat_shape, kept.num_prefix_tokens, kept.num_tokens, kept.is_batched) == ((3, 5), 2, 5, True)
    assert torch.equal(positions.keep(index[0]).coords, kept.coords[0])
    assert torch.equal(kept.keep(torch.tensor([[2], [0]])).coords, kept.coords[[0, 1], [2, 0]][:, None])


def test_rescale_keeps_the_corners():
    positions = vp.Positions.grid((5, 9)).rescale((3, 5))
    assert positions.feat_shape == (3, 5)
    assert positions.coords[0].tolist() == [0, 0]
    assert positions.coords[-1].tolist() == [2, 4]
    assert positions.coords[10].tolist() == [0.5, 0.5]
    same = vp.Positions.grid((3, 5))
    assert same.rescale((3, 5)) is same
    assert vp.Positions.grid((1, 4)).rescale((3, 4)).coords[:, 0].tolist() == [0, 0, 0, 0]


def test_float64_coordinates_stay_float64_and_others_become_float32():
    coords = torch.zeros(4, 2)
    assert vp.Positions(coords.double(), (2, 2)).coords.dtype == torch.float64
    assert vp.Positions(coords.half(), (2, 2)).coords.dtype == torch.float32
    assert vp.Positions(coords.long(), (2, 2)).coords.dtype == torch.float32


@pytest.mark.unhooked
@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: vp.Positions(torch.zeros(4), (2, 2)), "coords must have shape"),
        (lambda: vp.Positions(torch.zeros(4, 2), (4,)), "feat_shape must be 2 positive integers"),
        (lambda: vp.Positions.grid((0, 3)), "feat_shape must be 2 positive integers"),
        (lambda: vp.Positions.grid((2, 3), num_prefix_tokens=-1), "num_prefix_tokens must be 0 or more"),
        (lambda: vp.Positions.grid((4, 6)).windows((3, 2)), "does not divide the grid"),
    ],
)
def test_errors(make, words):
    with pytest.raises(ValueError, match=words):
        make()


def test_no_field_is_lost_on_the_way():
    """Fields set aside of the constructor's would be."""
    start = vp.Positions.grid((3, 5), num_prefix_tokens=2)
    for positions in (
        start,
        start.keep(torch.tensor([14, 0, 7])),
        start.keep(torch.tensor([14, 0, 7])).keep(torch.tensor([2])),
    ):
        for moved in (positions.to("meta"), positions.promote(torch.float64)):
            assert vars(moved).keys() == vars(positions).keys()
            for key, value in vars(positions).items():
                same = moved.coords.shape == value.shape if key == "coords" else vars(moved)[key] == value
                assert same, key


def test_it_shows_sizes_and_not_hundreds_of_numbers():
    positions = vp.Positions.grid((14, 10), num_prefix_tokens=2)
    assert repr(positions) == "Positions(feat_shape=(14, 10), num_prefix_tokens=2, is_grid=True)"
    assert repr(positions.keep(torch.arange(3))).endswith("is_grid=False)")
