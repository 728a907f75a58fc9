"""Positions that cannot be meant: one line each that names the field, what was given and what is accepted."""

import re

import pytest
import torch

import visionpos as vp
from visionpos.encoding import LayerFacts
from visionpos.registry import get_encoding_class, required_options

FACTS = LayerFacts(dim=48, feat_shape=(3, 5), num_heads=2, head_dim=24, layer=0, depth=2)
ENCODINGS = [name for name in vp.list_encodings() if name != "none"]
ANY_AXES = {"sinusoidal", "sincos2d", "scalar", "binary", "rope1d", "rope_axial", "rope_golden"}
ANY_AXES |= {"alibi", "alibi2d", "kerple", "fire"}


def build(name):
    return vp.create_encoding(name, **required_options(get_encoding_class(name), FACTS))


def use(encoding, positions):
    """The encoding's forward pass on tokens of fitting shapes."""
    tokens = positions.num_tokens
    if encoding.place == "rotary":
        q = torch.ones(1, 2, tokens, 24)
        return encoding(q, q, positions)[0]
    if encoding.place in ("input", "conditional"):
        return encoding(torch.ones(1, tokens, 48), positions)
    content = {"q": torch.ones(1, 2, tokens, 24), "x": torch.ones(1, tokens, 48)}
    extra = [positions, content[encoding.content_source]] if encoding.content_dependent else []
    return encoding(torch.zeros(1, 2, tokens, tokens), positions, *extra)


@pytest.mark.parametrize("name", ENCODINGS)
def test_an_encoding_takes_as_many_axes_as_it_says(name):
    encoding = build(name)
    assert encoding.axes == (None if name in ANY_AXES else 2)
    for grid in ((7,), (2, 3, 4)):
        positions = vp.Positions.grid(grid)
        if encoding.axes is None:
            assert use(encoding, positions).isfinite().all()
        else:
            with pytest.raises(ValueError, match=rf"^{name} needs 2 coordinates .*\(y, x\).*, got {len(grid)}$"):
                use(encoding, positions)
    assert use(encoding, vp.Positions.grid((3, 5))).isfinite().all()


@pytest.mark.unhooked
@pytest.mark.parametrize(
    ("index", "words"),
    [
        (torch.tensor([0, 15]), "index must lie in 0 .. 14, got 15"),
        (torch.tensor([[3, 2], [-1, 4]]), "index must lie in 0 .. 14, got -1"),
        (torch.tensor([0.5]), "index must be a tensor of integers .*, got torch.float32 (1,)"),
        (torch.ones(15, dtype=torch.bool), "index must be a tensor of integers .*, got torch.bool (15,)"),
        (torch.tensor(3), "index must be a tensor of integers of shape (K,) or (B, K), got torch.int64 ()"),
        ([0, 1], "index must be a tensor of integers .*, got [0, 1]"),
        (None, "index must be a tensor of integers .*, got None"),
    ],
)
def test_an_index_that_keeps_nothing_sensible(index, words):
    pattern = "^" + re.escape(words).replace(r"\.\*", ".*") + "$"
    with pytest.raises(ValueError, match=pattern):
        vp.Positions.grid((3, 5), num_prefix_tokens=1).keep(index)


def test_an_index_of_other_samples():
    kept = vp.Positions.grid((3, 5)).keep(torch.tensor([[14, 0], [3, 3]]))
    with pytest.raises(ValueError, match="^index has 3 samples, but the positions have 2$"):
        kept.keep(torch.zeros(3, 1, dtype=torch.long))


def test_indices_of_either_width_and_none_at_all():
    grid = vp.Positions.grid((3, 5))
    assert grid.keep(torch.tensor([[14, 0]], dtype=torch.int32)).coords.tolist() == [[[2, 4], [0, 0]]]
    assert grid.keep(torch.tensor([], dtype=torch.long)).coords.shape == (0, 2)


@pytest.mark.unhooked
@pytest.mark.parametrize("count", [1.0, True, "1", None, -2])
def test_a_count_of_prefix_tokens_that_is_none(count):
    with pytest.raises(ValueError, match=f"^num_prefix_tokens must be 0 or more, an integer, got {count!r}$"):
        vp.Positions.grid((3, 5), num_prefix_tokens=count)


