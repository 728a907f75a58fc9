"""Gradients of the biases that are functions of the offset, against finite differences in float64."""

import pytest
import torch
from torch.func import functional_call

import visionpos as vp

CASES = [
    ("log_cpb", {}),
    ("log_cpb", {"pretrained_window": (4, 3)}),
    ("t5", {}),
    ("t5", {"num_buckets": 8, "max_distance": 4}),
    ("kerple", {"preset": "log"}),
    ("kerple", {"preset": "power"}),
    ("fire", {"init_L": 1.0}),
    ("fire", {"init_L": 9.0, "init_c": 0.6}),
    *(("relative_table", {"preset": preset}) for preset in ("swin", "beit", "maxvit", "levit")),
]
KEPT = torch.tensor([[0, 3, 5], [4, 2, 1]])


def build(name, options, grid):
    torch.manual_seed(0)
    given = {"num_heads": 2, "feat_shape": grid, "init_std": 0.3, **options}
    accepted = {"num_heads", *vp.encoding_info(name)["required"], *vp.encoding_info(name)["options"]}
    encoding = vp.create_encoding(name, **{k: v for k, v in given.items() if k in accepted}).double()
    if name == "log_cpb":  # at the initial zero the ReLU has a kink
        torch.nn.init.normal_(encoding.cpb_mlp[0].bias, std=0.1)
    return encoding


@pytest.mark.parametrize("kind", ["grid", "other grid", "kept", "real"])
@pytest.mark.parametrize(("name", "options"), CASES)
def test_gradcheck(name, options, kind):
    encoding = build(name, options, (2, 3))
    grid = (3, 4) if kind == "other grid" else (2, 3)
    positions = vp.Positions(vp.Positions.grid(grid).coords.double(), grid, 1, is_grid=kind.endswith("grid"))
    if kind == "kept":
        positions = positions.keep(KEPT)
    elif kind == "real":
        positions = vp.Positions(positions.coords * 0.83 + 0.4, grid, 1)
    names = [name for name, _ in encoding.named_parameters()]
    logits = torch.zeros(2, 2, positions.num_tokens, positions.num_tokens, dtype=torch.float64)

    def function(*parameters):
        return functional_call(encoding, dict(zip(names, parameters, strict=True)), (logits, positions))

    parameters = [parameter.detach().clone().requires_grad_() for parameter in encoding.parameters()]
    assert torch.autograd.gradcheck(function, parameters, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, parameters, fast_mode=True)
