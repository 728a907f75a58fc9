"""Tables of kept tokens: taken from the table of all, bit for bit what the formula gives for their coordinates."""

import pytest
import torch

import visionpos as vp
from visionpos.hosts.attention import AttentionContext, prepare_encodings

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
    encoding, found = build(name), []
    ways = (
        lambda: encoding.take_tokens(encoding.prepare(positions), index, PREFIX),
        lambda: encoding.prepare(positions.keep(index)),
    )
    for way in ways:
        prepared = tensors(way())
        weights = [torch.randn(x.shape, generator=torch.Generator().manual_seed(1)) for x in prepared]
        learned = [(x, weight) for x, weight in zip(prepared, weights, strict=True) if x.requires_grad]
        assert bool(learned) == (encoding.learnable and name != "pope")  # whose parameter is not in its table
        gradients = ()
        if learned:
            outputs, weights = zip(*learned, strict=True)
            gradients = torch.autograd.grad(outputs, list(encoding.parameters()), weights)
        found.append((prepared, gradients))
    (got, got_gradients), (want, gradients) = found
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    assert all((a - b).abs().max() <= 1e-4 * b.abs().max() for a, b in zip(got_gradients, gradients, strict=True))


def test_attention_takes_them_where_the_table_of_all_is_the_shorter_one():
    """Of the formula it asks for the coordinates of all then, and else for those that are left."""
    whole, encoding, seen = vp.Positions.grid(GRID, PREFIX), build("rope_mixed"), []
    encode = encoding.encode
    encoding.encode = lambda positions: seen.append(positions.coords.shape) or encode(positions)
    moved = whole.keep(INDEX)  # other ones for every sample already
    for positions, index, shape in [
        (whole, INDEX, (15, 2)),
        (whole, INDEX[:1], (1, 6, 2)),
        (moved, INDEX % 6, (4, 6, 2)),
    ]:
        context = AttentionContext.of(positions, [encoding], index)
        assert seen.pop() == shape
        assert torch.equal(context.positions.coords, positions.keep(index).coords)
        assert torch.equal(context.prepared[0][1], encoding.prepare(positions.keep(index)))
        layer = torch.nn.Module()  # its own encodings, likewise
        layer.encodings = torch.nn.ModuleList([encoding])
        seen.clear()
        assert torch.equal(prepare_encodings(layer, context)[1][1], context.prepared[0][1])
        assert seen.pop() == shape
