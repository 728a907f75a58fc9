"""timm's own tests of a model, on a small model of every family: what passes with timm's passes with ours.

Adapted from timm's `tests/test_models.py`: the same questions, on converted models beside the plain one. Where timm's
model answers with an error, so may ours; with anything else than timm's kind of answer it may not.
"""

import copy

import pytest
import timm
import torch
from timm.layers import create_feature_extractor, get_graph_node_names
from torch import Tensor

import visionpos as vp
from tests.hosts.families import deeper, everywhere, fitting
from visionpos.analysis.zoo import ZOO, build

OWN = None
SPECS = [OWN, "learned", "rope_axial"]


def pair(family, spec):
    """A plain model, the same one converted, and pictures for both."""
    plain, size = build(family, **deeper(family))
    plain.eval()
    model = copy.deepcopy(plain)
    vp.get_encoding(model) if spec is OWN else vp.set_encoding(model, fitting(family, spec))
    return plain, model, torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(1))


def answer(question, model, x):
    """What a model answers: an error is one too."""
    try:
        return question(model, x)
    except Exception as error:
        return error


def agree(want, got, same):
    """The same structure, finite numbers and shapes everywhere; with its own encoding also the same numbers."""
    assert type(want) is type(got)
    if isinstance(want, (list, tuple)):
        assert len(want) == len(got)
        for a, b in zip(want, got, strict=True):
            agree(a, b, same)
    elif isinstance(want, dict):
        assert want.keys() == got.keys()
        for key in want:
            agree(want[key], got[key], same)
    elif isinstance(want, Tensor):
        assert want.shape == got.shape
        assert got.isfinite().all()
        assert not same or (got - want).abs().max() < 1e-5
    else:
        assert want == got


def check(question, family, spec):
    """Ask both; ours may raise only where timm's does."""
    plain, model, x = pair(family, spec)
    want = answer(question, plain, x)
    if isinstance(want, Exception):
        pytest.skip(f"neither does timm's: {want}")
    agree(want, question(model, x), spec is OWN)


@everywhere(spec=SPECS)
def test_forward(family, spec):
    check(lambda model, x: model(x), family, spec)


@everywhere(spec=SPECS)
def test_backward(family, spec):
    """Every parameter has a gradient, as many as timm's, and those of the encoding besides."""

    def gradients(model, x):
        model.train()
        for module in model.modules():
            if hasattr(module, "drop_prob"):
                module.drop_prob = 0.0
        out = model(x)
        (out if isinstance(out, Tensor) else sum(out)).mean().backward()
        return {name: parameter.grad for name, parameter in model.named_parameters()}

    plain, model, x = pair(family, spec)
    want, got = gradients(plain, x), gradients(model, x)
    without = {name for name, gradient in want.items() if gradient is None}
    assert {name for name, gradient in got.items() if gradient is None} <= without
    assert all(gradient.isfinite().all() for gradient in got.values() if gradient is not None)


@everywhere(spec=SPECS)
def test_default_cfg(family, spec):
    """The classifier and the stem that the configuration names; no classifier, unpooled tokens; a new classifier."""

    def answers(model, x):
        state, cfg = model.state_dict(), model.default_cfg
        names = [cfg["first_conv"], *([cfg["classifier"]] if isinstance(cfg["classifier"], str) else cfg["classifier"])]
        found = [f"{name}.weight" in state for name in names]
        features = model.forward_features(x)
        pooled, pre_logits = model.forward_head(features), model.forward_head(features, pre_logits=True)
        model.reset_classifier(0)
        headless = model(x)
        model.reset_classifier(0, "")
        unpooled = model(x)
        model.reset_classifier(7, "avg" if "Swin" in family else None)
        heads = model(x).shape
        return [found, cfg["input_size"], model.num_features, features, pooled, pre_logits, headless, unpooled, heads]

    check(answers, family, spec)


WAYS = [
    {},
    {"indices": [0], "stop_early": True, "norm": True},
    *(
        pytest.param(way, marks=pytest.mark.slow)
        for way in ({"indices": 1}, {"output_fmt": "NLC"}, {"return_prefix_tokens": True})
    ),
]


@pytest.mark.parametrize("way", WAYS, ids=str)
@everywhere(spec=SPECS)
def test_forward_intermediates(family, spec, way):
    check(lambda model, x: model.forward_intermediates(x, intermediates_only=True, **way), family, spec)
    check(lambda model, x: model.forward_intermediates(x), family, spec)


@everywhere(spec=SPECS)
def test_prune_intermediate_layers(family, spec):
    def answers(model, x):
        kept = model.prune_intermediate_layers(indices=[0], prune_norm=True, prune_head=True)
        return [kept, model.forward_features(x)]

    check(answers, family, spec)


FORMS = [{}, *(pytest.param({"out_indices": form}, marks=pytest.mark.slow) for form in ((0,), (-1,), 1))]


@pytest.mark.parametrize("form", FORMS, ids=str)
@everywhere(spec=SPECS)
def test_features(family, spec, form):
    """`features_only=True` in every form: channels, reductions and shapes are timm's."""
    name, options, size = ZOO[family]
    options = {key: value for key, value in options.items() if key not in ("num_classes", "global_pool")}
    options |= {"depth": 4} if "depth" in options else {}
    x = torch.randn(1, 3, *size)

    def answers(make):
        torch.manual_seed(0)
        model = make(name, features_only=True, **options, **form).eval()
        info = model.feature_info
        levels = [level.shape for level in model(x)]
        return info.channels(), info.reduction(), levels

    try:
        want = answers(timm.create_model)
    except Exception as error:
        pytest.skip(f"neither does timm's: {error}")
    assert answers(lambda *args, **kwargs: vp.create_model(*args, encoding=fitting(family, spec), **kwargs)) == want


def graph(model):
    """The graph that timm traces of a model, with its last node as the only output."""
    nodes = get_graph_node_names(model)[0 if model.training else 1]
    return create_feature_extractor(model, nodes[-1:])


@pytest.mark.slow
@pytest.mark.unhooked
@everywhere(spec=SPECS)
def test_forward_fx(family, spec):
    """The graph computes what the model does."""
    plain, model, x = pair(family, spec)
    want = answer(lambda model, x: graph(model)(x), plain, x)
    if isinstance(want, Exception):
        pytest.skip(f"neither does timm's: {want}")
    for got, want in zip(graph(model)(x).values(), [model(x)], strict=True):
        assert torch.equal(got, want)


@pytest.mark.slow
@pytest.mark.unhooked
@everywhere(spec=SPECS)
def test_backward_fx(family, spec):
    """The graph has all parameters of the model, as its own, and all of them learn."""
    plain, model, x = pair(family, spec)
    want = answer(lambda model, x: graph(model.train())(x), plain, x)
    if isinstance(want, Exception):
        pytest.skip(f"neither does timm's: {want}")
    traced, whole = graph(model.train()), dict(model.named_parameters(remove_duplicate=False))  # CoaT shares some
    for module in traced.modules():
        if hasattr(module, "drop_prob"):
            module.drop_prob = 0.0
    sum(out.square().mean() for out in traced(x).values()).backward()
    parameters = dict(traced.named_parameters())
    assert parameters.keys() <= whole.keys()
    assert set(map(id, parameters.values())) == set(map(id, whole.values()))
    frozen = {name for name, parameter in plain.named_parameters() if not parameter.requires_grad}
    assert [name for name, parameter in parameters.items() if parameter.grad is None and name not in frozen] == []
