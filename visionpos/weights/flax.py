"""The names of ViT's .npz files (Dosovitskiy et al. 2021), carried over to those of timm.

timm's own loader writes tensor by tensor into a plain ViT; this one goes the way of all formats: checked before
anything is written, and into converted models as well. A test compares the two.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

NAMES = re.compile(r"^\w+/")

RENAMES = [
    (r"^(?:opt/target|params)/", ""),
    (r"^cls$", "cls_token"),
    (r"^embedding/", "patch_embed/proj/"),
    (r"^Transformer/posembed_input/pos_embedding$", "pos_embed"),
    (r"^Transformer/encoder_norm/", "norm/"),
    (r"^Transformer/encoderblock_(\d+)/", r"blocks/\1/"),
    (r"/LayerNorm_0/", "/norm1/"),
    (r"/LayerNorm_[12]/", "/norm2/"),
    (r"/MultiHeadDotProductAttention_\d/", "/attn/"),
    (r"/attn/out/", "/attn/proj/"),
    (r"/MlpBlock_\d/Dense_0/", "/mlp/fc1/"),
    (r"/MlpBlock_\d/Dense_1/", "/mlp/fc2/"),
    (r"/(scale|kernel)$", "/weight"),
]


def read(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return weights under the names of timm, linear layers as (out, in), convolutions as (out, in, h, w)."""
    renamed: dict[str, Tensor] = {}
    for original, value in weights.items():
        key = original
        for pattern, name in RENAMES:
            key = re.sub(pattern, name, key)
        if key.endswith("attn/proj/weight") and value.ndim == 3:
            value = value.flatten(0, 1)  # (heads * head_dim, C)
        elif re.search(r"attn/(query|key|value)/", key) and value.ndim > 1:
            value = value.flatten(-2)  # ([C,] heads * head_dim)
        if key.endswith("weight") and value.ndim in (2, 4):
            value = value.t() if value.ndim == 2 else value.permute(3, 2, 0, 1)
        known = key.startswith(("cls_token", "patch_embed/", "pos_embed", "blocks/", "norm/", "head/", "pre_logits/"))
        renamed[key.replace("/", ".") if known else original] = value
    for key in [key for key in renamed if ".attn.query." in key]:
        parts = [key.replace("query", part) for part in ("query", "key", "value")]
        if missing := [part for part in parts if part not in renamed]:
            raise ValueError(f"a part of a layer is missing in the weights: {missing[0]}")
        renamed[key.replace("query", "qkv")] = torch.cat([renamed.pop(part) for part in parts])
    return renamed
