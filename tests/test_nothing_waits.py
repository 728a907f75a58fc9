"""Inside a step nothing waits for the device: no tensor of the host, no copy between the two, whatever the encoding.

Seen without a GPU: stand-in CUDA tensors have shapes and no numbers, and every operation on them is written down.
"""

import pytest
import torch
from torch._dynamo.backends.common import aot_autograd
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import visionpos as vp
from tests.small import needs_newer_torch
from visionpos.kernels import choose, coordinates
from visionpos.kernels.coordinates_flex import modifiers
from visionpos.masked.masks import MASKINGS, draw_mask

pytestmark = [pytest.mark.unhooked, needs_newer_torch]  # whose stand-in CUDA tensors need no driver
ENCODINGS = [name for name in vp.list_encodings() if name != "none"]
FACTS = {"num_heads": 3, "head_dim": 16, "dim": 48, "layer": 0, "depth": 2, "feat_shape": (4, 6), "grid_size": (4, 6)}
VIT = {"img_size": (16, 24), "patch_size": 4, "embed_dim": 48, "depth": 2, "num_heads": 3, "num_classes": 5}
SWIN = {"img_size": (32, 64), "window_size": 4, "depths": (2,), "num_heads": (3,), "num_classes": 5}
HOSTS = {
    "vit_tiny_patch16_224": VIT,
    "deit_tiny_distilled_patch16_224": VIT,
    "eva02_tiny_patch14_224": VIT,
    "beit_base_patch16_224": VIT,
    "swin_tiny_patch4_window7_224": SWIN,
    "swinv2_tiny_window8_256": SWIN,
}
# Functions that wait although all their tensors are on the device: they look at a norm, a singularity or a number.
WAITING = ("linalg_matrix_exp", "_linalg_check_errors", "linalg_eigh", "_local_scalar_dense", "nonzero", "equal")


class Record(TorchDispatchMode):
    """The names of operations that make the host and the device wait for each other."""

    def __init__(self):
        super().__init__()
        self.waits = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        on_host = [
            x for x in tree_leaves((args, kwargs, out)) if isinstance(x, torch.Tensor) and x.device.type == "cpu"
        ]
        if on_host or func._opname in WAITING:
            self.waits.append(func._opname)
        return out


@pytest.fixture(autouse=True)
def _every_kernel_agrees(monkeypatch):
    monkeypatch.setattr(choose, "selftest", lambda *args: "")


def move(module):
    return module._apply(lambda x: torch.empty(x.shape, dtype=x.dtype, device="cuda"))


def waits_of_model(name, encoding, options):
    model = vp.create_model(name, encoding=encoding, **options).train()
    with FakeTensorMode(allow_non_fake_inputs=True), Record() as record:
        move(model)
        with torch.no_grad():
            model(torch.empty(2, 3, *options["img_size"], device="cuda"))
    return record.waits


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_every_encoding_in_a_model(encoding):
    assert waits_of_model("vit_tiny_patch16_224", encoding, VIT) == []


@pytest.mark.parametrize("name", HOSTS)
@pytest.mark.parametrize("encoding", ["sincos2d+rope_axial", "alibi2d", "relative_table", "log_cpb", "fire"])
def test_every_host(name, encoding):
    assert waits_of_model(name, encoding, HOSTS[name]) == []


def build(name):
    info = vp.encoding_info(name)
    facts = {key: value for key, value in FACTS.items() if key in [*info["required"], *info["options"]]}
    return vp.create_encoding(name, **facts)


def arranged(kind):
    """Positions on the device: the grid that the encodings were built for, another, real coordinates, samples."""
    positions = vp.Positions.grid((5, 7) if kind == "other grid" else (4, 6), 1, device="cuda")
    if kind == "real coordinates":
        return vp.CoordinateAugmentation(shift=0.5, jitter=1.5)(positions)
    return positions.keep(torch.arange(6, device="cuda").expand(2, -1)) if kind == "samples" else positions


@pytest.mark.parametrize("kind", ["grid", "other grid", "real coordinates", "samples"])
@pytest.mark.parametrize("name", [n for n in ENCODINGS if vp.encoding_info(n)["place"] in ("input", "rotary", "bias")])
def test_every_kind_of_positions(name, kind):
    encoding, content = build(name), vp.encoding_info(name)["content_dependent"]
    with FakeTensorMode(allow_non_fake_inputs=True), Record() as record:
        move(encoding)
        positions = arranged(kind)
        if content:
            shape = (
                (2, 3, positions.num_tokens, 16) if encoding.content_source == "q" else (2, positions.num_tokens, 48)
            )
            encoding.bias(positions, content=torch.empty(shape, device="cuda"))
        else:
            encoding.prepare(positions)
    assert record.waits == []


@pytest.mark.parametrize("kind", ["grid", "samples"])
@pytest.mark.parametrize("name", ["alibi", "alibi2d", "lookhere"])
def test_a_bias_that_the_kernel_computes(name, kind):
    encoding = build(name)
    with FakeTensorMode(allow_non_fake_inputs=True), Record() as record:
        move(encoding)
        modifiers(*coordinates.pairwise(encoding, arranged(kind)))
    assert record.waits == []


@pytest.mark.parametrize("masking", MASKINGS)
def test_masks(masking):
    with FakeTensorMode(allow_non_fake_inputs=True), Record() as record:
        draw_mask((4, 6), 3, masking=masking, device="cuda")
    assert record.waits == []


def test_a_list_of_the_host_is_seen():
    class Copies(vp.BiasEncoding):
        def encode(self, queries, keys):
            sizes = torch.tensor(queries.feat_shape, device=queries.coords.device)
            return (queries.coords / sizes) @ (keys.coords / sizes).mT.expand(self.num_heads, -1, -1)

    class Asks(vp.BiasEncoding):
        def encode(self, queries, keys):
            bias = queries.coords @ keys.coords.mT
            return torch.linalg.matrix_exp(bias).expand(self.num_heads, -1, -1)

    for cls in (Copies, Asks):
        with FakeTensorMode(allow_non_fake_inputs=True), Record() as record:
            cls(3).prepare(arranged("grid"))
        assert record.waits


@pytest.mark.slow
@pytest.mark.parametrize("encoding", ENCODINGS)
def test_no_node_of_the_host_in_the_traced_graph(encoding):
    """The same of what torch.compile traces, whose graph CUDA graphs would have to split."""
    graphs = []
    torch._dynamo.reset()
    model = vp.create_model("vit_tiny_patch16_224", encoding=encoding, **VIT).train()

    def keep(graph, example):
        graphs.append(graph)
        return graph.forward

    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        move(model)
        compiled = torch.compile(model, dynamic=False, backend=aot_autograd(fw_compiler=keep, bw_compiler=keep))
        compiled(torch.empty(2, 3, 16, 24, device="cuda"))
    values = tree_leaves([node.meta.get("val") for graph in graphs for node in graph.graph.nodes])
    assert len(graphs) == 1
    assert not [value for value in values if isinstance(value, torch.Tensor) and value.device.type == "cpu"]
