"""Tables that eval mode prepares once: never out of date, whatever changes between two forward passes."""

import copy
import pickle

import pytest
import torch
from timm.layers import RelPosMlp

import visionpos as vp
from visionpos import memory
from visionpos.hosts.parameters import bind_parameters
from visionpos.hosts.relpos import NetworkOfHost

GRID, FACTS = (3, 4), {"num_heads": 2, "head_dim": 8, "dim": 16, "layer": 0, "depth": 2, "feat_shape": (3, 4)}
PLAIN = [
    name
    for place in ("rotary", "bias")
    for name in vp.list_encodings(place=place)
    if not vp.encoding_info(name)["content_dependent"]
]


def build(name, **options):
    info = vp.encoding_info(name)
    facts = {key: value for key, value in FACTS.items() if key in [*info["required"], *info["options"]]}
    encoding = vp.create_encoding(name, **{**facts, **options}).eval()
    with torch.no_grad():
        for parameter in encoding.parameters():
            parameter.add_(0.1 * torch.rand_like(parameter))
    return encoding


def counted(encoding):
    """How often a table was computed, in a list that grows."""
    calls, prepare = [], type(encoding).prepare

    class Counting(type(encoding)):
        def prepare(self, positions):
            calls.append(1)
            return prepare(self, positions)

    encoding.__class__ = Counting
    return calls


def tensors(table):
    return list(table) if isinstance(table, tuple) else [table]


def same(table, other):
    return all(torch.equal(a, b) for a, b in zip(tensors(table), tensors(other), strict=True))


@pytest.mark.parametrize("name", PLAIN)
@torch.no_grad()
def test_a_table_is_kept_until_something_changes(name):
    encoding, positions = build(name), vp.Positions.grid(GRID, 1)
    calls = counted(encoding)
    first = encoding.prepared(positions)
    assert same(encoding.prepared(vp.Positions.grid(GRID, 1)), first)
    assert len(calls) == 1
    for parameter in encoding.parameters():
        parameter.data.view(-1)[0] += 0.25
        count = len(calls)
        assert same(encoding.prepared(positions), encoding.prepare(positions))
        assert len(calls) == count + 2
    encoding.load_state_dict({key: value + 0.5 for key, value in encoding.state_dict().items()})
    assert same(encoding.prepared(positions), encoding.prepare(positions))
    for other in (vp.Positions.grid(GRID, 2), vp.Positions(positions.coords + 0.25, GRID, 1)):
        if encoding.continuous or other.is_grid:
            assert same(encoding.prepared(other), encoding.prepare(other))


def test_options_of_the_encoding_are_seen():
    encoding, positions = build("rope_axial", reference_shape=(5, 7)), vp.Positions.grid(GRID)
    for name, value in (("temperature", 50.0), ("reference_shape", (4, 9)), ("extrapolate", True), ("layout", "half")):
        before = encoding.prepared(positions)
        setattr(encoding, name, value)
        assert same(encoding.prepared(positions), encoding.prepare(positions))
        assert name == "layout" or not same(encoding.prepared(positions), before)


@torch.no_grad()
def test_parts_of_a_child_module_are_seen():
    encoding, positions = build("log_cpb"), vp.Positions.grid(GRID)
    calls = counted(encoding)
    encoding.prepared(positions), encoding.prepared(positions)
    assert len(calls) == 1
    before = encoding.prepared(positions)
    encoding.cpb_mlp[1] = torch.nn.Sigmoid().eval()
    assert not same(encoding.prepared(positions), before)
    before = encoding.prepared(positions)
    encoding.cpb_mlp[1] = torch.nn.Tanh().eval()
    assert not same(encoding.prepared(positions), before)
    before = encoding.prepared(positions)
    encoding.cpb_mlp[1].register_forward_hook(lambda module, args, out: out + 1)
    assert not same(encoding.prepared(positions), before)


