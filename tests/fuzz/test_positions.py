"""Positions of any coordinates, grids and indices: what a plain loop says, or one line."""

import pytest
import torch
from hypothesis import strategies as st

import visionpos as vp
from tests.fuzz.harness import JUNK, counts, fuzz, mostly

pytestmark = pytest.mark.unhooked

DTYPES = [torch.float32, torch.float64, torch.float16, torch.int64, torch.uint8, torch.bool, torch.complex64]
SIDES = st.integers(1, 6)
SHAPES = mostly(st.lists(mostly(SIDES, JUNK, 3), min_size=1, max_size=3).map(tuple), JUNK, 5)
PREFIX = mostly(st.integers(0, 3), JUNK, 10)


@st.composite
def tensors(draw, sides=SIDES):
    """A tensor of up to four axes, some of them empty, of any type; sometimes no tensor."""
    shape = draw(st.lists(mostly(sides, st.just(0), 8), max_size=4))
    dtype = draw(st.sampled_from(DTYPES))
    numbers = torch.randint(-3, 9, shape, generator=torch.Generator().manual_seed(draw(st.integers(0, 99))))
    return draw(mostly(st.just(numbers.to(dtype)), JUNK, 5))


def small(shape):
    """Whether a grid of this shape is small enough to be made; what is no shape is."""
    try:
        return all(n <= 64 or n > 2**62 for n in shape)
    except TypeError:
        return True


@counts(fast=1_050, slow=14_000)
def test_coordinates_of_any_kind(count, record_property):
    def attempt(coords, feat_shape, prefix):
        positions = vp.Positions(coords, feat_shape, prefix)
        assert positions.coords.dtype in (torch.float32, torch.float64)
        assert positions.num_tokens == positions.coords.shape[-2] + prefix
        assert torch.equal(positions.coords, coords.to(positions.coords.dtype))
        doubled = positions.rescale(tuple(2 * side - 1 for side in feat_shape))  # as many steps, halved
        ratio = torch.tensor([2.0 if side > 1 else 0.0 for side in feat_shape])
        want = positions.coords if max(feat_shape) == 1 else positions.coords * ratio
        assert torch.equal(doubled.coords, want.to(positions.coords.dtype))

    fuzz(
        attempt,
        count,
        record_property,
        fields=["coords", "feat_shape", "num_prefix_tokens"],
        coords=tensors(),
        feat_shape=SHAPES.filter(small),
        prefix=PREFIX,
    )


@counts(fast=1_050, slow=14_000)
def test_grids_indices_and_windows_of_any_kind(count, record_property):
    def attempt(shape, prefix, index, window, shift):
        positions = vp.Positions.grid(shape, prefix)
        cells = torch.cartesian_prod(*(torch.arange(side) for side in shape)).reshape(-1, len(shape))
        assert torch.equal(positions.coords, cells.float())
        assert positions.num_prefix_tokens == prefix
        cut = positions.windows(window, shift)
        assert sorted(map(tuple, cut.coords.flatten(0, 1).tolist())) == sorted(map(tuple, cells.tolist()))
        kept = positions.keep(index)
        assert torch.equal(kept.coords, cells[index.long()].float())
        assert kept.num_prefix_tokens == prefix

    pair = st.tuples(SIDES, SIDES)
    fuzz(
        attempt,
        count,
        record_property,
        fields=["index", "feat_shape", "num_prefix_tokens", "window", "shift"],
        shape=SHAPES.filter(small),
        prefix=PREFIX,
        index=tensors(),
        window=mostly(st.just((1, 1)) | pair, JUNK, 10),
        shift=mostly(st.just((0, 0)) | pair, JUNK, 10),
    )
