"""torch.compile, torch.export, ONNX Runtime and torch.fx on converted models: each equal to the eager model."""

import pytest
import timm
import torch
from timm.layers import create_feature_extractor
from timm.models.nest import Nest

import visionpos as vp
from tests.hosts.families import fitting
from tests.hosts.ragged_batches import ragged_batch
from tests.small import VIT, pictures, randomised
from visionpos.analysis.zoo import ZOO, build

pytestmark = pytest.mark.unhooked

DYNAMIC = ({2: torch.export.Dim.DYNAMIC, 3: torch.export.Dim.DYNAMIC},)


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()


def converted(family, spec, **options):
    """A small model whose every weight matters, unlike timm's at the start, and the size of its pictures.

    Without a spec it keeps its own positions.
    """
    model, size = build(family, **options)
    vp.get_encoding(model) if spec is None else vp.set_encoding(model, spec)
    return randomised(model), size


def close(a, b, tolerance):
    return (a - b).abs().max() < tolerance


def check_compiled(family, spec, backend):
    """One graph; output and gradients are those of the eager model."""
    check_compiled_model(*converted(family, spec), backend)


def check_compiled_model(model, size, backend):
    x = pictures(size).requires_grad_()

    def results(run):
        model.zero_grad()
        out = run(x)
        gradients = torch.autograd.grad(out.square().mean(), [x, *model.parameters()])
        return [out, *gradients]

    eager, compiled = results(model), results(torch.compile(model, fullgraph=True, backend=backend))
    assert all(tensor.abs().max() > 1e-4 for tensor in eager[:2])
    assert all(close(a, b, 1e-5) for a, b in zip(eager, compiled, strict=True))


COMPILED = ["ViT, class token", "EVA-02", "BEiT", "Swin", "Swin v2"]
COMPILED_LONG = [*COMPILED, "ViT, relative bias", "RoPE-ViT, mixed", "Hiera", "SAM"]


@pytest.mark.parametrize("family", COMPILED)
def test_traces_as_one_graph(family):
    check_compiled(family, "sincos2d+rope_axial", "aot_eager")


@pytest.mark.slow
@pytest.mark.parametrize("spec", [None, "alibi2d", "learned+rope_mixed+relative_table"])  # None: the host's own
@pytest.mark.parametrize("family", COMPILED_LONG)
def test_every_place_traces_as_one_graph(family, spec):
    check_compiled(family, spec, "aot_eager")


@pytest.mark.slow
@pytest.mark.parametrize("family", COMPILED_LONG)
def test_compiled_by_inductor(family):
    check_compiled(family, "sincos2d+rope_axial+alibi2d", "inductor")


def check_sizes(run, model, sizes, tolerance):
    """`run` is `model` at every size, and not the same for every picture."""
    for size in sizes:
        x = pictures(size, batch=1)
        want = model(x)
        assert not close(model(-x), want, 1e-3)
        assert close(run(x), want, tolerance), size


EXPORTED = {  # the size that is traced; other sizes go through the same graph
    "ViT, class token": (40, 48),
    "EVA-02": (40, 48),
    "DINOv3": (40, 48),
    "RoPE-ViT, mixed": (40, 48),
}
EXPORTED_LONG = {"Swin": (96, 128), "Swin v2": (96, 128), "SAM": (80, 112)}
SLOW = [pytest.param(*item, marks=pytest.mark.slow) for item in EXPORTED_LONG.items()]
FIXED = ["BEiT", "ViT, relative bias"]  # timm's patches take one size, whatever the encoding


def other_sizes(size):
    height, width = size
    return size, (2 * height, width), (height, 3 * width)


def dynamic(family, spec):
    return converted(family, spec, **({} if family == "SAM" else {"dynamic_img_size": True}))


@pytest.mark.parametrize(("family", "traced"), [*EXPORTED.items(), *SLOW])
def test_one_export_serves_other_sizes(family, traced):
    model, size = dynamic(family, "sincos2d+rope_axial")
    program = torch.export.export(model, (pictures(traced, 1),), dynamic_shapes=DYNAMIC)
    check_sizes(program.module(), model, other_sizes(size), 1e-5)


