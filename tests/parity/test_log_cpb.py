"""Swin V2's log-spaced continuous position bias."""

import math

import pytest
import torch
from timm.models.swin_transformer_v2 import WindowAttention

import visionpos as vp
from visionpos.bias.log_cpb import log_coords

AXIS = {  # window, pretrained window: coordinates of the offsets 1, 2, ...
    (4, 4): [0.62482303, 0.88765502, 1.05664170],
    (8, 8): [0.36651185, 0.57206899, 0.71561384, 0.82601577, 0.91574460, 0.99133492, 1.05664170],
    (8, 4): [0.62482303, 0.88765502, 1.05664170, 1.18144023, 1.28043401, 1.36248767, 1.43256009],
    (1, 1): [],
}


def positions_of(grid, whole=True, prefix=0):
    return vp.Positions(vp.Positions.grid(grid).coords.double(), grid, prefix, is_grid=whole)


def drawn(num_heads, **options):
    torch.manual_seed(0)
    encoding = vp.create_encoding("log_cpb", num_heads=num_heads, init_std=0.5, **options).double()
    torch.nn.init.normal_(encoding.cpb_mlp[0].bias, std=0.3)
    return encoding


def oracle(encoding, dy, dx, window):
    """The bias of one pair of tokens, heads as a list."""
    first, _, last = encoding.cpb_mlp
    g = []
    for delta, size in ((dy, window[0]), (dx, window[1])):
        u = 8 * delta / (size - 1) if size > 1 else 0.0
        g.append(math.copysign(math.log2(1 + abs(u)) / math.log2(8), u))
    hidden = [
        max(0.0, w[0] * g[0] + w[1] * g[1] + b) for w, b in zip(first.weight.tolist(), first.bias.tolist(), strict=True)
    ]
    return [16 / (1 + math.exp(-sum(w * h for w, h in zip(row, hidden, strict=True)))) for row in last.weight.tolist()]


@pytest.mark.parametrize(("sizes", "want"), AXIS.items())
@pytest.mark.parametrize("axis", [0, 1])
def test_golden_coordinates(sizes, want, axis):
    window, pretrained = sizes
    delta = torch.zeros(2 * window - 1, 2, dtype=torch.float64)
    delta[:, axis] = torch.arange(1 - window, window)
    trained = [3, 3]
    trained[axis] = pretrained
    got = log_coords(delta, tuple(trained))
    assert got[:, axis].tolist() == pytest.approx([*(-g for g in reversed(want)), 0, *want], abs=2e-7)
    assert (got[:, 1 - axis] == 0).all()


@pytest.mark.parametrize("pretrained", [None, (3, 4)])
@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize(("grid", "whole"), [((2, 3), True), ((3, 2), False), ((1, 4), True), ((4, 1), False)])
def test_oracle(grid, whole, heads, pretrained):
    encoding = drawn(heads, pretrained_window=pretrained)
    bias = encoding.bias(positions_of(grid, whole, prefix=1)).detach()
    assert (bias[:, 0] == 0).all()
    assert (bias[:, :, 0] == 0).all()
    for i in range(grid[0] * grid[1]):
        for j in range(grid[0] * grid[1]):
            dy, dx = i // grid[1] - j // grid[1], i % grid[1] - j % grid[1]
            want = oracle(encoding, dy, dx, pretrained or grid)
            assert bias[:, i + 1, j + 1].tolist() == pytest.approx(want, abs=1e-10)


@pytest.mark.parametrize("window", [(3, 5), (4, 2), (2, 6), (7, 8)])  # timm before 1.0.31 has NaN for one row
@pytest.mark.parametrize("pretrained", [None, (6, 4)])
def test_equals_timm(window, pretrained):
    theirs = WindowAttention(24, window, num_heads=3, pretrained_window_size=pretrained or (0, 0)).double()
    theirs._init_buffers()  # the coordinates, in float64 from here on
    ours = vp.create_encoding("log_cpb", num_heads=3, pretrained_window=pretrained).double()
    ours.cpb_mlp.load_state_dict(theirs.cpb_mlp.state_dict())
    table = 16 * theirs.cpb_mlp(theirs.relative_coords_table).view(-1, 3).sigmoid()
    want = table[theirs.relative_position_index].permute(2, 0, 1)
    assert (ours.bias(positions_of(window)) - want).abs().max() < 2e-6


def test_window_of_one_token():
    assert drawn(2).bias(positions_of((1, 1))).isfinite().all()


def test_offsets_between_tokens():
    encoding = drawn(2)
    positions = vp.Positions(torch.tensor([[0.25, 1.5], [1.75, 0.5]], dtype=torch.float64), (2, 3))
    want = oracle(encoding, -1.5, 1.0, (2, 3))
    assert encoding.bias(positions)[:, 0, 1].tolist() == pytest.approx(want, abs=1e-10)


def test_another_window():
    small, large = positions_of((3, 4)), positions_of((5, 7))
    fixed = drawn(2, pretrained_window=(3, 4))
    # tokens (0, 0) and (2, 3) are 0 and 11 in one window, 0 and 17 in the other
    assert torch.equal(fixed.bias(small)[:, 0, 11], fixed.bias(large)[:, 0, 17])
    assert not torch.allclose(fixed.bias(small)[:, 0, 11], fixed.bias(large)[:, 0, 34])
    own = drawn(2)
    assert torch.allclose(own.bias(small)[:, 0, 11], own.bias(large)[:, 0, 34])  # corner to corner


def test_initial_weights_and_names():
    torch.manual_seed(0)
    encoding = vp.create_encoding("log_cpb", num_heads=6)
    names = {"cpb_mlp.0.weight": (512, 2), "cpb_mlp.0.bias": (512,), "cpb_mlp.2.weight": (6, 512)}
    assert {name: tuple(p.shape) for name, p in encoding.named_parameters()} == names
    assert encoding.no_weight_decay() == set(names)
    assert encoding.cpb_mlp[0].weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert (encoding.cpb_mlp[0].bias == 0).all()
    bias = encoding.bias(vp.Positions.grid((4, 6)))
    assert (bias - 8).abs().max() < 0.5  # 16 sigmoid(nearly 0)


def test_errors():
    with pytest.raises(ValueError, match="pretrained_window must be two positive integers"):
        vp.create_encoding("log_cpb", num_heads=2, pretrained_window=(0, 4))
    with pytest.raises(ValueError, match="reference_shape"):  # it has a frame of its own
        vp.create_encoding("log_cpb", num_heads=2, reference_shape=(3, 4))
