"""Encodings of a model, given back to it, to another model, or saved: over every family and the places they live in."""

import copy

import pytest
import timm
import torch
from timm.layers import create_feature_extractor
from timm.models import save_for_hf

import visionpos as vp
from tests.hosts.families import CHANNELS, deeper, everywhere, fitting
from tests.small import needs_newer_timm, pictures, randomised
from visionpos.analysis.zoo import ZOO, build
from visionpos.convert import find_host
from visionpos.hosts.parameters import OfLayer, bind_parameters, copy_encoding, release_parameters

SPECS = [
    None,
    "learned+relative_table+peg",
    "rope_mixed+lookhere",
    "sincos2d+rope_axial+log_cpb",
    "learned2d+decomposed",
]
TRACED = ["ViT, class token", "DeiT, distilled", "EVA-02", "RoPE-ViT, mixed", "BEiT", "ViT, relative bias", "CaiT"]


def model_of(family, spec=None, seed=0):
    """A small converted model whose every weight matters, and pictures for it; without a spec it keeps its own."""
    model, size = build(family, **deeper(family))
    vp.get_encoding(model) if spec is None else vp.set_encoding(model, fitting(family, spec))
    return randomised(model, scale=0.2, seed=seed), pictures(size)


def state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(a, b):
    return list(a) == list(b) and all(torch.equal(a[key], b[key]) for key in a)


@everywhere(spec=SPECS)
def test_a_model_given_what_it_has_stays_what_it_is(family, spec):
    model, x = model_of(family, spec)
    plain = state(model)
    found, parameters = vp.get_encoding(model), list(model.parameters())
    want = model(x)
    vp.set_encoding(model, vp.get_encoding(model))
    assert all(a is b for a, b in zip(vp.get_encoding(model), found, strict=True))
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert same(state(model), plain)
    assert torch.equal(model(x), want)


@pytest.mark.parametrize("family", ZOO)
def test_what_stays_while_something_is_added_or_left_out_keeps_names_and_values(family):
    model, x = model_of(family)
    found = vp.get_encoding(model)
    before, want = state(model), model(x)
    vp.set_encoding(model, [*found, fitting(family, "alibi2d")])
    assert same(state(model), before)
    assert not torch.equal(model(x), want)
    vp.set_encoding(model, [encoding for encoding in vp.get_encoding(model) if encoding in found])
    assert vp.get_encoding(model) == found
    assert same(state(model), before)
    assert torch.equal(model(x), want)


@pytest.mark.parametrize("family", ["BEiT", "Swin", "Swin v2", "SAM", "ViT, relative bias"])
def test_the_encoding_of_one_layer_can_be_left_out(family):
    model, x = model_of(family)
    _, layers = find_host(model).encodings(model) if vp.get_encoding(model) else None
    gone = layers[0][0]
    vp.set_encoding(model, [encoding for encoding in vp.get_encoding(model) if encoding is not gone])
    _, left = find_host(model).encodings(model)
    assert left == [[], *layers[1:]]
    assert model(x).isfinite().all()


def test_a_table_that_one_layer_has_is_not_shared_with_another():
    """It is bound to timm's attention there, and has parameters nevertheless."""
    model = vp.set_encoding(build("Swin")[0], {"name": "relative_table", "init_std": 0.3, "layers": [0]})
    vp.set_encoding(model, ["relative_table"])
    assert len(vp.get_encoding(model)) == len([key for key in model.state_dict() if "position_bias" in key]) == 2
    vp.set_encoding(model, [{"name": "relative_table", "init_std": 0.3, "layers": [0]}, "sincos2d"])
    vp.set_encoding(model, [vp.get_encoding(model)[1], {"name": "relative_table", "init_std": 0.3, "layers": [1]}])
    assert len(vp.get_encoding(model)) == 2


SEVERAL_STAGES = ("Hiera", "GCViT")  # in the smallest models of these


