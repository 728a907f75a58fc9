"""Which of torch's backends gets attention with a bias: seen without a GPU, on stand-in CUDA tensors."""

import sys
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

import visionpos as vp
from tests.small import needs_newer_torch
from visionpos import kernels
from visionpos.kernels import sdpa

pytestmark = [pytest.mark.unhooked, needs_newer_torch]


@pytest.fixture
def seen(monkeypatch):
    """Whether cuDNN may run, for every call of torch's fused attention."""
    calls, plain = [], F.scaled_dot_product_attention

    def recording(*args, **options):
        calls.append(torch.backends.cuda.cudnn_sdp_enabled())
        return plain(*args, **options)

    monkeypatch.setattr(sdpa.F, "scaled_dot_product_attention", recording)
    return calls


def run(tokens, biased=True, device="cuda"):
    with FakeTensorMode():
        q = torch.empty(2, 3, tokens, 16, device=device, dtype=torch.bfloat16)
        bias = torch.empty(1, 3, tokens, tokens, device=device, dtype=torch.bfloat16) if biased else None
        assert sdpa.attention(q, q, q, bias, 0.25).shape == q.shape


@pytest.mark.parametrize(
    ("tokens", "biased", "allowed"), [(64, True, False), (320, True, False), (64, False, True), (65, True, True)]
)
def test_cudnn_is_kept_from_biases_of_64_keys_more_than_a_multiple_of_128(tokens, biased, allowed, seen):
    run(tokens, biased)
    assert seen == [allowed]
    assert torch.backends.cuda.cudnn_sdp_enabled()  # again


def test_without_gradients_and_on_a_cpu_nothing_is_kept_from_it(seen):
    with torch.no_grad():
        run(64)
    run(64, device="cpu")
    assert seen == [True, True]


def test_threads_do_not_leave_each_others_choice_behind(monkeypatch):
    tokens = SimpleNamespace(is_cuda=True, shape=(2, 3, 64, 16))  # no stand-in tensors: threads would share their mode
    monkeypatch.setattr(sdpa.F, "scaled_dot_product_attention", lambda *args, **options: time.sleep(0))
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(lambda _: sdpa.attention(tokens, tokens, tokens, tokens, 0.25), range(2000)))
    finally:
        sys.setswitchinterval(interval)
    assert torch.backends.cuda.cudnn_sdp_enabled()


SWIN = {"embed_dim": 32, "depths": (1,), "num_heads": (1,), "window_size": 8, "img_size": (32, 64)}
VIT = {"embed_dim": 32, "depth": 1, "num_heads": 1, "img_size": (16, 64), "class_token": False, "global_pool": "avg"}


@pytest.mark.parametrize(
    ("name", "options"),
    [("vit_tiny_patch16_224", VIT), ("eva02_tiny_patch14_224", VIT), ("swinv2_tiny_window8_256", SWIN)],
)
def test_a_model_of_64_tokens(name, options, seen):
    model = vp.create_model(name, encoding="alibi2d", patch_size=4, **options).train()
    with FakeTensorMode(allow_non_fake_inputs=True), kernels.use("plain"):
        model._apply(lambda x: torch.empty(x.shape, dtype=x.dtype, device="cuda"))
        model(torch.empty(2, 3, *options["img_size"], device="cuda"))
    assert seen == [False]


def test_in_one_graph():
    graphs = []

    def keep(graph, example):
        graphs.append(graph.code)
        return graph.forward

    compiled = torch.compile(sdpa.attention, fullgraph=True, backend=keep)
    with FakeTensorMode():
        q, bias = torch.empty(2, 3, 64, 16, device="cuda"), torch.empty(1, 3, 64, 64, device="cuda")
        compiled(q, q, q, bias, 0.25)
    chosen = graphs[0].partition("scaled_dot_product_attention(")[0]
    assert "_sdpa_kernel" in chosen
    assert "CUDNN" not in chosen
