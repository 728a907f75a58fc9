"""LookHere: fields of view, slopes, and the order of the heads."""

import math

import pytest
import torch

import visionpos as vp
from visionpos.bias.lookhere import HIDDEN, family_sizes

HALVES = {
    "up": lambda dy, dx: dy <= 0,
    "down": lambda dy, dx: dy >= 0,
    "left": lambda dy, dx: dx <= 0,
    "right": lambda dy, dx: dx >= 0,
}
TRIANGLES = {
    "up": lambda dy, dx: -dy >= abs(dx),
    "down": lambda dy, dx: dy >= abs(dx),
    "left": lambda dy, dx: -dx >= abs(dy),
    "right": lambda dy, dx: dx >= abs(dy),
}


def both(first, second):
    return lambda dy, dx: first(dy, dx) and second(dy, dx)


def either(first, second):
    return lambda dy, dx: first(dy, dx) or second(dy, dx)


def eighths(*pairs):
    return [both(TRIANGLES[triangle], HALVES[half]) for triangle, half in pairs]


FIELDS = {  # the first eight of twelve heads, as combinations of half planes and triangles
    "lh180": [
        *HALVES.values(),
        *(either(TRIANGLES[v], TRIANGLES[h]) for v in ("up", "down") for h in ("right", "left")),
    ],
    "lh90": [*(both(HALVES[v], HALVES[h]) for v in ("up", "down") for h in ("left", "right")), *TRIANGLES.values()],
    "lh45": eighths(
        ("up", "left"), ("down", "left"), ("left", "up"), ("right", "up"),
        ("up", "right"), ("down", "right"), ("left", "down"), ("right", "down"),
    ),
}  # fmt: skip


def lookhere(num_heads=12, layer=0, depth=12, **options):
    return vp.create_encoding("lookhere", num_heads=num_heads, layer=layer, depth=depth, **options)


def positions_of(grid, whole=True, prefix=0):
    return vp.Positions(vp.Positions.grid(grid).coords.double(), grid, prefix, is_grid=whole)


@pytest.mark.parametrize(
    ("preset", "head", "want"),
    [
        ("lh180", 0, [0, 1, 2, 3, 4, 5]),  # half up
        ("lh90", 0, [0, 1, 3, 4]),  # corner up left
        ("lh90", 4, [0, 1, 2, 4]),  # triangle up
        ("lh180", 4, [0, 1, 2, 4, 5, 8]),  # diagonal up right
        ("lh45", 0, [0, 1, 4]),  # eighth up left
    ],
)
def test_golden_fields_of_view(preset, head, want):
    bias = lookhere(preset=preset).bias(vp.Positions.grid((3, 3)))
    assert (bias[head, 4] > HIDDEN).nonzero().flatten().tolist() == want


def test_golden_slopes():
    first, last = (lookhere(layer=layer).bias(vp.Positions.grid((2, 2))) for layer in (0, 11))
    assert first[0, 3].tolist() == pytest.approx([-1.5 * math.sqrt(2), -1.5, -1.5, 0], abs=2e-6)
    assert first[8, 0].tolist() == pytest.approx([0, -0.75, -0.75, -0.75 * math.sqrt(2)], abs=2e-6)
    assert last[0, 3].tolist() == pytest.approx([-0.5 * math.sqrt(2), -0.5, -0.5, 0], abs=2e-6)


@pytest.mark.parametrize("preset", FIELDS)
@pytest.mark.parametrize(("grid", "whole", "layer"), [((3, 5), True, 0), ((4, 3), False, 3), ((1, 4), True, 11)])
def test_oracle(preset, grid, whole, layer):
    bias = lookhere(layer=layer, preset=preset).bias(positions_of(grid, whole, prefix=2))
    assert (bias[:, :2] == 0).all()
    assert (bias[:, :, :2] == 0).all()
    slope = 2 * (1.5 - layer / 11)
    for head in range(12):
        m = 0.5 if head < 8 else 0.25 ** (head - 7)
        for i in range(grid[0] * grid[1]):
            for j in range(grid[0] * grid[1]):
                dy, dx = j // grid[1] - i // grid[1], j % grid[1] - i % grid[1]
                visible = head >= 8 or FIELDS[preset][head](dy, dx)
                want = -slope * m * math.hypot(dy, dx) if visible else HIDDEN
                assert bias[head, i + 2, j + 2].item() == pytest.approx(want, abs=1e-10)


