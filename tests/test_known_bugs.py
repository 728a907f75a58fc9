"""Bugs that position code had elsewhere, 1 to 11 of 26: precision and state.

Each test puts its bug back and must notice it. The others are in test_known_bugs_of_*.py.
"""

import contextlib
import copy
import pickle
import random

import pytest
import torch
import torch.distributed
import torch.multiprocessing
from timm.utils import ModelEmaV3
from torch._dynamo.testing import CompileCounter
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

import visionpos as vp
from tests.bugs import (
    ENCODINGS,
    PARALLEL_SIZES,
    SIZE,
    cached_tensor,
    descend,
    from_buffer,
    loss_of,
    parallel_model,
    put_back,
    train_in_parallel,
    vit,
    with_buffer,
)
from tests.small import pictures, swin
from visionpos import places
from visionpos.bias.relative_table import RelativeTable
from visionpos.probe import GRID, output, raw, small_encoding
from visionpos.registry import get_encoding_class
from visionpos.rotary.rope_axial import RopeAxial
from visionpos.rotary.rope_mixed import RopeMixed

ROTARY = vp.list_encodings(place="rotary")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def create(name, grid=GRID):
    return small_encoding(get_encoding_class(name), grid)


RIGHT_ENCODE = RopeAxial.encode


def test_bug_01_frequencies_rounded_by_to():
    def check(name):
        for grid in ((8, 12), (512, 1), (1, 511)):
            positions = vp.Positions.grid(grid)
            exact_positions = vp.Positions(positions.coords.double(), grid)
            for dtype in DTYPES:
                encoding, exact = create(name, grid).to(dtype), create(name, grid).double()
                exact.load_state_dict(encoding.state_dict())  # learned frequencies are what they were rounded to
                q = torch.ones(1, 4, positions.num_patches, 16)
                want, _ = exact(q.double(), q.double(), exact_positions)
                assert (encoding(q, q, positions)[0] - want).abs().max() < 2e-5, (grid, dtype)

    for name in ROTARY:
        check(name)
    with put_back(RopeAxial, __init__=with_buffer, encode=from_buffer):
        check("rope_axial")


def test_bug_02_autocast_in_the_computation_of_angles():
    def check(name):
        cls = get_encoding_class(name)
        anywhere = cls.continuous and cls.extrapolation not in ("resize", "error")
        for offset in (0, 65536) if anywhere else (0,):
            encoding, positions = create(name), vp.Positions(vp.Positions.grid(GRID).coords + offset, GRID)
            outside = raw(encoding, positions)
            with torch.autocast("cpu", torch.bfloat16):
                assert torch.equal(raw(encoding, positions), outside), offset

    for name in ENCODINGS:
        check(name)
    far = vp.Positions(vp.Positions.grid(GRID).coords + 65536, GRID)
    with torch.autocast("cpu", torch.bfloat16):
        assert len(create("rope_axial").angles(far)[0].unique(dim=0)) == 15  # no two places are the same
    for name, place in (("fourier", places.input), ("log_cpb", places.bias)):  # they multiply matrices
        with put_back(place, full_precision=lambda positions: contextlib.nullcontext()):
            check(name)


def test_bug_03_output_in_another_dtype():
    def check(name):
        for dtype in DTYPES:
            assert output(create(name), vp.Positions.grid(GRID, 2), dtype).dtype == dtype, dtype

    for name in ENCODINGS:
        check(name)
    right = places.rotary.rotate
    with put_back(places.rotary, rotate=lambda x, cos, sin, layout: right(x.float(), cos, sin, layout)):
        check("rope_axial")


@pytest.mark.parametrize("compiling", [False, True])  # the rotation has a form for eager mode and one for compilers
@pytest.mark.parametrize("layout", ["interleaved", "half"])
def test_bug_04_rotation_rounded_more_than_once(layout, compiling, monkeypatch):
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: compiling)
    encoding = vp.create_encoding("rope_axial", num_heads=2, head_dim=16, layout=layout)
    positions = vp.Positions.grid((40, 64))
    exact_positions = vp.Positions(positions.coords.double(), (40, 64))

    def check():
        for dtype in DTYPES:
            q = torch.randn(1, 2, 2560, 16, generator=torch.Generator().manual_seed(0)).to(dtype)
            exact, _ = encoding(q.double(), q.double(), exact_positions)
            error = (encoding(q, q, positions)[0].double() - exact).abs()
            assert (error <= exact.abs() * torch.finfo(dtype).eps / 2 + 1e-6).all(), dtype

    check()
    right = places.rotary.rotate

    def with_rounded_table(x, cos, sin, layout):
        return right(x, cos.to(x.dtype).float(), sin.to(x.dtype).float(), layout)

    with put_back(places.rotary, rotate=with_rounded_table):
        check()


@pytest.mark.parametrize("host", [vit, swin])
def test_bug_05_buffers_after_meta_initialisation(host):
    x = pictures() if host is vit else pictures((64, 96))

    def check(name):
        source = vp.set_encoding(host(), name)
        with torch.device("meta"):
            model = vp.set_encoding(host(), name)
        model.to_empty(device="cpu")
        for tensor in [*model.parameters(), *model.buffers()]:
            tensor.data.fill_(float("nan") if tensor.is_floating_point() else 0)
        model.load_state_dict(source.state_dict(), strict=True)
        for module in model.modules():
            if hasattr(module, "init_non_persistent_buffers"):
                module.init_non_persistent_buffers()
        assert torch.equal(model(x), source(x)), name

    for name in ENCODINGS if host is vit else ("relative_table", "log_cpb", "rope_mixed", "lookhere"):
        check(name)
    with put_back(RelativeTable, reinit_buffers=lambda self: None):
        check("relative_table")