def learned_objects(family):
    """An input encoding and a bias as objects that fit every layer of a family's one-stage model."""
    model, size = build(family)
    host = find_host(model)
    host.convert(model)
    stem, (layer, *_) = host.input_facts(model), host.layer_facts(model)
    table = vp.create_encoding("learned", dim=stem.dim, feat_shape=stem.feat_shape)
    bias = vp.create_encoding("relative_table", num_heads=layer.num_heads, feat_shape=layer.feat_shape, init_std=0.5)
    return [table] if family in (*SEVERAL_STAGES, *CHANNELS) else [table, bias], torch.randn(2, 3, *size)


@pytest.mark.parametrize("family", ZOO)
def test_an_object_given_to_two_models_is_copied_for_the_second(family):
    given, x = learned_objects(family)
    first, second = (build(family)[0].eval() for _ in range(2))
    vp.set_encoding(first, given)
    vp.set_encoding(second, given)
    assert vp.get_encoding(first) == given
    assert not set(given) & set(vp.get_encoding(second))
    assert list(first.state_dict()) == list(second.state_dict())
    assert not {id(p) for p in first.parameters()} & {id(p) for p in second.parameters()}
    want = second(x)
    assert torch.equal(want, first(x))
    with torch.no_grad():
        for parameter in first.parameters():
            parameter.fill_(3)
    assert torch.equal(second(x), want)
    assert torch.equal(copy.deepcopy(second)(x), want)
    second.half()
    assert {parameter.dtype for parameter in first.parameters()} == {torch.float32}


def test_an_object_that_its_model_no_longer_has_can_go_to_another():
    given, _ = learned_objects("ViT")
    first, second = (build("ViT")[0] for _ in range(2))
    vp.set_encoding(vp.set_encoding(first, given), "none")
    vp.set_encoding(second, given)
    assert vp.get_encoding(second) == given


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("family", ["Swin", "BEiT", "EVA-02", "ViT, relative bias"])
def test_a_shared_object_of_a_windowed_or_bound_layer_is_moved_without_loss(family, depth):
    """Bound to one layer's attention, read by all; set again beside another encoding it keeps its name."""
    model = build(family, **({"depths": (2,)} if family == "Swin" else {"depth": depth}))[0]
    given = learned_objects(family)[0][1:]
    vp.set_encoding(model, given)
    keys = [key for key in model.state_dict() if "relative_position" in key]
    vp.set_encoding(model, ["peg", *given])
    assert [key for key in model.state_dict() if "relative_position" in key] == keys
    assert len(keys) == 1


def check_unchanged_by(model, spec, words):
    before, keys = vp.get_encoding(model), list(model.state_dict())
    with pytest.raises(ValueError, match=words):
        vp.set_encoding(model, spec)
    assert vp.get_encoding(model) == before
    assert list(model.state_dict()) == keys


@pytest.mark.parametrize("family", ["ViT", "Swin", "RoPE-ViT, mixed", "Hiera"])
@pytest.mark.parametrize("name", ["learned", "alibi2d", "rope_mixed"])
def test_a_name_twice_is_refused(family, name):
    model, _ = model_of(family)
    check_unchanged_by(model, f"{name}+sincos2d+{name}", f"{name} is asked for twice")
    vp.set_encoding(model, "none")
    check_unchanged_by(model, [name, {"name": name, **DEFAULT[name]}], f"{name} is asked for twice")
    vp.set_encoding(model, [name, {"name": name, **OTHER[name]}])  # two different ones
    assert {encoding.name for encoding in vp.get_encoding(model)} == {name}


DEFAULT = {"learned": {"init_std": 0.02}, "alibi2d": {"extrapolate": None}, "rope_mixed": {"temperature": 10.0}}
OTHER = {"learned": {"init_std": 0.3}, "alibi2d": {"extrapolate": False}, "rope_mixed": {"temperature": 5.0}}