@pytest.mark.parametrize("family", FIXED)
def test_an_export_for_each_size(family):
    model, size = converted(family, None)
    for other in other_sizes(size):
        model.set_input_size(other)
        check_sizes(torch.export.export(model, (pictures(other, 1),)).module(), model, [other], 1e-5)


def onnx_runtime(model, path, traced, **options):
    """The model in ONNX Runtime, traced at one size."""
    onnxruntime = pytest.importorskip("onnxruntime")
    model.requires_grad_(False)
    torch.onnx.export(model, (pictures(traced, 1),), dynamo=True, verbose=False, **options).save(path)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda x: torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])


@pytest.mark.slow
@pytest.mark.parametrize(("family", "traced"), [*EXPORTED.items(), *EXPORTED_LONG.items()])
def test_onnx_runtime_at_sizes_that_were_not_traced(family, traced, tmp_path):
    model, size = dynamic(family, "sincos2d+rope_axial")
    run = onnx_runtime(model, tmp_path / "model.onnx", traced, dynamic_shapes=DYNAMIC)
    check_sizes(run, model, other_sizes(size), 1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("family", FIXED)
def test_onnx_runtime_for_each_size(family, tmp_path):
    model, size = converted(family, None)
    for other in other_sizes(size):
        model.set_input_size(other)
        check_sizes(onnx_runtime(model, tmp_path / "model.onnx", other), model, [other], 1e-4)


def vit_with_norms_behind():
    return timm.create_model("vit_base_patch16_rpn_224", **{**VIT, "init_values": 0.5}), VIT["img_size"]


def nest():
    return Nest(img_size=64, embed_dims=(24, 48, 96), num_heads=(2, 3, 3), depths=(1, 1, 1), num_classes=4), (64, 64)


BUILDERS = {"ViT, norms behind": vit_with_norms_behind, "NesT": nest}  # of what is not in `ZOO`
NEWEST = [
    *("NaFlexViT", "Gemma 4", "ViT, parallel", "ViT, parallel attention", "ViT, differential", "ViT, norms behind"),
    *("CrossViT", "CoaT", "ConViT", "NesT", "Swin v2-CR", "TNT", "Visformer"),
]
FOREIGN = "sincos2d+rope_axial+alibi2d"
COMPILED_QUICKLY = [("ViT, parallel", None), ("Visformer", FOREIGN)]  # below 5 s
EXPORTED_QUICKLY = [(family, FOREIGN) for family in (*NEWEST[:6], "ConViT")]  # about 1 s


def slow_but(quick):
    """Each of the newest families with its own encodings (None) and with others; fast are the quick ones alone."""
    there = [family for family in NEWEST if family in ZOO or family in BUILDERS]  # an older timm has fewer
    pairs = [(family, spec) for family in there for spec in (None, FOREIGN)]
    return [pytest.param(*pair, marks=() if pair in quick else pytest.mark.slow) for pair in pairs]


def newest(family, spec):
    """A converted model of the family, whose every weight matters, and the size of its pictures."""
    torch.manual_seed(0)
    model, size = BUILDERS[family]() if family in BUILDERS else build(family)
    vp.get_encoding(model) if spec is None else vp.set_encoding(model, fitting(family, spec))
    return randomised(model), size


@pytest.mark.parametrize(("family", "spec"), slow_but(COMPILED_QUICKLY))
def test_the_newest_families_trace_as_one_graph(family, spec):
    check_compiled_model(*newest(family, spec), "aot_eager")


@pytest.mark.parametrize(("family", "spec"), slow_but(EXPORTED_QUICKLY))
def test_the_newest_families_are_exported(family, spec):
    model, size = newest(family, spec)
    program = torch.export.export(model, (pictures(size, 1),))
    check_sizes(program.module(), model, [size], 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["NaFlexViT", "Gemma 4"])
def test_padded_batches_are_exported_where_timms_are(family):
    batch, _ = ragged_batch([(4, 6), (3, 5), (4, 6)], 26)
    try:
        torch.export.export(build(family)[0].eval(), (batch,))
    except Exception as error:
        pytest.skip(f"timm's own is not, for it reads grids off the data: {type(error).__name__}")
    model, _ = newest(family, FOREIGN)
    assert close(torch.export.export(model, (batch,)).module()(batch), model(batch), 1e-5)


EXTRACTED = [
    *("ViT, class token", "DeiT, distilled", "EVA-02", "DINOv3", "RoPE-ViT, mixed", "BEiT", "ViT, relative bias"),
    *("Swin", "Swin v2", "SAM"),
]


def stages(model):
    """Names of the blocks, and of the stages of a model that has some."""
    return [name for name, _ in model.named_modules() if name.count(".") == 1 and name.startswith(("blocks", "layers"))]


def outputs(model, x, nodes):
    """What the named modules return in an ordinary forward pass."""
    found = {}
    hooks = [
        model.get_submodule(node).register_forward_hook(lambda _, args, out, node=node: found.update({node: out}))
        for node in nodes
    ]
    model(x)
    for hook in hooks:
        hook.remove()
    return found


def check_extraction(model, size, extractor, nodes):
    x = pictures(size)
    torch.manual_seed(0)
    want = outputs(model, x, nodes)
    torch.manual_seed(0)
    found = extractor(x)
    assert list(found) == list(want) == nodes
    assert all(torch.equal(found[node], want[node]) for node in nodes)


@pytest.mark.parametrize("spec", [None, "sincos2d+rope_axial", "learned+relative_table+peg+lepe"])
@pytest.mark.parametrize("family", EXTRACTED)
def test_fx_extraction(family, spec):
    """Evaluation and training each have a graph; both share the model's weights."""
    plain = {"drop_path_rate": 0.0} if family.startswith("Swin") else {}  # else other draws, as in timm's own graphs
    model, size = converted(family, spec, **plain)
    nodes = stages(model)
    assert nodes
    extractor = create_feature_extractor(model, nodes)
    check_extraction(model, size, extractor, nodes)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.9)
    check_extraction(model, size, extractor, nodes)
    check_extraction(model.train(), size, extractor.train(), nodes)
    extractor(pictures(size))[nodes[-1]].square().sum().backward()
    trained = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert {name for name, _ in model.named_parameters() if "encodings" in name or "pos_embed" in name} <= trained


