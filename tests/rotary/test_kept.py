"""Tables of kept tokens: taken from the table of all, bit for bit what the formula gives for their coordinates."""

from dataclasses import replace

import pytest
import torch

import visionpos as vp

GRID, PREFIX = (3, 5), 2
ROTARY = [name for name in vp.list_encodings() if vp.encoding_info(name)["place"] == "rotary"]
DRAW = torch.Generator().manual_seed(0)
INDEX = torch.stack([torch.randperm(15, generator=DRAW)[:6] for _ in range(4)])


def build(name):
    torch.manual_seed(0)
    info = vp.encoding_info(name)
    facts = {"num_heads": 2, "head_dim": 16, "feat_shape": GRID}
    encoding = vp.create_encoding(name, **{k: v for k, v in facts.items() if k in info["required"]})
    with torch.no_grad():
        for parameter in encoding.parameters():
            parameter.normal_()
    return encoding


def tensors(prepared):
    return prepared if isinstance(prepared, tuple) else (prepared,)


@pytest.mark.parametrize("of", ["grid", "subset"])
@pytest.mark.parametrize("name", ROTARY)
def test_tables_are_those_of_the_coordinates(name, of):
    positions, index = vp.Positions.grid(GRID, PREFIX), INDEX
    if of == "subset":
        positions, index = positions.keep(torch.arange(14, 0, -2)), INDEX % 7
    kept = positions.keep(index)
    assert kept.kept[0] is positions
    assert kept.kept[0] is positions
    plain, encoding = replace(kept), build(name)
    assert plain.kept is None
    assert torch.equal(plain.coords, kept.coords)
    found = []
    for each in (kept, plain):
        prepared = tensors(encoding.prepare(each))
        weights = [torch.randn(x.shape, generator=torch.Generator().manual_seed(1)) for x in prepared]
        gradients = ()
        if encoding.learnable:
            gradients = torch.autograd.grad(prepared, list(encoding.parameters()), weights)
        found.append((prepared, gradients))
    (got, got_gradients), (want, gradients) = found
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    assert all((a - b).abs().max() <= 1e-4 * b.abs().max() for a, b in zip(got_gradients, gradients, strict=True))


def test_what_a_subset_was_taken_from():
    """Known where a table of the whole is the shorter one, and lost with any other coordinates."""
    whole = vp.Positions.grid(GRID, PREFIX)
    assert whole.kept is None
    assert whole.keep(INDEX[0]).kept is None
    assert whole.keep(INDEX[:1]).kept is None
    assert whole.keep(INDEX).keep(INDEX % 6).kept is None
    kept = whole.keep(INDEX)
    assert kept.kept[0] is whole
    assert kept.kept[1] is INDEX
    assert replace(kept, coords=kept.coords + 1).kept is None
    assert kept.rescale((4, 4)).kept is None
    assert kept.to("cpu").kept is None
    with pytest.raises(TypeError):
        vp.Positions(kept.coords, GRID, kept=kept.kept)