@pytest.mark.parametrize("name", ["alibi2d", "rope_mixed", "lookhere"])
def test_what_no_longer_fits_a_pruned_model_is_one_line(name):
    model = vp.set_encoding(build("ViT", depth=2)[0], name)
    for block in model.blocks:  # two of three heads stay
        block.attn.num_heads, block.attn.attn_dim = 2, 32
        block.attn.qkv = torch.nn.Linear(48, 96)
        block.attn.proj = torch.nn.Linear(32, 48)
    check_unchanged_by(model, name, f"^{name} was built with num_heads=3, but the model has 2$")


@needs_newer_timm  # which records arguments
@everywhere(
    specs=[
        ["learned+relative_table+peg"],
        ["alibi2d", "log_cpb"],
        ["none", "learned2d"],
        [[{"name": "lookhere", "layers": [1]}, {"name": "alibi2d", "layers": [0]}], "lookhere+shaw"],
    ]
)
def test_saved_and_loaded_it_is_the_same_function(family, specs, tmp_path):
    """Whatever the host told an encoding is written down, or follows from the host again."""
    options = {"pretrained_window_sizes": (2, 2)} if family == "Swin v2" else {}
    model, size = build(family, **{**deeper(family), **options})
    for spec in specs:
        vp.set_encoding(model, fitting(family, spec))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)))
    save_for_hf(model.eval(), tmp_path)
    loaded = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert [repr(e) for e in vp.get_encoding(loaded)] == [repr(e) for e in vp.get_encoding(model)]
    x = torch.randn(2, 3, *size)
    assert torch.equal(loaded(x), model(x))


@pytest.mark.unhooked
@pytest.mark.parametrize("spec", [None, "learned+relative_table", "shared"])
@pytest.mark.parametrize("family", TRACED)
def test_a_graph_of_torch_fx_has_every_parameter(family, spec):
    """As parameters of its own: in its state dict, trained by its optimiser, cast with it."""
    model, x = model_of(family, learned_objects(family)[0] if spec == "shared" else spec)
    extractor = create_feature_extractor(model, ["blocks.1"]).eval()
    positional = {n: p for n, p in model.named_parameters() if "pos" in n or ("rope" in n and "blocks" not in n)}
    inside = {id(parameter) for parameter in extractor.parameters()}
    assert positional
    assert all(id(parameter) in inside for parameter in positional.values()), list(positional)
    assert torch.equal(copy.deepcopy(extractor).eval()(x)["blocks.1"], extractor(x)["blocks.1"])
    extractor.double()
    assert {parameter.dtype for parameter in positional.values()} == {torch.float64}


@pytest.mark.parametrize("layer", [None, 1])
def test_bound_released_and_copied(layer):
    encoding, owner = vp.create_encoding("rope_mixed", num_heads=2, head_dim=8), torch.nn.Module()
    drawn = encoding.freqs
    if layer is not None:
        owner.freqs = torch.nn.Parameter(torch.randn(2, 3, 2, 4), requires_grad=False)
    bind_parameters(encoding, owner, None if layer is None else OfLayer(layer))
    bind_parameters(encoding, torch.nn.Module())  # stays where it is
    want = encoding.freqs
    assert torch.equal(want, drawn if layer is None else owner.freqs[:, 1])
    assert list(encoding.state_dict()) == []
    assert list(owner.state_dict()) == ["freqs"]
    assert encoding.owner is owner
    assert encoding.no_weight_decay() == {"freqs"}
    copied = copy_encoding(encoding)
    assert torch.equal(copied.freqs, want)
    assert copied.owner is copied
    copied.freqs.data.fill_(5)
    with torch.no_grad():
        owner.freqs.mul_(2)
    assert torch.equal(encoding.freqs, want)
    assert not (encoding.freqs == 5).any()
    release_parameters(encoding)
    assert encoding.owner is encoding
    assert (owner.freqs is None) == (layer is None)
    assert encoding.freqs.requires_grad == (layer is None)
    assert list(dict(encoding.named_parameters())) == ["freqs"]
