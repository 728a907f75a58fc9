"""Small registered models."""

import timm
import torch

SMALL = {"depth": 2, "embed_dim": 48, "num_heads": 3, "img_size": (32, 48)}
SMALL_SWIN = {"depths": (1, 2), "embed_dim": 24, "num_heads": (2, 4), "img_size": (32, 48)}
VIT, SWIN = "visionpos_vit_xs_patch4_32", "visionpos_swin_xs_patch2_window4_32"


def small(name=VIT, **options):
    torch.manual_seed(0)
    return timm.create_model(name, **{**(SMALL_SWIN if "swin" in name else SMALL), **options}).eval()
