"""What the tests of the hosts with one column of blocks (EVA, BEiT, relative position ViT) share."""

import copy
import pickle

import torch
from timm.models._manipulate import group_parameters
from timm.optim import param_groups_weight_decay
from timm.utils import ModelEmaV3

import visionpos as vp
from tests.small import VIT, pictures, randomised

ENCODINGS = [name for name in vp.list_encodings() if name != "none"]
SIZE, OTHER = (32, 48), (40, 24)


def build(cls, **options):
    """A model whose every weight matters, unlike timm's at the start."""
    torch.manual_seed(0)
    return randomised(cls(**(VIT | options)), scale=0.2)


def moved(x):
    """Whole patches in another place."""
    return torch.cat([x[..., 16:], x[..., :16]], dim=-1)


def check_same_names(model, plain):
    assert isinstance(model, type(plain))
    assert list(model.state_dict()) == list(plain.state_dict())
    assert [n for n, _ in model.named_parameters()] == [n for n, _ in plain.named_parameters()]
    assert plain.no_weight_decay() <= model.no_weight_decay()
    model.load_state_dict(plain.state_dict(), strict=True)
    plain.load_state_dict(model.state_dict(), strict=True)


def check_training(model):
    """Every parameter gets a gradient, and none that belongs to an encoding is decayed or far from its layer."""
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for step in range(2):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(pictures(seed=step)), torch.tensor([1, 3])).backward()
        optimizer.step()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    check_groups(model)


def check_groups(model):
    decay = param_groups_weight_decay(model, 0.05, no_weight_decay_list=model.no_weight_decay())[1]["params"]
    groups = group_parameters(model, model.group_matcher(), reverse=True)
    names = {parameter: name for name, parameter in model.named_parameters()}
    blocks = [{names[p] for p in block.parameters()} for block in model.blocks]
    for encoding in vp.get_encoding(model):
        own = [parameter for parameter in encoding.owner.parameters() if encoding.owner is not model]
        for name in encoding.no_weight_decay():
            parameter = encoding.owner.get_parameter(name)
            assert not any(parameter is p for p in decay)
            own += [parameter]
        for name in {names[parameter] for parameter in own}:
            (layer,) = [i + 1 for i, block in enumerate(blocks) if name in block] or [0]
            assert groups[name] == layer, (name, groups[name])


def order_matters(model):
    """How far moving whole patches changes the output, in float64."""
    model = model.double()
    with torch.no_grad():
        for encoding in vp.get_encoding(model):  # tables that begin at zero
            for parameter in encoding.parameters():
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
        x = pictures().double()
        return (model(moved(x)) - model(x)).abs().max().item()


def check_dropouts(model, plain):
    """Every dropout of timm's is where it was: one seed, one result."""
    results = []
    for trained in (model.train(), plain.train()):
        torch.manual_seed(2)
        results.append(trained(pictures()))
    assert torch.equal(*results)
    assert not torch.equal(model(pictures()), results[0])


def check_copies(model):
    want = model(pictures())
    want.sum().backward()
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), ModelEmaV3(model).module):
        assert torch.equal(copied(pictures()), want)
        with torch.no_grad():
            for parameter in copied.parameters():
                parameter.mul_(-3)
        assert not torch.equal(copied(pictures()), want)
    assert torch.equal(model(pictures()), want)


def names_of(model):
    return [encoding.name for encoding in vp.get_encoding(model)]


def check_checkpointing(model, *batches, bound=1e-6):
    """Gradients of several batches in one backward pass, with and without checkpointing."""
    model.train()

    def gradients():
        model.zero_grad()
        sum(model(batch).square().mean() for batch in batches).backward()
        return [parameter.grad.clone() for parameter in model.parameters()]

    plain = gradients()
    assert all(gradient.isfinite().all() for gradient in plain)
    model.set_grad_checkpointing()
    assert model.grad_checkpointing
    assert all((a - b).abs().max() < bound for a, b in zip(plain, gradients(), strict=True))


def check_intermediates(model, plain, tolerance=0.0):
    def compare(options):
        return zip(*(m.forward_intermediates(pictures(), **options) for m in (model, plain)), strict=True)

    def close(a, b):
        return a.shape == b.shape and (a - b).abs().max() <= tolerance

    for options in ({}, {"norm": True, "output_fmt": "NLC"}, {"indices": [0]}, {"indices": [0], "stop_early": True}):
        (last, last_of_timm), (found, found_of_timm) = compare(options)
        assert close(last, last_of_timm)
        assert all(close(a, b) for a, b in zip(found, found_of_timm, strict=True))
    if model.num_prefix_tokens:  # without any, timm fails
        for found, found_of_timm in compare({"return_prefix_tokens": True, "intermediates_only": True}):
            assert all(close(a, b) for a, b in zip(found, found_of_timm, strict=True))
