"""A model that keeps what it has computes what timm's computes, bit for bit, under timm's names."""

import copy

import torch

import visionpos as vp

OWN = object()  # whatever the model has, as objects
WAYS = ({}, {"indices": [0], "stop_early": True})


def shapes(model):
    return [(name, tensor.shape) for name, tensor in model.state_dict().items()]


def check_same_bits(plain, x, names, *specs, ways=WAYS):
    """Convert a copy, whose encodings have these names, to each of the specs in turn, and return it in float64."""
    model = copy.deepcopy(plain)
    assert [encoding.name for encoding in vp.get_encoding(model)] == names
    for spec in specs:
        vp.set_encoding(model, vp.get_encoding(model) if spec is OWN else spec)
        assert shapes(model) == shapes(plain)
        assert torch.equal(model(x), plain(x))
    for way in ways:
        (last, found), (last_of_timm, found_of_timm) = (each.forward_intermediates(x, **way) for each in (model, plain))
        assert torch.equal(last, last_of_timm)
        assert all(torch.equal(a, b) for a, b in zip(found, found_of_timm, strict=True))
    assert torch.equal(model.double()(x.double()), plain.double()(x.double()))
    return model
