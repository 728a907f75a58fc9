"""What people do to a model, on a small model of every family, with an encoding that is not its own."""

import copy
import re

import pytest
import timm
import torch
from timm.models._features_fx import create_feature_extractor, get_notrace_functions, get_notrace_modules
from timm.optim import param_groups_layer_decay
from torchvision.models.feature_extraction import get_graph_node_names

import visionpos as vp
from tests.hosts.families import CHANNELS, GRIDS, everywhere, fitting
from tests.small import randomised
from visionpos.analysis.hosts import host_matrix, own_encoding
from visionpos.analysis.zoo import ZOO, build
from visionpos.hosts import attention
from visionpos.kernels.coordinates import has_formula

SPEC = "rope_axial"


def converted(family, spec=SPEC, **options):
    model, (height, width) = build(family, **options)
    x = torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(1))
    return vp.set_encoding(model, fitting(family, spec)).eval(), x


def close(a, b, tolerance=1e-5):
    assert (a - b).abs().max() < tolerance


def test_there_are_at_least_twelve_families():
    assert len(ZOO) >= 12
    assert len(vp.supported_hosts()) >= 7


@pytest.mark.parametrize("family", ZOO)
def test_the_timm_model_is_still_the_timm_model(family):
    plain, _ = build(family)
    model, x = converted(family)
    assert isinstance(model, type(plain))
    assert type(model).__module__.startswith("visionpos.hosts.")
    shared = dict(plain.named_parameters())
    for name, parameter in model.named_parameters():
        assert name not in shared or torch.equal(parameter, shared[name]), name
    undecayed = getattr(plain, "no_weight_decay", set)()  # not in every family of timm's
    assert model.no_weight_decay() >= {n for n in undecayed if n in dict(model.named_parameters())}
    assert torch.equal(model(x), model.forward_head(model.forward_features(x)))


@pytest.mark.parametrize("family", ZOO)
def test_asking_for_what_it_has_changes_nothing(family):
    """By name, also by a name that only hosts have: the weights stay."""
    plain, size = build(family)
    model, _ = build(family)
    vp.set_encoding(model, own_encoding(family))
    assert list(model.state_dict()) == list(plain.state_dict())
    x = torch.randn(2, 3, *size)
    close(model.eval()(x), plain.eval()(x), 3e-6)
    plain.load_state_dict(model.state_dict(), strict=True)


@pytest.mark.unhooked
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")
@everywhere(spec=[None, "sincos2d+rope_axial+alibi2d"])
def test_traced_by_torchscript(family, spec):
    """Sizes are tensors in such a trace. Some families take them from the picture, others from the model."""
    model, size = build(family, **({"dynamic_img_size": True} if family.startswith(("ViT, c", "EVA")) else {}))
    vp.get_encoding(model) if spec is None else vp.set_encoding(model, fitting(family, spec))
    x = torch.randn(2, 3, *size)
    close(torch.jit.trace(model.eval(), x, check_trace=False)(x), model(x), 1e-6)


@pytest.mark.unhooked
@everywhere([*GRIDS, "PiT"], spec=[None, "learned+rope_axial+relative_table+peg"])
def test_traced_by_torch_fx_where_timm_is(family, spec):
    """Down to the last node, with every parameter of the model, its head apart, among those of the graph."""

    def traced(model):
        last = get_graph_node_names(model, tracer)[1][-1]
        return create_feature_extractor(model, {last: "out"}).eval()

    tracer = {"leaf_modules": get_notrace_modules(), "autowrap_functions": get_notrace_functions()}
    plain, size = build(family)
    try:
        want = traced(plain)
    except torch.fx.proxy.TraceError:
        pytest.skip("timm's model cannot be traced either")
    model, x = copy.deepcopy(plain).eval(), torch.randn(2, 3, *size)
    vp.get_encoding(model) if spec is None else vp.set_encoding(model, fitting(family, spec))
    extractor = traced(model)
    close(extractor(x)["out"], model(x))
    lost = len(list(plain.parameters())) - len(list(want.parameters()))
    assert len(list(model.parameters())) - len(list(extractor.parameters())) == lost


@everywhere(spec=[None, "sincos2d+rope_axial+alibi2d"])
def test_no_pictures_give_no_answers(family, spec):
    """An empty batch, the last of a data set or one of a worker without data, passes where it passes in timm."""
    plain, (height, width) = build(family)
    model, nothing = copy.deepcopy(plain), torch.zeros(0, 3, height, width)
    vp.get_encoding(model) if spec is None else vp.set_encoding(model, fitting(family, spec))
    try:
        want = plain(nothing)
    except (RuntimeError, ZeroDivisionError):
        return
    assert model(nothing).shape == want.shape == (0, 3)


@pytest.mark.parametrize("family", ZOO)
def test_a_bias_left_to_a_kernel_acts_where_attention_is_none_of_its_own(family, monkeypatch):
    """From some hundred tokens on, on a GPU, attention gets positions in place of a bias that is a formula."""
    model, x = converted(family, "alibi2d")
    want = randomised(model)(x)
    monkeypatch.setattr(attention, "takes_coordinates", has_formula)
    close(model(x), want, 1e-5 * want.abs().max())


