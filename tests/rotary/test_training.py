"""Three steps of training with the newer rotary encodings and dialects, in a ViT, a Swin and an MAE."""

import pytest
import torch

import visionpos as vp
from tests.small import pictures, swin, vit

SPECS = [
    "rope_spiral",
    "harope",
    "pope",
    "pope+alibi2d",
    {"name": "rope_axial", "preset": "gemma4"},
    {"name": "rope_axial", "preset": "mrope", "sections": (1, 2, 1)},
    {"name": "rope_axial", "preset": "moonvit", "learn_frequencies": "per_head"},
    {"name": "rope_axial", "preset": "pixtral", "learn_frequencies": "shared"},
]


def mae(spec):
    decoder = {"decoder_dim": 48, "decoder_depth": 1, "decoder_num_heads": 3, "decoder_encoding": spec}
    return vp.MaskedAutoencoder(vit(spec), mask_ratio=0.5, **decoder)


def classify(model, images):
    return torch.nn.functional.cross_entropy(model(images), torch.tensor([1, 3]))


def reconstruct(model, images):
    torch.manual_seed(0)  # the same patches are hidden in every step
    return model(images).loss


HOSTS = {"vit": (vit, classify, (32, 48)), "swin": (swin, classify, (64, 96)), "mae": (mae, reconstruct, (32, 48))}


@pytest.mark.parametrize("host", list(HOSTS))
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_three_steps_lower_the_loss_and_move_what_is_learned(spec, host):
    build, loss_of, size = HOSTS[host]
    model, images = build(spec).train(), pictures(size)
    encodings = [module for module in model.modules() if isinstance(module, vp.RotaryEncoding)]
    before = [parameter.detach().clone() for encoding in encodings for parameter in encoding.parameters()]
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(4):
        loss = loss_of(model, images)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[3] < losses[0]
    after = [parameter for encoding in encodings for parameter in encoding.parameters()]
    assert encodings
    assert bool(after) == any(encoding.learnable for encoding in encodings)
    assert all((a - b).abs().max() > 1e-4 for a, b in zip(after, before, strict=True))
