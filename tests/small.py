"""The small models and images that tests share: H and W differ, and every call gives the same numbers."""

import pytest
import torch

import visionpos as vp
from visionpos.hosts.host import timm_is_from

SIZE = (32, 48)
needs_newer_timm = pytest.mark.skipif(not timm_is_from("1.0.31"), reason="this timm is older than 1.0.31")
needs_newer_torch = pytest.mark.skipif(
    tuple(map(int, torch.__version__.split(".")[:2])) < (2, 9), reason="this torch is older than 2.9"
)
VIT = {"img_size": SIZE, "patch_size": 4, "num_classes": 5, "embed_dim": 48, "depth": 2, "num_heads": 3}
SWIN = {
    "img_size": (64, 96),
    "window_size": 4,
    "num_classes": 5,
    "embed_dim": 32,
    "depths": (2, 2),
    "num_heads": (2, 4),
}


def vit(encoding=None, *, name="vit_tiny_patch16_224", **options):
    """A ViT of 8 x 12 patches and a class token; timm's own, where no encoding is given."""
    torch.manual_seed(0)
    return vp.create_model(name, encoding=encoding, **{**VIT, **options}).eval()


def swin(encoding=None, *, name="swin_tiny_patch4_window7_224", **options):
    """A Swin of 16 x 24 and 8 x 12 patches in windows of 4 x 4; timm's own, where no encoding is given."""
    torch.manual_seed(0)
    return vp.create_model(name, encoding=encoding, **{**SWIN, **options}).eval()


def randomised(model, scale=0.1, seed=0):
    """The model with every weight away from its initial value, so that each of them matters and none is lost unseen."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def pictures(size=SIZE, batch=2, seed=1, channels=3):
    return torch.randn(batch, channels, *size, generator=torch.Generator().manual_seed(seed))


def in_turn(names, turn):
    """Parameters of a test: every third name, from the one whose turn it is, among the fast tests, the others slow."""
    return [name if i % 3 == turn else pytest.param(name, marks=pytest.mark.slow) for i, name in enumerate(names)]