@everywhere(spec=[SPEC, "alibi2d"])  # biases are float32 tables
def test_memory_format_and_precision(family, spec):
    model, x = converted(family, spec)
    want = model(x)
    close(model.to(memory_format=torch.channels_last)(x.to(memory_format=torch.channels_last)), want)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(x)
    assert out.isfinite().all()
    close(out.float(), want, 0.1 * want.abs().max() + 0.05)
    half = copy.deepcopy(model).bfloat16()(x.bfloat16())
    assert half.dtype == torch.bfloat16
    assert half.isfinite().all()


@everywhere(spec=["rope_axial", "relative_table"])
def test_meta_device_then_weights_then_buffers(family, spec):
    source, x = converted(family, spec)
    with torch.device("meta"):
        model, _ = converted(family, spec)
    model = model.to_empty(device="cpu")
    for tensor in [*model.parameters(), *model.buffers()]:
        tensor.data.fill_(-12345 if tensor.is_floating_point() else 7)
    model.load_state_dict(source.state_dict(), strict=True)
    for module in model.modules():
        if hasattr(module, "init_non_persistent_buffers"):
            module.init_non_persistent_buffers()
    close(model.eval()(x), source(x), 1e-6)


@everywhere(spec=[None, "relative_table+lookhere+t5"])
def test_timms_init_weights_leaves_no_buffer_as_memory_was(family, spec):
    """After `to_empty` it draws all parameters, and sets all buffers; a family that has none asks nobody."""
    model, _ = build(family)
    vp.get_encoding(model) if spec is None else vp.set_encoding(model, fitting(family, spec))
    if not hasattr(model, "init_weights"):
        return
    encodings = [module for module in model.modules() if isinstance(module, vp.PositionEncoding)]
    want = [buffer.clone() for encoding in encodings for buffer in encoding.buffers()]
    for buffer in model.buffers():
        buffer.data.fill_(3)
    model.init_weights()
    got = [buffer for encoding in encodings for buffer in encoding.buffers()]
    assert all(torch.equal(*pair) for pair in zip(got, want, strict=True))


@pytest.mark.parametrize("family", ["ViT, class token", "Swin", "BEiT"])
def test_a_copy_by_data_parallel_is_refused_where_it_would_read_the_parameters_of_the_model(family):
    """torch gives a replica of an encoding no way to the replica of the layer whose table it reads."""
    model, x = build(family)
    vp.get_encoding(model)
    modules = list(model.modules())
    copies = {module: module._replicate_for_data_parallel() for module in modules}
    for module, copied in copies.items():
        copied._modules.update({name: child and copies[child] for name, child in module._modules.items()})
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            setattr(copied, name, None if tensor is None else tensor.data)
    with pytest.raises(TypeError, match="^nn.DataParallel cannot copy .* of a model: take DistributedDataParallel$"):
        copies[model](torch.randn(2, 3, *x))


@pytest.mark.parametrize("family", [family for family in ZOO if family not in CHANNELS])
def test_layer_decay_puts_encodings_into_their_own_layer(family):
    model, _ = converted(family, "relative_table")
    groups = param_groups_layer_decay(
        model, 0.05, no_weight_decay_list=model.no_weight_decay(), layer_decay=0.5, min_scale=0.0
    )
    scale = {id(parameter): group["lr_scale"] for group in groups for parameter in group["params"]}
    decay = {id(parameter): group["weight_decay"] for group in groups for parameter in group["params"]}
    named = dict(model.named_parameters())
    queries = r"qkv?s?\.|q\.weight|\.q\.|in_proj\.|q_proj\."
    tables = [name for name in named if "relative_position" in name or "attention_biases" in name]
    assert tables
    for name in tables:
        block = re.split(r"\.attn|\.token_mixer|\.encodings", name)[0]
        peer = next(n for n in named if n.startswith(block) and re.search(queries, n))
        assert scale[id(named[name])] == scale[id(named[peer])], (name, peer)
        assert decay[id(named[name])] == 0


@pytest.mark.parametrize("family", ["ViT, class token", "EVA-02", "BEiT", "Swin", "Hiera", "DINOv3"])
def test_forward_intermediates_and_features_only(family):
    model, x = converted(family)
    final, intermediates = model.forward_intermediates(x)
    close(final, model.forward_features(x))
    assert all(feature.ndim == 4 and feature.isfinite().all() for feature in intermediates)
    name, options, _ = ZOO[family]
    options = {key: value for key, value in options.items() if key not in ("num_classes", "global_pool")}
    torch.manual_seed(0)
    getter = timm.create_model(name, features_only=True, out_indices=(0,), **options).eval()
    inner = getattr(getter, "model", getter)
    if family != "Swin":  # timm wraps Swin's stages one by one: there is no SwinTransformer left to convert
        vp.set_encoding(inner, SPEC)
        assert getter(x)[-1].isfinite().all()
    registered = timm.create_model("visionpos_vit_xs_patch4_32", encoding=SPEC, features_only=True).eval()
    assert registered(torch.randn(1, 3, 32, 32))[-1].shape[1] == 128


@pytest.mark.slow
def test_the_page_of_hosts_is_up_to_date():
    from pathlib import Path

    page = Path(__file__).parents[2] / "docs" / "hosts.md"
    assert host_matrix() == page.read_text(), "run `make docs`"
    quoted = page.read_text().splitlines()[2].split(" (")[0]  # "... of the ... pretrained weights"
    assert quoted in (page.parents[1] / "README.md").read_text(), "the README says another share than docs/hosts.md"
