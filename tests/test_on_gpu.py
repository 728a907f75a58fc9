"""What a GPU computes is what the CPU computes: every encoding, every host family, in every precision and path."""

import copy

import pytest
import torch

import visionpos as vp
from visionpos import kernels

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.unhooked,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]

SIZE = (32, 48)
VIT = {"img_size": SIZE, "patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 2, "num_classes": 5}
SWIN = {
    **{"img_size": SIZE, "patch_size": 2, "window_size": 4, "embed_dim": 32, "depths": (2, 2), "num_heads": (1, 2)},
    **{"num_classes": 5, "drop_path_rate": 0.0},
}
HOSTS = {
    "vit_tiny_patch16_224": VIT,
    "eva02_tiny_patch14_224": {**VIT, "embed_dim": 48},
    "beit_base_patch16_224": VIT,
    "swin_tiny_patch4_window7_224": SWIN,
    "swinv2_tiny_window8_256": SWIN,
}


def train_step(model, images, dtype=None):
    """The output and the gradients of a step, on the CPU in float32."""
    with torch.autocast(images.device.type, dtype=dtype, enabled=dtype is not None):
        out = model(images)
    out.float().square().sum().backward()
    gradients = {name: p.grad.float().cpu() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return out.detach().float().cpu(), gradients


def assert_same(found, expected, tolerance):
    for one, other in zip((found[0], *found[1].values()), (expected[0], *expected[1].values()), strict=True):
        assert (one - other).abs().max() <= tolerance * other.abs().max().clamp(min=1e-3)


def both(name, encoding):
    torch.manual_seed(0)
    model = vp.create_model(name, encoding=encoding, **HOSTS[name])
    images = torch.randn(3, 3, *SIZE)
    return train_step(model, images), copy.deepcopy(model).cuda(), images.cuda()


@pytest.fixture(autouse=True)
def exact_products():
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


@pytest.mark.parametrize("encoding", vp.list_encodings())
def test_every_encoding_in_float32(encoding):
    expected, model, images = both("vit_tiny_patch16_224", encoding)
    assert_same(train_step(model, images), expected, 1e-4)


@pytest.mark.parametrize("name", HOSTS)
@pytest.mark.parametrize("encoding", ["none", "sincos2d+rope_axial", "relative_table", "alibi2d"])
def test_every_host_in_float32_and_bf16(name, encoding):
    expected, model, images = both(name, encoding)
    assert_same(train_step(model, images), expected, 1e-4)
    out, gradients = train_step(model, images, torch.bfloat16)
    assert (out - expected[0]).abs().max() < 0.05 * expected[0].abs().max()
    assert all(gradient.isfinite().all() for gradient in gradients.values())


@pytest.mark.parametrize("name", HOSTS)
def test_compiled_is_eager(name):
    _, model, images = both(name, "sincos2d+rope_axial")
    expected = train_step(model, images)
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True)
    with torch.no_grad():
        assert (compiled(images).cpu() - expected[0]).abs().max() < 1e-4 * expected[0].abs().max()


@pytest.mark.parametrize("encoding", ["alibi2d", "lookhere"])
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("prefix", [False, True])
def test_many_tokens_go_through_flex_attention(encoding, compiled, prefix, monkeypatch):
    torch.manual_seed(0)
    options = VIT | {"img_size": (192, 208), "class_token": prefix, "global_pool": "avg"}  # 24 x 26 tokens
    model = vp.create_model("vit_tiny_patch16_224", encoding=encoding, **options).cuda()
    images = torch.randn(2, 3, 192, 208, device="cuda")
    with kernels.use("plain"):
        expected = train_step(model, images, torch.bfloat16)
    torch.compiler.reset()
    kernels.choose._selftests.clear()  # the first use is inside a trace, where no other graph can be compiled
    monkeypatch.setattr(kernels.coordinates, "FLEX_MIN_TOKENS", 600)
    assert_same(train_step(torch.compile(model) if compiled else model, images, torch.bfloat16), expected, 0.05)
    assert kernels.report()["coordinate_attention"] == "fused"


@pytest.mark.parametrize(
    ("name", "encoding"),
    [("vit_tiny_patch16_224", "rope_axial"), ("swin_tiny_patch4_window7_224", "relative_table")],
)
def test_on_another_stream_and_in_a_captured_graph(name, encoding):
    _, model, images = both(name, encoding)
    model.eval()
    with torch.no_grad(), torch.autocast("cuda", torch.bfloat16, cache_enabled=False):
        expected, flipped = model(images), model(images.flip(0))
        stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            found = model(images)
        stream.synchronize()
        with torch.cuda.graph(graph):
            captured = model(images)
        images.copy_(images.flip(0))
        graph.replay()
    assert torch.equal(found, expected)
    assert torch.equal(captured, flipped)
    assert "fused" in kernels.report().values()


def test_an_empty_batch():
    bf16 = {"device": "cuda", "dtype": torch.bfloat16, "requires_grad": True}
    with kernels.use("fused"):
        q, k, v = kernels.rotate_qkv(torch.empty(0, 5, 3, 2, 16, **bf16), torch.ones(2, 1, 5, 8, device="cuda"), "half")
        out = kernels.window_attention(
            torch.empty(0, 8, 12, 3, 2, 16, **bf16), torch.ones(2, 16, 16, device="cuda"), (4, 4), (2, 2), 0.3
        )
    (q + k + v).sum().backward()
    out.sum().backward()
    assert q.shape == v.shape == (0, 2, 5, 16)
    assert out.shape == (0, 8, 12, 2, 16)


@pytest.mark.parametrize("encoding", ["alibi2d", "lookhere", "relative_table"])
def test_gradients_are_finite_where_cudnn_gives_nan(encoding):
    torch.manual_seed(0)
    options = VIT | {"img_size": (32, 128), "class_token": False, "global_pool": "avg"}  # 4 x 16 tokens
    model = vp.create_model("vit_tiny_patch16_224", encoding=encoding, **options).cuda()
    with torch.no_grad():
        for block in model.blocks:  # queries and keys that are opposite: every logit is about -128 sqrt(32)
            block.attn.qkv.bias[:64], block.attn.qkv.bias[64:128] = 4, -128 / 4
    _, gradients = train_step(model, torch.randn(2, 3, 32, 128, device="cuda"), torch.bfloat16)
    assert all(gradient.isfinite().all() for gradient in gradients.values())


def test_a_masked_autoencoder():
    torch.manual_seed(0)
    encoder = vp.create_model("vit_tiny_patch16_224", encoding="rope_axial", **VIT | {"num_classes": 0})
    mae, images = vp.MaskedAutoencoder(encoder, 32, 1, 2), torch.randn(3, 3, *SIZE)
    mask = mae.draw_mask(images, torch.Generator().manual_seed(0))
    expected = mae(images, mask).loss.item()
    mae, images = mae.cuda(), images.cuda()
    assert mae(images, type(mask)(*(part.cuda() for part in mask))).loss.item() == pytest.approx(expected, rel=1e-4)
    drawn = mae.draw_mask(images, torch.Generator("cuda").manual_seed(0))
    assert drawn.keep.is_cuda