@torch.no_grad()
def test_a_parameter_that_lives_in_its_host_is_seen():
    encoding, positions, owner = build("relative_table"), vp.Positions.grid(GRID), torch.nn.Module()
    bind_parameters(encoding, owner)
    before = encoding.prepared(positions)
    owner.relative_position_bias_table.data[0] += 1
    assert not same(encoding.prepared(positions), before)
    before = encoding.prepared(positions)
    owner.relative_position_bias_table = torch.nn.Parameter(torch.rand_like(owner.relative_position_bias_table))
    assert same(encoding.prepared(positions), encoding.prepare(positions))
    assert not same(encoding.prepared(positions), before)


@torch.no_grad()
def test_nothing_random_is_kept():
    network = NetworkOfHost(RelPosMlp(GRID, num_heads=2)).eval()
    network.mlp.drop1.p = 0.5
    positions = vp.Positions.grid(GRID)
    assert same(network.prepared(positions), network.prepared(positions))
    network.mlp.train()
    assert not same(network.prepared(positions), network.prepared(positions))
    network.train()
    assert not same(network.prepared(positions), network.prepared(positions))


def test_gradients_flow_where_they_are_wanted():
    encoding, positions = build("rope_mixed"), vp.Positions.grid(GRID)
    with torch.no_grad():
        assert not encoding.prepared(positions).requires_grad
    encoding.prepared(positions).sum().backward()
    assert encoding.freqs.grad is not None
    assert encoding not in memory._results
    coords = positions.coords.clone().requires_grad_()
    encoding.requires_grad_(False)
    assert encoding.prepared(vp.Positions(coords, GRID)).requires_grad


@pytest.mark.parametrize("name", ["rope_axial", "alibi2d", "relative_table"])
def test_tables_of_inference_mode_stay_there(name):
    encoding, positions = build(name).requires_grad_(False), vp.Positions.grid(GRID)
    with torch.inference_mode():
        inside = encoding.prepared(positions)
        assert tensors(inside)[0].is_inference()
    outside = encoding.prepared(positions)
    weight = torch.ones_like(tensors(outside)[0]).requires_grad_()
    (weight * tensors(outside)[0]).sum().backward()  # would fail with a tensor of inference mode
    assert same(inside, outside)
    with torch.inference_mode():
        assert same(encoding.prepared(vp.Positions.grid(GRID)), inside)


@torch.no_grad()
def test_copies_and_pickles_start_empty():
    encoding, positions = build("relative_table"), vp.Positions.grid(GRID)
    table, size = encoding.prepared(positions), len(pickle.dumps(build("relative_table")))
    assert len(pickle.dumps(encoding)) == size
    for other in (copy.deepcopy(encoding), pickle.loads(pickle.dumps(encoding))):
        assert other not in memory._results
        assert other.prepared(positions).data_ptr() != table.data_ptr()
        assert same(other.prepared(positions), table)
    assert encoding.prepared(positions).data_ptr() == table.data_ptr()


@torch.no_grad()
def test_transformations_of_functions_compute_anew():
    encoding, positions = build("relative_table"), vp.Positions.grid(GRID)
    name = "relative_position_bias_table"
    table = getattr(encoding, name)
    calls = counted(encoding)
    stack = torch.stack([table, 2 * table])

    def bias(table):
        class Prepared(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.encoding = encoding

            def forward(self):
                return self.encoding.prepared(positions)

        return torch.func.functional_call(Prepared(), {f"encoding.{name}": table}, ())

    assert same(bias(2 * table), 2 * bias(table))
    want = bias(table)
    assert same(torch.func.vmap(bias)(stack), torch.stack([want, 2 * want]))
    _, tangent = torch.func.jvp(bias, (table,), (table,))
    assert same(tangent, want)
    with torch.autograd.forward_ad.dual_level():
        dual = bias(torch.autograd.forward_ad.make_dual(table, table))
        assert same(torch.autograd.forward_ad.unpack_dual(dual).tangent, want)
    assert len(calls) == 5  # each of the above but the second of `table`
