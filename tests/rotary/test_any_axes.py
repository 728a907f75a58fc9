"""Rotations on one, two and three axes, against their formulas in float64."""

import math

import pytest
import torch

import visionpos as vp

F64 = torch.float64
GRIDS = [(7,), (3, 5), (2, 3, 4)]


def places(grid):
    """The tokens of a grid, and two samples of five between them."""
    real = torch.rand(2, 5, len(grid), generator=torch.Generator().manual_seed(1), dtype=F64) * (max(grid) - 1)
    return vp.Positions.grid(grid, 2).promote(F64), vp.Positions(real, grid, 2)


def axial(preset, token, head_dim):
    """The angle of each pair of a token, by hand."""
    pairs, axes = head_dim // 2, len(token)
    if preset == "mrope":
        t, y, x = (0.0,) * (3 - axes) + tuple(token)
        return [(t, y, x)[i % 3] * 10000 ** (-i / pairs) for i in range(pairs)]
    if preset == "pixtral":
        return [p * 10000 ** (-(i * axes + a) / pairs) for a, p in enumerate(token) for i in range(pairs // axes)]
    temperature = 100 if preset == "rope_vit" else 10000
    theta = [temperature ** (-i * axes / pairs) for i in range(pairs // axes)]
    if preset == "moonvit":
        return [p * f for f in theta for p in token[::-1]]
    return [p * f for p in (token if preset == "qwen_vit" else token[::-1]) for f in theta]


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("preset", ["rope_vit", "moonvit", "pixtral", "qwen_vit", "mrope"])
def test_axial_oracle(preset, grid):
    rope = vp.create_encoding("rope_axial", num_heads=2, head_dim=24, preset=preset)
    for positions in places(grid):
        want = torch.tensor([axial(preset, p, 24) for p in positions.coords.flatten(0, -2).tolist()], dtype=F64)
        assert (rope.angles(positions).squeeze(-3).flatten(0, -2) - want).abs().max() < 1e-12


def direction(i, axes):
    """The unit vector of pair i, the last axis first."""
    if axes == 1:
        return (1.0,)
    if axes == 2:
        return math.cos(math.pi * i * (math.sqrt(5) - 1) / 2), math.sin(math.pi * i * (math.sqrt(5) - 1) / 2)
    g = sum(((9 + sign * math.sqrt(69)) / 18) ** (1 / 3) for sign in (1, -1))  # g^3 = g + 1, by Cardano
    height, turn = (i / g**2) % 1, 2 * math.pi * i / g
    radius = math.sqrt(1 - height**2)
    return radius * math.cos(turn), radius * math.sin(turn), height


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("still", [0.0, 0.25])
def test_golden_oracle(grid, still):
    rope = vp.create_encoding("rope_golden", num_heads=2, head_dim=8, min_freq=0.5, max_freq=30.0, zero_fraction=still)
    omega = [0, 0.5, math.sqrt(15), 30] if still else [0.5, 0.5 * 60 ** (1 / 3), 0.5 * 60 ** (2 / 3), 30]
    side = math.prod(grid) ** (1 / len(grid))
    for positions in places(grid):
        found = rope.angles(positions).transpose(-3, -2)  # ([B,] N, heads or 1, pairs)
        for got, token in zip(found.flatten(0, -3), positions.coords.flatten(0, -2).tolist(), strict=True):
            box = [n / side * (2 * p / (n - 1) - 1) for p, n in zip(token, grid, strict=True)][::-1]
            for head, angles in enumerate(got.expand(2, -1).tolist()):
                along = [direction(4 * head + i, len(grid)) for i in range(4)]
                dots = [sum(b * u for b, u in zip(box, each, strict=True)) for each in along]
                assert angles == pytest.approx([w * d for w, d in zip(omega, dots, strict=True)], abs=1e-11)


def test_golden_directions_are_spread_over_half_a_sphere():
    u = vp.create_encoding("rope_golden", num_heads=6, head_dim=64).directions(3).flatten(1)  # (3, 192)
    assert (u.square().sum(0) - 1).abs().max() < 1e-12
    cosines = (u.T @ u).fill_diagonal_(0).abs()  # the opposite direction turns as much
    assert cosines.max() < math.cos(0.05)  # the closest of as many random ones are 0.01 apart
    assert (u @ u.T / 192 - torch.eye(3) / 3).abs().max() < 0.01  # none is preferred


@pytest.mark.parametrize("preset", ["rope_vit", "moonvit", "pixtral", "qwen_vit"])
def test_the_slowest_of_each_axis_stay(preset):
    whole, part = (
        vp.create_encoding("rope_axial", num_heads=1, head_dim=24, preset=preset, zero_fraction=z) for z in (0.0, 0.5)
    )
    for axis in range(3):
        token = vp.Positions(torch.eye(3)[axis : axis + 1], (2, 3, 4))  # one step along an axis
        speeds, left = whole.angles(token)[0, 0], part.angles(token)[0, 0]
        assert (speeds > 0).sum() == 4
        assert sorted(left[left > 0].tolist()) == sorted(speeds.tolist())[-2:]


@pytest.mark.parametrize("way", ["linear", "ntk", "ntk_by_parts", "yarn"])
@pytest.mark.parametrize(("trained", "grid"), [((7,), (14,)), ((2, 6, 4), (2, 12, 6))])
def test_each_axis_is_scaled_as_if_it_were_alone(trained, grid, way):
    rope = vp.create_encoding("rope_axial", num_heads=1, head_dim=24, reference_shape=trained, scaling=way)
    plain, same = vp.create_encoding("rope_axial", num_heads=1, head_dim=24), vp.Positions.grid(trained)
    assert torch.equal(rope.angles(same), plain.angles(same))
    blocks = rope.angles(vp.Positions.grid(grid).promote(F64))[0].view(*grid, len(grid), -1)
    for block, axis in enumerate(reversed(range(len(grid)))):
        count = blocks.shape[-1]  # the frequencies of this axis, beside an axis of one cell
        options = {"head_dim": 4 * count, "reference_shape": (1, trained[axis]), "scaling": way}
        alone = vp.create_encoding("rope_axial", num_heads=1, **options)
        want = alone.angles(vp.Positions.grid((1, grid[axis])).promote(F64))[0, :, :count]
        found = blocks.movedim(axis, -3)[(0,) * (len(grid) - 1)][:, block]
        assert (found - want).abs().max() < 1e-12


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("way", ["linear", "ntk", "yarn"])
def test_a_larger_volume_of_golden_directions(grid, way):
    """All axes twice as long: the slowest pair turns over the whole volume as it did before, the fastest as before."""
    options = {"num_heads": 2, "head_dim": 16}
    rope = vp.create_encoding("rope_golden", reference_shape=grid, scaling=way, **options).double()
    plain = vp.create_encoding("rope_golden", **options)
    corners = torch.stack([torch.zeros(len(grid), dtype=F64), torch.tensor(grid, dtype=F64) - 1])
    before = plain.angles(vp.Positions(corners, grid)).diff(dim=-2)
    after = rope.angles(vp.Positions(2 * corners, tuple(2 * n for n in grid))).diff(dim=-2)
    assert (after[..., 0] - before[..., 0]).abs().max() < 1e-12
    share = 1 if way == "linear" else 2
    if way != "yarn":  # which moves that end, too, on so small a grid
        assert (after[..., -1] - share * before[..., -1]).abs().max() < 1e-10


@pytest.mark.parametrize("options", [{}, {"preset": "moonvit"}, {"preset": "pixtral"}, {"preset": "mrope"}])
@pytest.mark.parametrize("grid", GRIDS)
def test_only_the_offset_matters(options, grid):
    rope = vp.create_encoding("rope_axial", num_heads=1, head_dim=12, **options)
    q, k = torch.randn(2, 1, 1, 4, 12, generator=torch.Generator().manual_seed(0), dtype=F64)
    coords, shift = torch.rand(4, len(grid), dtype=F64), torch.full((len(grid),), 1.75, dtype=F64)
    here, there = (
        torch.matmul(a, b.mT) for a, b in (rope(q, k, vp.Positions(c, grid)) for c in (coords, coords + shift))
    )
    assert (here - there).abs().max() < 1e-12


@pytest.mark.parametrize(
    ("name", "options", "grid", "words"),
    [
        ("rope_axial", {"head_dim": 8}, (2, 3, 4), "head_dim must be a positive multiple of 6 .* got 8"),
        ("rope_axial", {"layout": "half_per_axis"}, (2, 3, 4), "rope_axial needs 2 coordinates of a token.* got 3"),
        ("rope_axial", {"preset": "gemma4"}, (5,), "rope_axial needs 2 coordinates of a token.* got 1"),
        ("rope_axial", {"learn_frequencies": "shared"}, (5,), "rope_axial needs 2 coordinates of a token.* got 1"),
        ("rope_axial", {"reference_shape": (3, 5)}, (2, 3, 4), "rope_axial needs 2 coordinates of a token.* got 3"),
        (
            "rope_golden",
            {"scaling": {"type": "ntk", "trained": (7,)}},
            (3, 5),
            "rope_golden needs 1 coordinates.* got 2",
        ),
        ("rope_axial", {}, (2, 3, 2, 3), "axial rotation needs 1 to 3 coordinates of a token, got 4"),
        ("rope_golden", {}, (2, 3, 2, 3), "rope_golden needs 1 to 3 coordinates of a token, got 4"),
        ("rope_golden", {"num_directions": 3}, (2, 3, 4), "rope_golden needs 2 coordinates of a token.* got 3"),
    ],
)
def test_tokens_on_other_axes(name, options, grid, words):
    rope = vp.create_encoding(name, **{"num_heads": 1, "head_dim": 12, **options})
    with pytest.raises(ValueError, match=f"^{words}$"):
        rope.angles(vp.Positions.grid(grid))


TOO_MANY = {"type": "ntk", "trained": (2, 3, 4)}


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("rope_axial", {"reference_shape": (2, 3, 4), "preset": "gemma4"}, "reference_shape"),
        ("rope_mixed", {"reference_shape": (7,)}, "reference_shape"),
        ("rope_eva", {"scaling": TOO_MANY}, "the grid that was trained on"),
    ],
)
def test_a_trained_grid_on_other_axes(name, options, words):
    with pytest.raises(ValueError, match=f"^{name}: {words} must be 2 positive integers, got "):
        vp.create_encoding(name, num_heads=1, head_dim=12, **options)