@pytest.mark.parametrize(
    ("heads", "want"),
    [(1, (0, 0, 1)), (3, (1, 1, 1)), (4, (1, 1, 2)), (5, (1, 1, 3)), (6, (4, 0, 2)), (7, (2, 2, 3)), (8, (2, 2, 4)),
     (12, (4, 4, 4)), (14, (4, 4, 6)), (16, (8, 4, 4)), (20, (8, 8, 4)), (24, (8, 8, 8))],
)  # fmt: skip
def test_numbers_of_heads(heads, want):
    assert family_sizes(heads) == want
    encoding = lookhere(heads)
    slopes = [slope / 3 for slope in encoding.slopes()]
    first, second, everything = want
    assert slopes[:first] == ([0.5] * 4 + [0.25] * 4)[:first]
    assert slopes[first : first + second] == ([0.5] * 4 + [0.25] * 4)[:second]
    assert slopes[first + second :] == sorted(slopes[first + second :], reverse=True)
    if everything in (1, 2, 4):
        assert slopes[first + second :] == [0.25, 0.0625, 0.015625, 0.00390625][:everything]
    bias = encoding.bias(vp.Positions.grid((3, 4)))
    hidden = (bias == HIDDEN).flatten(1).any(1)
    assert hidden.tolist() == [True] * (first + second) + [False] * everything
    if heads == 24:  # directions repeat before slopes do
        assert torch.equal(bias[:4] == HIDDEN, bias[4:8] == HIDDEN)
        assert slopes[16:] == [s for s in (0.25, 0.0625, 0.015625, 0.00390625) for _ in range(2)]


def test_hidden_keys_are_finite_and_get_no_attention():
    bias = lookhere().bias(vp.Positions.grid((4, 6)))
    assert (bias + bias).half().isfinite().all()
    assert (bias.half() + bias.half()).isfinite().all()
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        probabilities = bias.to(dtype).softmax(-1)
        assert (probabilities[bias == HIDDEN] == 0).all()
        assert (bias.diagonal(dim1=1, dim2=2) == 0).all()


def test_left_is_not_right():
    bias = lookhere().bias(vp.Positions.grid((3, 4)))
    assert torch.equal(bias[0], bias[3].flip(0, 1))  # looks down right where the other looks up left
    assert not torch.equal(bias[0], bias[0].T)


@pytest.mark.parametrize("trained", [(3, 4), (4, 2), (7, 3)])  # a third of a step, rounded; and other shapes
@pytest.mark.parametrize("preset", FIELDS)
def test_interpolated_coordinates_keep_the_fields_of_view(preset, trained):
    positions = vp.Positions.grid((7, 10))
    near = lookhere(preset=preset, reference_shape=trained, extrapolate=False).bias(positions)
    far = lookhere(preset=preset).bias(positions)
    factor = min((trained[0] - 1) / 6, (trained[1] - 1) / 9)
    assert torch.equal(near == HIDDEN, far == HIDDEN)
    assert torch.allclose(near[near != HIDDEN], factor * far[far != HIDDEN])


def test_options():
    positions = positions_of((2, 3))
    bias = lookhere(3, layer=1, depth=3, global_slope=4.0, layer_slopes=(1.0, 3.0)).bias(positions)
    assert bias[2, 0, 1].item() == -4 * 2 * 0.25
    assert lookhere(3, layer=0, depth=1).bias(positions)[2, 0, 1].item() == -2 * 1.5 * 0.25


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layer": 12}, r"layer must lie in \[0, depth\), got layer=12, depth=12"),
        ({"layer": -1}, "layer must be an integer, 0 or more, got -1"),
        ({"preset": "lh60"}, "preset must be one of 'lh45', 'lh90', 'lh180', got 'lh60'"),
        ({"num_heads": 0}, "lookhere: num_heads must be a positive integer, got 0"),
    ],
)
def test_errors(options, message):
    with pytest.raises(ValueError, match=message):
        lookhere(**options)


def test_needs_layer_and_depth():
    with pytest.raises(ValueError, match="lookhere needs layer, depth"):
        vp.create_encoding("lookhere", num_heads=12)
