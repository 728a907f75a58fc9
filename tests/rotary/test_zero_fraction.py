"""The lowest frequencies set to 0: pairs that never turn."""

import pytest
import torch

import visionpos as vp
from tests.small import pictures, vit

SERIES = {
    "rope1d": 1,
    "rope_axial": 2,
    "rope_mixed": 2,
    "rope_eva": 2,
    "rope_dinov3": 2,
    "rope_spiral": 2,
    "string": 2,
    "harope": 2,
}
GRID = (3, 5)


def create(name, **options):
    torch.manual_seed(0)
    return vp.create_encoding(name, num_heads=3, head_dim=24, **options)


@pytest.mark.parametrize("fraction", [0.2, 0.5, 0.75])
@pytest.mark.parametrize("name", SERIES)
def test_the_lowest_of_each_series_stay_and_the_others_turn_as_before(name, fraction):
    positions = vp.Positions.grid(GRID, num_prefix_tokens=2)
    whole, part = create(name), create(name, zero_fraction=fraction)
    n = 12 // SERIES[name]
    still = torch.arange(12) % n >= n - round(fraction * n)
    assert 0 < still.sum() < 12
    assert torch.equal(part.angles(positions)[..., ~still], whole.angles(positions)[..., ~still])
    assert (part.angles(positions)[..., still] == 0).all()
    assert (whole.angles(positions)[:, 1:, still] != 0).any(1).all()
    if name != "string":  # whose pairs are those of its basis
        q = torch.randn(2, 3, 17, 24, generator=torch.Generator().manual_seed(1))
        turned, channels = part(q, q, positions)[0], torch.arange(24)
        pair = channels // 2 if part.layout == "interleaved" else channels % 12
        assert torch.equal(turned[..., still[pair]], q[..., still[pair]])


def frequencies(encoding):
    """How fast each pair turns with the distance, (heads or 1, pairs)."""
    angles = encoding.double().angles(vp.Positions.grid((2, 2)))
    return torch.hypot(angles[:, 1] - angles[:, 0], angles[:, 2] - angles[:, 0])


def test_they_are_the_slowest():
    for name, series in SERIES.items():
        found = frequencies(create(name)).unflatten(-1, (series, -1))
        assert (found[..., 1:] < found[..., :-1]).all(), name


@pytest.mark.parametrize("preset", ["rope_vit", "moonvit", "pixtral", "qwen_vit", "gemma4", "mrope"])
def test_dialects_lose_their_slowest_frequencies_on_both_axes(preset):
    whole, part = (frequencies(create("rope_axial", preset=preset, zero_fraction=z))[0] for z in (0.0, 0.5))
    assert 0 < part.count_nonzero() < whole.count_nonzero()
    assert part[part > 0].min() >= whole[part == 0].max()
    angles = create("rope_axial", preset=preset, zero_fraction=0.5).angles(vp.Positions.grid((2, 2)))[0]
    assert angles[1].any()
    assert angles[2].any()


@pytest.mark.parametrize("name", [*SERIES])
def test_all_of_them_is_no_encoding_to_the_bit(name):
    plain = vit("none")
    model = vit({"name": name, "zero_fraction": 1.0})
    model.load_state_dict(plain.state_dict(), strict=False)
    same = torch.equal(model(pictures()), plain(pictures()))
    assert same or (
        name in ("string", "harope") and torch.allclose(model(pictures()), plain(pictures()), atol=1e-5)
    )  # in its basis


def test_a_layer_of_a_model_is_that_of_its_spec():
    spec = {"name": "rope_axial", "zero_fraction": 0.5}
    model = vp.set_encoding(vit("none"), spec | {"layers": [1]})
    (encoding,) = vp.get_encoding(model)
    assert encoding.zero_fraction == 0.5
    assert vp.get_encoding(model) == [encoding]


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("rope_axial", {"zero_fraction": 1.5}, r"rope_axial: zero_fraction must be in \[0, 1\], got 1.5"),
        ("rope_axial", {"zero_fraction": float("nan")}, "zero_fraction must be in"),
        ("string", {"zero_fraction": 0.5, "preset": "circulant"}, "no order, and it takes no zero_fraction"),
        ("liere", {"zero_fraction": 0.5}, "liere has no option 'zero_fraction'"),
        ("comrope", {"zero_fraction": 0.5}, "comrope has no option 'zero_fraction'"),
    ],
)
def test_errors(name, options, words):
    with pytest.raises(ValueError, match=words):
        create(name, **options)


def test_an_authors_class_without_frequencies_says_so():
    class Column(vp.RotaryEncoding):
        name = "column"

        def encode(self, positions):
            return positions.coords[..., None, :, 1:].expand(-1, -1, self.num_angles)

    assert Column(2, 4).angles(vp.Positions.grid(GRID)).shape == (1, 15, 2)
    with pytest.raises(ValueError, match="column has no series of frequencies, and takes no zero_fraction"):
        Column(2, 4, zero_fraction=0.5)
