"""The names of torchvision's ViT, Swin and Swin v2, carried over to those of timm or of the authors' code."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

NAMES = re.compile(r"^(conv_proj|encoder\.layers\.encoder_layer_\d+|heads\.head|features\.\d+(\.\d+)*)\.")

VIT = [
    (r"^conv_proj\.", "patch_embed.proj."),
    (r"^class_token$", "cls_token"),
    (r"^encoder\.pos_embedding$", "pos_embed"),
    (r"^encoder\.layers\.encoder_layer_(\d+)\.", r"blocks.\1."),
    (r"\.ln_([12])\.", r".norm\1."),
    (r"\.self_attention\.in_proj_(weight|bias)$", r".attn.qkv.\1"),
    (r"\.self_attention\.out_proj\.", ".attn.proj."),
    (r"\.mlp\.(?:linear_1|0)\.", ".mlp.fc1."),  # a list of layers since 0.13, two layers before
    (r"\.mlp\.(?:linear_2|3)\.", ".mlp.fc2."),
    (r"^encoder\.ln\.", "norm."),
    (r"^heads\.head\.", "head."),
]
SWIN = [
    (r"^features\.0\.0\.", "patch_embed.proj."),
    (r"^features\.0\.2\.", "patch_embed.norm."),
    (r"\.mlp\.0\.", ".mlp.fc1."),
    (r"\.mlp\.3\.", ".mlp.fc2."),
]
STAGE = re.compile(r"^features\.(\d+)\.(\d+\.(?:norm[12]|attn|mlp)\..+|(?:reduction|norm)\..+)$")


def read(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return weights under the names of timm or of the authors' code; names that are not known stay as they are."""
    renamed: dict[str, Tensor] = {}
    for key, value in weights.items():
        for pattern, name in SWIN if any(key.startswith("features.") for key in weights) else VIT:
            key = re.sub(pattern, name, key)
        if match := STAGE.match(key):  # odd numbers are blocks, even ones the merging of patches that ends a stage
            stage = int(match[1])
            key = f"layers.{(stage - 1) // 2}.{'blocks' if stage % 2 else 'downsample'}.{match[2]}"
        renamed[key] = value
    if any(".cpb_mlp." in key for key in renamed):  # the part of Swin v2's keys is set to zero in every forward pass
        for key in [key for key in renamed if key.endswith("attn.qkv.bias")]:
            q, _, v = renamed.pop(key).chunk(3)
            stem = key.removesuffix("qkv.bias")
            renamed |= {f"{stem}q_bias": q, f"{stem}v_bias": v}
    return renamed