def test_bug_06_copies_after_a_backward():
    def check(name):
        encoding, positions = create(name), vp.Positions.grid(GRID)
        want = output(encoding, positions)
        if encoding.learnable:
            want.sum().backward()
        copies = [copy.deepcopy(encoding), pickle.loads(pickle.dumps(encoding))]
        if encoding.learnable:
            copies.append(ModelEmaV3(encoding).module)
        for copied in copies:
            assert torch.equal(output(copied, positions), want)

    for name in ENCODINGS:
        check(name)
    with put_back(RopeMixed, RuntimeError, encode=cached_tensor):  # only leaves can be copied
        check("rope_mixed")


def test_bug_07_inference_mode_before_training():
    def check(name):
        model, fresh = vp.set_encoding(vit(), name), vp.set_encoding(vit(), name)
        with torch.inference_mode():
            model(pictures())
        for each in (model, fresh):
            each.train()(pictures()).square().sum().backward()
        for got, want in zip(model.parameters(), fresh.parameters(), strict=True):
            assert got.grad is not None
            assert torch.equal(got.grad, want.grad)

    for name in ENCODINGS:
        check(name)
    with put_back(RopeMixed, encode=cached_tensor):
        check("rope_mixed")


def test_bug_08_cache_with_too_short_a_key():
    def check(name):
        draw, encoding = random.Random(0), create(name)
        for _ in range(20):
            positions = vp.Positions.grid(draw.choice([(3, 5), (5, 3), (1, 15), (2, 6)]), draw.randrange(3))
            dtype = draw.choice(DTYPES)
            with torch.inference_mode(draw.random() < 0.5):
                got = output(encoding.train(draw.random() < 0.5), positions, dtype)
            assert torch.equal(got, output(create(name), positions, dtype)), positions.feat_shape

    for name in ENCODINGS:
        check(name)

    def by_token_count(self, positions):
        cache = self.__dict__.setdefault("cache", {})
        return cache.setdefault(positions.num_patches, RIGHT_ENCODE(self, positions))

    with put_back(RopeAxial, encode=by_token_count):
        check("rope_axial")


def test_bug_09_state_of_a_forward_pass_in_the_module():
    def check(name):
        encoding = create(name)
        shapes = {key: buffer.shape for key, buffer in encoding.named_buffers()}
        for grid in (GRID, (5, 9)):
            output(encoding, vp.Positions.grid(grid, 1))
            assert {key: buffer.shape for key, buffer in encoding.named_buffers()} == shapes
            for module in encoding.modules():
                assert not any(isinstance(value, torch.Tensor) for value in vars(module).values())

    for name in ENCODINGS:
        check(name)
    with put_back(RopeMixed, encode=cached_tensor):
        check("rope_mixed")


@pytest.mark.slow
def test_bug_09_processes_at_different_sizes(tmp_path):
    """Ten steps of two processes, each at its own size, equal those of one process that averages the gradients."""
    torch.multiprocessing.spawn(train_in_parallel, (str(tmp_path), False), nprocs=2)
    model = parallel_model()
    for _ in range(10):
        sum(loss_of(model, size) / 2 for size in PARALLEL_SIZES).backward()
        descend(model)
    for rank in (0, 1):
        for key, value in torch.load(tmp_path / f"{rank}.pt").items():
            assert (value - model.state_dict()[key]).abs().max() < 1e-5, key
    with pytest.raises((torch.multiprocessing.ProcessRaisedException, torch.multiprocessing.ProcessExitedException)):
        torch.multiprocessing.spawn(train_in_parallel, (str(tmp_path), True), nprocs=2)


@pytest.fixture
def process_group(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_bug_10_tables_cast_by_sharded_mixed_precision(process_group):
    """FSDP2 in bfloat16 casts parameters, and FSDP1 every buffer: what is computed must still be in float32.

    One process, gloo: sharding itself is torch's; what it casts is the same for any number of processes.
    """

    def check(name):
        model = vp.set_encoding(vit(), name)
        for block in (*model.blocks, model):
            fully_shard(block, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
        (encoding,) = vp.get_encoding(model)
        for buffer in encoding.buffers():
            if buffer.is_floating_point():  # FSDP1
                buffer.data = buffer.bfloat16().float()
        seen = []
        prepare = encoding.prepare
        encoding.prepare = lambda positions: seen.append(prepare(positions)) or seen[0]
        assert model(pictures()).dtype == torch.bfloat16
        (plain,) = vp.get_encoding(vp.set_encoding(vit(), name))
        assert torch.equal(seen[0], plain.prepare(vp.Positions.grid((8, 12), 1)))

    names = [n for n in ENCODINGS if not get_encoding_class(n).learnable and get_encoding_class(n).place != "input"]
    for name in names:
        check(name)
    with put_back(RopeAxial, __init__=with_buffer, encode=from_buffer):
        check("rope_axial")


@pytest.mark.slow
@pytest.mark.unhooked
def test_bug_11_compiled_again_at_every_step():
    def check():
        torch._dynamo.reset()
        counter = CompileCounter()
        model = vp.set_encoding(vit(dynamic_img_size=True), "rope_axial").requires_grad_(False)
        compiled = torch.compile(model, fullgraph=True, backend=counter, dynamic=False)
        for size in (SIZE, (40, 24), (24, 40)) * 2:
            assert torch.equal(compiled(pictures(size)), model(pictures(size)))
        assert counter.frame_count == 3, "one graph for each size, none for a size that was seen"

    check()

    def counts(self, positions):
        self.calls = getattr(self, "calls", 0) + 1
        return RIGHT_ENCODE(self, positions)

    with put_back(RopeAxial, encode=counts):
        check()