@pytest.mark.parametrize("name", vp.list_encodings(place="bias"))
@pytest.mark.parametrize("heads", [1, 3])
def test_a_bias_does_not_broadcast_over_heads(name, heads):
    encoding, positions = build(name), vp.Positions.grid((3, 5))
    content = {"q": torch.ones(1, 2, 15, 24), "x": torch.ones(1, 15, 48)}
    extra = [content[encoding.content_source]] if encoding.content_dependent else []
    with pytest.raises(ValueError, match=f"^logits have {heads} heads, but {name} was built with num_heads=2$"):
        encoding(torch.zeros(1, heads, 15, 15), positions, positions, *extra)
    if getattr(encoding, "content_source", None) == "q":
        with pytest.raises(ValueError, match=f"^content has {heads} heads, but {name} was built with num_heads=2$"):
            encoding.bias(positions, content=torch.ones(1, heads, 15, 24))


@pytest.mark.parametrize("name", vp.list_encodings(place="conditional"))
def test_a_mixer_says_its_channels(name):
    with pytest.raises(ValueError, match=f"^x has 47 channels, but {name} was built with dim=48$"):
        build(name)(torch.ones(1, 15, 47), vp.Positions.grid((3, 5)))


GRID = vp.Positions.grid((4, 6))
SIZES = {
    "feat_shape must be one or more": (
        lambda size: vp.Positions.grid(size),
        [5, (), "35"],
    ),
    "feat_shape must be 2   ": (lambda size: vp.Positions.grid(size), [(2.0, 5), (True, 5), (3, 0)]),
    "feat_shape must be 2": (lambda size: GRID.rescale(size), [3, (3,), (3, 4, 5), (-1, 4), None]),
    "feat_shape must be 2 ": (lambda size: vp.Positions(GRID.coords, size), [24, (24,), (4, 6.0)]),
    "feat_shape must be 2  ": (lambda size: vp.shifted_window_mask(size, (2, 3), (1, 1)), [4, (4,), (4, 6.5)]),
    "window_size must be 2": (lambda size: GRID.windows(size), [2, (2, 3.0), (2, 3, 1), (0, 3)]),
    "window_size must be 2 ": (lambda size: vp.shifted_window_mask((4, 6), size, (0, 0)), [2, (2, 0), (2.0, 3)]),
    "window_size must be 2  ": (lambda size: vp.relative_position_index(size), [3, (3, 4.5), (3, 0), (1, 2, 3)]),
}


@pytest.mark.unhooked
@pytest.mark.parametrize("words", SIZES)
def test_a_size_that_is_none(words):
    use, sizes = SIZES[words]
    for size in sizes:
        with pytest.raises(ValueError, match=f"^{words.strip()} positive integers, got {re.escape(repr(size))}$"):
            use(size)


@pytest.mark.unhooked
@pytest.mark.parametrize("shift", [1, (1,), (2, 0), (0, -1), (0.5, 1), None])
@pytest.mark.parametrize("use", [GRID.windows, lambda *args: vp.shifted_window_mask((4, 6), *args)])
def test_a_shift_that_is_none(use, shift):
    with pytest.raises(
        ValueError, match=rf"^shift must be two integers in \[0, window\) .*, got {re.escape(str(shift))}$"
    ):
        use((2, 3), shift)


@pytest.mark.unhooked
@pytest.mark.parametrize("coords", [[[0.0, 1.0]], None, torch.zeros(3, 2, dtype=torch.complex64), torch.ones(3, 2) > 0])
def test_coordinates_that_are_no_numbers(coords):
    with pytest.raises(ValueError, match="^coords must be a tensor of real numbers, got "):
        vp.Positions(coords, (3, 5))


def test_a_token_kept_twice_is_two_tokens_in_one_place():
    kept = vp.Positions.grid((3, 5), 1).keep(torch.tensor([7, 7, 2]))
    bias = build("alibi2d").bias(kept)[0, 1:, 1:]
    assert torch.equal(bias[0], bias[1])
    assert bias[0, 1] == 0
    mixer = build("peg")
    x = torch.randn(1, 4, 48, generator=torch.Generator().manual_seed(0))
    merged = torch.stack([x[:, 0], x[:, 1] + x[:, 2], x[:, 3]], dim=1)  # a convolution adds up what stands in a place
    once = mixer.mix(merged, vp.Positions.grid((3, 5), 1).keep(torch.tensor([7, 2])))
    assert torch.allclose(mixer.mix(x, kept), once[:, [0, 1, 1, 2]], atol=1e-6)
