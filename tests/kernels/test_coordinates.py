"""Attention with a bias computed from coordinates: FlexAttention's modifiers, evaluated densely, and compiled."""

import re
import warnings
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention.flex_attention import flex_attention

import visionpos as vp
from tests.small import needs_newer_torch
from visionpos import kernels
from visionpos.hosts import attention
from visionpos.kernels import choose, coordinates, coordinates_flex
from visionpos.kernels.coordinates_flex import BLOCK, TILES, modifiers
from visionpos.registry import _REGISTRY

PAGE = Path(__file__).parents[2] / "docs" / "add_your_own.md"
ENCODINGS = {
    "alibi": {},
    "alibi2d": {},
    "lh45": {"name": "lookhere", "layer": 1, "depth": 3, "preset": "lh45"},
    "lh90": {"name": "lookhere", "layer": 0, "depth": 3},
    "lh180": {"name": "lookhere", "layer": 2, "depth": 3, "preset": "lh180"},
    "rescaled": {"name": "lookhere", "layer": 0, "depth": 1, "reference_shape": (5, 9), "extrapolate": False},
}
GRIDS = {"one_block": ((5, 7), 1), "ragged": ((13, 21), 0), "prefix": ((17, 20), 5)}


def build(name, grid, batched=False):
    encoding = vp.create_encoding({"name": name, "num_heads": 12, **ENCODINGS[name]})
    positions = vp.Positions.grid(*GRIDS[grid])
    if batched:
        kept = torch.rand(2, positions.num_patches, generator=torch.Generator().manual_seed(0)).argsort(1)
        positions = positions.keep(kept[:, : positions.num_patches * 3 // 4])
    return encoding, positions


def evaluated(encoding, positions):
    """The bias between all tokens, -inf where the mask hides a pair, and the block mask."""
    score_mod, blocks = modifiers(*coordinates.pairwise(encoding, positions))
    batch = positions.coords.shape[0] if positions.is_batched else 1
    tokens = torch.arange(positions.num_tokens)
    index = torch.arange(batch)[:, None, None, None], torch.arange(12)[:, None, None], tokens[:, None], tokens
    bias = score_mod(torch.zeros(batch, 12, len(tokens), len(tokens)), *index)
    if blocks is not None:
        bias = bias.masked_fill(~blocks.mask_mod(*index), float("-inf"))
    return bias, blocks


@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("name", ENCODINGS)
def test_the_formula_is_the_bias_of_the_encoding(name, grid, batched):
    encoding, positions = build(name, grid, batched)
    got, expected = evaluated(encoding, positions)[0], encoding.bias(positions)
    expected = expected if batched else expected[None]
    hidden = expected <= -1e4
    assert torch.equal(got.isneginf(), hidden)
    assert hidden.any() == (encoding.half_planes() is not None)
    assert (got - expected)[~hidden].abs().max() <= 1e-5 * expected[~hidden].abs().max()


@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("name", ["lh45", "lh90", "lh180", "rescaled"])
def test_blocks_hold_all_that_is_seen(name, grid, batched):
    encoding, positions = build(name, grid, batched)
    bias, blocks = evaluated(encoding, positions)
    rest = -positions.num_tokens % BLOCK
    seen = torch.nn.functional.pad(~bias.isneginf(), (0, rest, 0, rest))
    seen = seen.unflatten(-1, (-1, BLOCK)).unflatten(-3, (-1, BLOCK))  # (B, heads, blocks, BLOCK, blocks, BLOCK)

    def listed(count, index):
        return torch.zeros_like(index, dtype=torch.bool).scatter(
            -1, index.long(), torch.arange(index.shape[-1]) < count[..., None]
        )

    partial = listed(blocks.kv_num_blocks, blocks.kv_indices)
    full = listed(blocks.full_kv_num_blocks, blocks.full_kv_indices)
    assert not (seen.any(-1).any(-2) & ~(partial | full)).any()
    assert not (full & ~seen.all(-1).all(-2)).any()
    assert not (partial & full).any()


def test_blocks_are_skipped():
    encoding = vp.create_encoding("lookhere", num_heads=12, layer=0, depth=1)
    positions = vp.Positions.grid((48, 64))
    blocks = modifiers(*coordinates.pairwise(encoding, positions))[1]
    listed = (blocks.kv_num_blocks + blocks.full_kv_num_blocks).sum(-1)[0] / blocks.kv_num_blocks.shape[-1] ** 2
    assert listed[-1] == 1  # an undirected head sees everything
    assert listed[4] < 0.55  # one that looks up; those that look aside find keys in every block, which has two rows


@pytest.mark.parametrize("name", ["alibi2d", "lh90"])
def test_gradients_of_attention(name):
    encoding, positions = build(name, "prefix")
    generator = torch.Generator().manual_seed(0)
    qkv = [torch.randn(1, 12, positions.num_tokens, 16, generator=generator).requires_grad_() for _ in range(3)]
    exact = [x.detach().double().requires_grad_() for x in qkv]
    q, k, v = exact
    expected = (q @ k.transpose(-2, -1) * 0.3 + evaluated(encoding, positions)[0]).softmax(-1) @ v
    got = kernels.coordinate_attention(*qkv, encoding, positions, 0.3)
    grads = torch.autograd.grad(got.cos().sum(), qkv), torch.autograd.grad(expected.cos().sum(), exact)
    for a, b in zip((got, *grads[0]), (expected, *grads[1]), strict=True):
        assert (a - b).abs().max() <= 1e-5 * b.abs().max()


@needs_newer_torch
def test_where_coordinates_are_taken():
    encoding, positions = build("alibi2d", "prefix")
    table = vp.create_encoding("relative_table", num_heads=12, feat_shape=(17, 20))
    assert not kernels.takes_coordinates(encoding, positions)  # on a CPU
    with FakeTensorMode(allow_non_fake_inputs=True):
        for grid, taken in (((63, 64), False), ((64, 64), True)):
            assert kernels.takes_coordinates(encoding, vp.Positions.grid(grid, device="cuda")) == taken
    with kernels.use("fused"):
        assert kernels.takes_coordinates(encoding, positions)
        assert not kernels.takes_coordinates(table, positions)
    with kernels.use("plain"):
        assert not kernels.takes_coordinates(encoding, positions)


def test_queries_wider_than_values_take_the_plain_way():
    """After PoPE queries and keys have twice the channels of values."""
    encoding, positions = build("alibi2d", "prefix")
    q, k, v = (torch.randn(1, 12, positions.num_tokens, width) for width in (32, 32, 16))
    assert coordinates.why_unsupported(q, k, v, encoding, positions, 0.25).startswith("queries of 32")
    assert coordinates.why_unsupported(q, k, q, encoding, positions, 0.25) == ""
    got = kernels.coordinate_attention(q, k, v, encoding, positions, 0.25)
    want = (q @ k.mT / 4 + encoding.bias(positions)).softmax(-1) @ v
    assert (got - want).abs().max() < 1e-5


ALIBI2D = type(vp.create_encoding("alibi2d", num_heads=1))


class Twice:
    def encode(self, queries, keys):
        return 2 * super().encode(queries, keys)


class Doubled(ALIBI2D):
    encode = Twice.encode


class MixedIn(Twice, ALIBI2D):
    pass


class Renamed(ALIBI2D):
    pass


class FormulaOfItsOwn(Doubled):
    def formula(self, positions):
        single = ALIBI2D.formula(self, positions)
        return lambda head, dy, dx: 2 * single(head, dy, dx)


class Learned(vp.BiasEncoding):
    learnable = True

    def formula(self, positions):
        return lambda head, dy, dx: -torch.abs(dy)


@pytest.mark.parametrize(
    ("cls", "has"), [(Doubled, False), (MixedIn, False), (Renamed, True), (FormulaOfItsOwn, True), (Learned, False)]
)
def test_a_subclass_that_computes_another_bias_has_no_formula(cls, has):
    with kernels.use("fused"):
        assert kernels.takes_coordinates(cls(12), vp.Positions.grid((4, 6))) is has


@pytest.fixture
def ring(monkeypatch):
    """The encoding of the page on own encodings."""
    monkeypatch.setattr("visionpos.registry._REGISTRY", dict(_REGISTRY))
    block = re.search(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL).group(1)
    scope = {"__name__": "ring"}
    exec(block, scope)
    return scope["Ring"]


class Quadrants(vp.BiasEncoding):
    """Head h falls with the distance between rows and sees what lies below and to one side of the query."""

    def formula(self, positions):
        return lambda head, dy, dx: -torch.abs(dy) / (head + 1) + 0 * dx

    def half_planes(self):
        side = 1 - 2 * (torch.arange(self.num_heads) % 2)
        return torch.stack([torch.stack([0 * side + 1, 0 * side], -1), torch.stack([0 * side, side], -1)], dim=1)


@needs_newer_torch
@pytest.mark.unhooked
@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("name", ["ring", "quadrants", "example", "lookhere"])
def test_flex_attention_takes_any_formula(name, batched, ring):
    """FlexAttention in eager mode: an encoding that it has never heard of, against the bias in memory."""
    encoding = {
        "ring": lambda: ring(3),
        "quadrants": lambda: Quadrants(3),
        "example": lambda: coordinates.Example(3, hides=True),
        "lookhere": lambda: vp.create_encoding("lookhere", num_heads=3, layer=0, depth=1),
    }[name]()
    positions = vp.Positions.grid((9, 17), 2)
    if batched:
        positions = positions.keep(torch.stack([torch.arange(135), torch.arange(152, 17, -1)]))
    assert coordinates.has_formula(encoding, positions)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 3, positions.num_tokens, 16, generator=generator) for _ in range(3))
    score_mod, blocks = modifiers(*coordinates.pairwise(encoding, positions))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it is not compiled
        got = flex_attention(q, k, v, score_mod=score_mod, block_mask=blocks, scale=0.3)
    assert (got - coordinates.reference(q, k, v, encoding, positions, 0.3)).abs().max() < 1e-5


