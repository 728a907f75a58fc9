"""torch.compile and torch.export; run without the shape-checking hook, which they do not understand."""

import copy

import pytest
import timm
import torch

import visionpos as vp
from tests.small import in_turn

pytestmark = pytest.mark.unhooked


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()


def vit(**more):
    torch.manual_seed(0)
    options = {"img_size": (16, 24), "patch_size": 4, "num_classes": 5, "embed_dim": 48, "depth": 1, "num_heads": 3}
    return timm.create_model("vit_tiny_patch16_224", **options, **more)


@pytest.mark.parametrize("name", in_turn(vp.list_encodings(), 0))
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


DYNAMIC = ({2: torch.export.Dim.DYNAMIC, 3: torch.export.Dim.DYNAMIC},)
SIZES = [(16, 24), (24, 40), (48, 32)]  # the first is the model's own; none is the one that is traced


@pytest.mark.parametrize("name", ["learned", "rope_axial", "sincos2d+alibi2d", "relative_table", "rope_mixed"])
def test_one_export_serves_other_sizes(name):
    model = vp.set_encoding(vit(dynamic_img_size=True).eval(), name)
    exported = torch.export.export(model, (torch.randn(1, 3, 40, 48),), dynamic_shapes=DYNAMIC).module()
    for size in SIZES:
        x = torch.randn(1, 3, *size)
        assert (exported(x) - model(x)).abs().max() < 1e-5, size


SLOW_ONNX = [pytest.param(name, marks=pytest.mark.slow) for name in ("learned", "alibi2d", "relative_table")]


@pytest.mark.parametrize("name", ["rope_axial", *SLOW_ONNX])
def test_onnx_runtime_at_sizes_that_were_not_traced(name, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    model = vp.set_encoding(vit(dynamic_img_size=True).eval(), name).requires_grad_(False)
    program = torch.onnx.export(model, (torch.randn(1, 3, 40, 48),), dynamo=True, dynamic_shapes=DYNAMIC, verbose=False)
    program.save(tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    for size in SIZES:
        x = torch.randn(1, 3, *size)
        (got,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        assert (torch.from_numpy(got) - model(x)).abs().max() < 1e-4, size