@pytest.mark.parametrize("family", ["ViT, class token", "EVA-02", "DINOv3", "RoPE-ViT, mixed"])
def test_fx_extraction_at_sizes_that_were_not_traced(family):
    model, (height, width) = converted(family, "learned+rope_axial", dynamic_img_size=True)
    extractor = create_feature_extractor(model, ["blocks.0"])
    for size in ((height, width), (2 * height, width), (height, 3 * width)):
        check_extraction(model, size, extractor, ["blocks.0"])


def test_fx_extraction_draws_augmented_coordinates_anew():
    model, size = converted("ViT", "rope_axial")
    model.coordinate_augmentation = vp.CoordinateAugmentation(rescale=2.0)
    extractor = create_feature_extractor(model, ["blocks.0"])
    check_extraction(model.train(), size, extractor.train(), ["blocks.0"])
    first, second = (extractor(pictures(size))["blocks.0"] for _ in range(2))
    assert not torch.equal(first, second)


def test_features_only_through_fx():
    options = {"encoding": "sincos2d+rope_axial", "depth": 2, "features_only": True, "out_indices": (0, 1)}
    models = []
    for feature_cls in ("fx", "getter"):
        torch.manual_seed(0)
        models.append(timm.create_model("visionpos_vit_xs_patch4_32", feature_cls=feature_cls, **options).eval())
    for tokens, grid in zip(*(model(pictures((32, 32))) for model in models), strict=True):
        assert torch.equal(tokens.mT.unflatten(2, (8, 8)), grid)
