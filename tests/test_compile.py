"""torch.compile and torch.export; run without the shape-checking hook, which they do not understand."""

import copy

import pytest
import timm
import torch

import visionpos as vp

pytestmark = pytest.mark.unhooked


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()


def vit():
    torch.manual_seed(0)
    options = {"img_size": (16, 24), "patch_size": 4, "num_classes": 5, "embed_dim": 48, "depth": 1, "num_heads": 3}
    return timm.create_model("vit_tiny_patch16_224", **options)


@pytest.mark.parametrize("name", vp.list_encodings())
def test_vit_traces_as_one_graph(name):
    """fullgraph: dynamo must take the whole model; the backend that compiles is tried below."""
    model, x = vp.set_encoding(vit(), name), torch.randn(2, 3, 16, 24)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert (compiled(x) - model(x)).abs().max() < 1e-5
    compiled(x).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_vit_compiled_by_inductor():
    model, x = vp.set_encoding(vit().eval(), "learned+rope_axial+alibi2d"), torch.randn(2, 3, 16, 24)
    assert (torch.compile(model, fullgraph=True)(x) - model(x)).abs().max() < 1e-5


@pytest.mark.parametrize("name", ["learned+relative_table", "rope_axial"])
def test_swin_traces_as_one_graph(name):
    model = timm.create_model(
        "swin_tiny_patch4_window7_224", img_size=(32, 64), window_size=4, num_classes=5, depths=(2,), num_heads=(3,)
    )
    vp.set_encoding(model, name).eval()
    x = torch.randn(1, 3, 32, 64)
    assert (torch.compile(model, fullgraph=True, backend="aot_eager")(x) - model(x)).abs().max() < 1e-5


@pytest.mark.parametrize("name", ["learned", "rope_axial", "sincos2d+alibi2d", "relative_table"])
def test_export(name):
    model, x = vp.set_encoding(vit().eval(), name), torch.randn(1, 3, 16, 24)
    exported = torch.export.export(model, (x,)).module()
    assert (exported(x) - model(x)).abs().max() < 1e-6
    copy.deepcopy(model)(x)  # nothing of the trace is left behind
