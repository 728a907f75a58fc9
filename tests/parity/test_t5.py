"""T5's buckets, and their bias on two axes."""

import math

import pytest
import torch

import visionpos as vp
from visionpos.bias.t5 import t5_bucket


def brute_force(distance, num_buckets, max_distance):
    """The bucket's definition, in whole numbers: floor(k log(d / e) / log(M / e)) is the largest m that fits."""
    half, exact = num_buckets // 2, num_buckets // 4
    d, steps = abs(distance), half - exact
    if d >= exact:
        m = 0  # (d / e) ** steps >= (M / e) ** m
        while m + 1 < steps and d**steps * exact ** (m + 1) >= max_distance ** (m + 1) * exact**steps:
            m += 1
        d = exact + m
    return d + (half if distance > 0 else 0)


def positions_of(grid, whole=True, prefix=0):
    return vp.Positions(vp.Positions.grid(grid).coords.double(), grid, prefix, is_grid=whole)


def t5(num_heads, **options):
    torch.manual_seed(0)
    return vp.create_encoding("t5", num_heads=num_heads, init_std=0.5, **options).double()


def test_golden_buckets():
    got = t5_bucket(torch.arange(21)).tolist()
    assert got == [0, *range(17, 24), *[24] * 4, *[25] * 4, *[26] * 5]
    assert t5_bucket(-torch.arange(1, 21)).tolist() == [bucket - 16 for bucket in got[1:]]
    assert t5_bucket(torch.tensor([64, 127, 128, 10000])).tolist() == [30, 31, 31, 31]


@pytest.mark.parametrize(("buckets", "farthest"), [(32, 128), (16, 64), (8, 20), (64, 256), (4, 2), (32, 100)])
@pytest.mark.parametrize("dtype", [torch.int64, torch.float32, torch.float64])
def test_buckets_against_brute_force(buckets, farthest, dtype):
    distance = torch.arange(-2 * farthest, 2 * farthest + 1)
    want = [brute_force(d, buckets, farthest) for d in distance.tolist()]
    assert t5_bucket(distance.to(dtype), buckets, farthest).tolist() == want
    assert set(want) == set(range(buckets)) - {buckets // 2}  # "behind at distance 0" is never used


@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize(("buckets", "farthest"), [(32, 128), (8, 5)])
@pytest.mark.parametrize(("grid", "whole"), [((2, 3), True), ((9, 2), False), ((1, 12), True), ((3, 5), False)])
def test_oracle(grid, whole, buckets, farthest, heads):
    encoding = t5(heads, num_buckets=buckets, max_distance=farthest)
    rows, columns = encoding.relative_attention_bias.tolist()
    bias = encoding.bias(positions_of(grid, whole, prefix=1)).detach()
    assert (bias[:, 0] == 0).all()
    assert (bias[:, :, 0] == 0).all()
    for i in range(grid[0] * grid[1]):
        for j in range(grid[0] * grid[1]):
            dy, dx = j // grid[1] - i // grid[1], j % grid[1] - i % grid[1]
            row, column = rows[brute_force(dy, buckets, farthest)], columns[brute_force(dx, buckets, farthest)]
            want = [a + b for a, b in zip(row, column, strict=True)]
            assert bias[:, i + 1, j + 1].tolist() == pytest.approx(want, abs=1e-10)


def test_key_minus_query():
    encoding = t5(1)
    with torch.no_grad():
        encoding.relative_attention_bias.zero_()
        encoding.relative_attention_bias[1, 17] = 1.0  # the key one column to the right
    bias = encoding.bias(positions_of((1, 3)))[0]
    assert bias.tolist() == [[0, 1, 0], [0, 0, 1], [0, 0, 0]]


@pytest.mark.parametrize("distance", [-3.75, -0.5, 0.25, 0.999999, 7.5, 11.5])
def test_between_whole_distances(distance):
    encoding = t5(2)
    rows, columns = encoding.relative_attention_bias.detach()
    below, share = math.floor(distance), distance - math.floor(distance)
    want = (1 - share) * columns[brute_force(below, 32, 128)] + share * columns[brute_force(below + 1, 32, 128)]
    positions = vp.Positions(torch.tensor([[0, 0], [0, distance]], dtype=torch.float64), (1, 20))
    assert (encoding.bias(positions)[:, 0, 1] - (rows[0] + want)).abs().max() < 1e-10


def test_names_and_initial_weights():
    torch.manual_seed(0)
    encoding = vp.create_encoding("t5", num_heads=12)
    assert {name: tuple(p.shape) for name, p in encoding.named_parameters()} == {"relative_attention_bias": (2, 32, 12)}
    assert encoding.relative_attention_bias.std().item() == pytest.approx(0.02, rel=0.1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_buckets": 30}, "num_buckets must be a positive multiple of 4"),
        ({"max_distance": 8}, "max_distance must be more than num_buckets / 4 = 8, got 8"),
    ],
)
def test_errors(options, message):
    with pytest.raises(ValueError, match=message):
        t5(2, **options)
