"""Biases of the Euclidean distance on one, two and three axes, pair by pair in float64."""

import math

import pytest
import torch

import visionpos as vp

F64 = torch.float64
GRIDS = [(7,), (3, 5), (2, 3, 4)]


def shapes(encoding):
    """The bias of each head as a function of the distance, on a grid of a given diameter."""
    if encoding.name == "alibi2d":
        return [lambda d, _, m=m: -m * d for m in (2**-4, 2**-8)]
    if encoding.name == "kerple":
        r1, r2 = encoding.r1.tolist(), encoding.r2.tolist()
        if encoding.preset == "log":
            return [lambda d, _, a=a, b=b: -a * math.log1p(b * d) for a, b in zip(r1, r2, strict=True)]
        return [lambda d, _, a=a, b=b: -a * d**b for a, b in zip(r1, r2, strict=True)]
    c, threshold = encoding.c.item(), encoding.L.item()

    def network(d, diameter, head):
        x = torch.tensor([math.log1p(c * d) / math.log1p(c * max(threshold, diameter))], dtype=F64)
        return encoding.mlp(x)[head].item()

    return [lambda d, diameter, head=head: network(d, diameter, head) for head in (0, 1)]


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize(
    ("name", "options"),
    [("alibi2d", {}), ("kerple", {"preset": "log"}), ("kerple", {"preset": "power"}), ("fire", {"feat_shape": (2, 2)})],
)
def test_oracle(name, options, grid):
    torch.manual_seed(0)
    encoding = vp.create_encoding(name, num_heads=2, **options).double()
    whole = vp.Positions.grid(grid, 1).promote(F64)
    real = torch.rand(2, 5, len(grid), generator=torch.Generator().manual_seed(1), dtype=F64) * 3
    diameter = math.hypot(*(size - 1 for size in grid))
    for positions in (whole, vp.Positions(real, grid, 1)):
        bias = encoding.bias(positions).detach()
        bias = bias if positions.is_batched else bias[None]
        for sample, coords in enumerate(positions.coords if positions.is_batched else positions.coords[None]):
            assert not bias[sample, :, 0].any()
            for head, shape in enumerate(shapes(encoding)):
                want = [[shape(math.dist(p, q), diameter) for q in coords.tolist()] for p in coords.tolist()]
                assert (bias[sample, head, 1:, 1:] - torch.tensor(want, dtype=F64)).abs().max() < 1e-10