def test_a_model_with_a_formula_of_ones_own_hands_it_on(ring, monkeypatch):
    options = {"img_size": (24, 40), "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 3}
    model, images = (
        vp.create_model("vit_tiny_patch16_224", encoding="ring", **options).eval(),
        torch.randn(2, 3, 24, 40),
    )
    calls, expected = [], model(images)

    def plain(*args):
        calls.append(args[3].name)
        return coordinates.reference(*args)

    monkeypatch.setattr(attention, "takes_coordinates", coordinates.has_formula)
    monkeypatch.setattr(attention, "coordinate_attention", plain)
    assert (model(images) - expected).abs().max() < 1e-6
    assert calls == ["ring", "ring"]


def test_the_folder_knows_no_encoding():
    lines = [line for path in Path(kernels.__file__).parent.glob("*.py") for line in path.read_text().splitlines()]
    imports = [line for line in lines if re.match(r"\s*(from|import) ", line)]
    assert not [line for line in imports if re.search(r"\.\.(bias|input|conditional|registry)\b", line)]
    assert not [line for line in lines for name in vp.list_encodings() if re.search(rf"[\"']{name}[\"']", line)]


def test_gradients_on_a_cpu_are_one_line():
    encoding, positions = build("alibi2d", "one_block")
    q, k, v = (torch.randn(1, 12, positions.num_tokens, 16, requires_grad=True) for _ in range(3))
    with (
        kernels.use("fused"),
        pytest.raises(ValueError, match="coordinate_attention cannot run fused: FlexAttention has"),
    ):
        kernels.coordinate_attention(q, k, v, encoding, positions, 0.25)


@pytest.mark.slow
@pytest.mark.unhooked
@pytest.mark.parametrize(("name", "batched"), [("alibi2d", False), ("lh90", True)])
def test_compiled(name, batched):
    encoding, positions = build(name, "prefix", batched)
    q, k, v = (torch.randn(2, 12, positions.num_tokens, 16) for _ in range(3))
    expected = kernels.coordinate_attention(q, k, v, encoding, positions, 0.3)
    with kernels.use("fused"):
        got = kernels.coordinate_attention(q, k, v, encoding, positions, 0.3)
    assert kernels.report()["coordinate_attention"] == "fused"
    assert (got - expected).abs().max() < 1e-5


@pytest.mark.slow
@pytest.mark.unhooked
@pytest.mark.parametrize("name", ["ring", "lookhere"])
def test_many_tokens_on_a_gpu_are_traced_with_flex_attention(name, ring, monkeypatch):
    """With stand-in tensors: Dynamo takes the whole model with the formula and the blocks in it, as one graph."""
    monkeypatch.setattr(coordinates, "FLEX_MIN_TOKENS", 24 * 28)
    monkeypatch.setattr(choose, "missing_triton", lambda: "")
    monkeypatch.setattr(choose, "selftest", lambda *args: 1 / 0)  # FlexAttention compiles: not in a trace
    torch._dynamo.reset()
    options = {"img_size": (96, 112), "patch_size": 4, "embed_dim": 48, "depth": 1, "num_heads": 3, "num_classes": 5}
    model, graphs = vp.create_model("vit_tiny_patch16_224", encoding=name, **options), []

    class Seen(BaseException):
        """All that this is about."""

    def backend(graph, example):
        graphs.append(graph)
        raise Seen

    with FakeTensorMode(allow_non_fake_inputs=True):
        model._apply(lambda x: torch.empty(x.shape, dtype=x.dtype, device="cuda"))
        images = torch.empty(2, 3, 96, 112, device="cuda")
        with pytest.raises(Seen), torch.no_grad():
            torch.compile(model, dynamic=False, fullgraph=True, backend=backend)(images)
    (node,) = [node for node in graphs[0].graph.nodes if "flex" in str(node.target)]
    assert node.target.name() == "flex_attention"
    made = [arg.target for arg in node.args[7] if "materialize" in str(arg.target)]
    assert len(made) == 2  # y and x, for inductor cannot put what is padded or concatenated into the kernel
    assert node.args[6].items() >= TILES.items()
    assert kernels.report()["coordinate_attention"] == "fused"


@needs_newer_torch
@pytest.mark.parametrize(("device", "head_dim", "tiles"), [("cuda", 64, TILES), ("cuda", 80, None), ("cpu", 64, None)])
def test_tiles_are_those_of_narrow_heads_on_a_gpu(device, head_dim, tiles, monkeypatch):
    seen = {}

    def compiled(q, k, v, **options):
        seen.update(options)
        return q

    monkeypatch.setattr(coordinates_flex, "_compiled", compiled)
    encoding = vp.create_encoding("alibi2d", num_heads=2)
    with FakeTensorMode(allow_non_fake_inputs=True):
        q = torch.empty(1, 2, 35, head_dim, device=device)
        coordinates.fused(q, q, q, encoding, vp.Positions.grid((5, 7), device=device), 0.1)
    assert seen.get("kernel_options") == tiles


def test_many_sizes_stay_compiled(monkeypatch):
    """Of one function torch compiles 8 graphs, and then computes the scores of all pairs in memory."""
    limits = []

    def compiled(q, k, v, **options):
        assert choose.one_thread.locked()
        limits.append((torch._dynamo.config.recompile_limit, torch._dynamo.config.accumulated_recompile_limit))
        return q

    before = torch._dynamo.config.recompile_limit
    monkeypatch.setattr(coordinates_flex, "_compiled", compiled)
    q = torch.zeros(1, 12, 36, 16)
    coordinates.fused(q, q, q, *build("alibi2d", "one_block"), 0.1)
    assert limits == [(coordinates_flex.MAX_GRAPHS, coordinates_flex.MAX_GRAPHS)]
    assert torch._dynamo.config.recompile_limit == before
