"""The names of Hugging Face's transformers, carried over to those of timm or of the authors' code (`formats.py`).

Read are ViT, DeiT, DINOv2 (with and without registers), DINOv3, ViTMAE, Swin, Swin v2, BEiT, SigLIP's vision tower,
I-JEPA and Hiera, by the names in files and by those that transformers 5 has in memory. Queries, keys and values are
three layers there and one here. Norms keep timm's epsilon: 1e-6 in ViT, where configurations of transformers say 1e-12.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

NAMES = re.compile(
    r"(^|\.)(embeddings|vision_model|(encoder\.)?layer\.\d+|encoder\.(layers|stages)\.\d+|(cls_|distillation_)?classifier)\."
)

# in this order; a name goes through all of them
RENAMES = [
    (r"^(vit|deit|swin|swinv2|beit|dinov2|dinov2_with_registers|hiera|ijepa|vision_model|model)\.", ""),
    (r"^decoder\.decoder_(?:encoder\.)?layers?\.(\d+)\.", r"decoder_blocks.\1."),
    (r"^decoder\.(decoder_|mask_token)", r"\1"),
    (r"^head\.attention\.out_proj\.", "attn_pool.proj."),
    (r"^head\.probe$", "attn_pool.latent"),
    (r"^head\.layernorm\.", "attn_pool.norm."),
    (r"^head\.mlp\.", "attn_pool.mlp."),
    (r"^embeddings\.patch_embeddings?\.(?:projection\.)?", "patch_embed.proj."),
    (r"^embeddings\.position_embeddings?(?:\.weight)?$", "pos_embed"),
    (r"^embeddings\.norm\.", "patch_embed.norm."),
    (r"^embeddings\.distillation_token$", "dist_token"),
    (r"^embeddings\.(cls_token|mask_token|register_tokens)$", r"\1"),
    (r"^(?:encoder\.)?relative_position_bias\.", "rel_pos_bias."),
    (r"^(?:encoder\.)?layers?\.(\d+)\.(?!blocks\.|downsample\.)", r"blocks.\1."),
    (r"^encoder\.layers\.", "layers."),
    (r"\.(?:attention\.)*relative_position_bias\.", ".attn."),
    (r"\.(?:attention\.(?:attention|self)|self_attn|attention)\.(q|k|v)(?:uery|ey|alue|_proj)\.", r".attn.\1."),
    (r"\.attention\.self\.continuous_position_bias_mlp\.", ".attn.cpb_mlp."),
    (r"\.attention\.self\.(relative_position_\w+|logit_scale)$", r".attn.\1"),
    (r"\.(?:attention\.output\.dense|attention\.o_proj|self_attn\.out_proj)\.", ".attn.proj."),
    (r"\.(?:intermediate\.dense|mlp\.weights_in)\.", ".mlp.fc1."),
    (r"\.(?:output\.dense|mlp\.weights_out)\.", ".mlp.fc2."),
    (r"\.(?:layernorm_before|layer_norm1)\.", ".norm1."),
    (r"\.(?:layernorm_after|layer_norm2)\.", ".norm2."),
    (r"\.layer_scale([12])\.lambda1$", r".ls\1.gamma"),
    (r"\.lambda_([12])$", r".gamma_\1"),
    (r"^(?:post_)?layernorm\.", "norm."),
    (r"^(?:cls_)?classifier\.", "head."),
    (r"^distillation_classifier\.", "head_dist."),
]


def read(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return weights under the names of timm or of the authors' code; names that are not known stay as they are."""
    originals = {_rename(key): key for key in weights}
    renamed = {key: weights[original] for key, original in originals.items()}
    if "pos_embed" in renamed and renamed["pos_embed"].ndim == 2:  # SigLIP's is the weight of an nn.Embedding
        renamed["pos_embed"] = renamed["pos_embed"].unsqueeze(0)
    for convert in (_fuse_qkv, _dinov3, _dinov2_gates, _dinov2_registers, _attention_pool, _hiera, _mean_pooling):
        renamed = convert(renamed)
    return {originals.get(key, key) if NAMES.search(key) else key: value for key, value in renamed.items()}


def _rename(key: str) -> str:
    for pattern, name in RENAMES:
        key = re.sub(pattern, name, key)
    return key


def _fuse_qkv(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Join queries, keys and values; where keys have no bias, those of q and v become BEiT's `q_bias` and `v_bias`."""
    for stem in dict.fromkeys(key[:-8] for key in weights if re.search(r"\.attn\.[qkv]\.weight$", key)):
        if missing := [part for part in "qkv" if f"{stem}{part}.weight" not in weights]:
            raise ValueError(f"a part of a layer is missing in the weights: {stem}{missing[0]}.weight")
        weights[f"{stem}qkv.weight"] = torch.cat([weights.pop(f"{stem}{part}.weight") for part in "qkv"])
        biases = {part: weights.pop(f"{stem}{part}.bias") for part in "qkv" if f"{stem}{part}.bias" in weights}
        if len(biases) == 3:
            weights[f"{stem}qkv.bias"] = torch.cat([biases[part] for part in "qkv"])
        else:
            weights |= {f"{stem}{part}_bias": bias for part, bias in biases.items()}
    return weights


def _dinov3(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Carry DINOv3, the one with register tokens and no table, over to its authors' names."""
    if "register_tokens" not in weights or "pos_embed" in weights:
        return weights
    gated = any(".mlp.gate_proj." in key for key in weights)
    layers = {"gate_proj": "w1", "up_proj": "w2" if gated else "fc1", "down_proj": "w3" if gated else "fc2"}
    renamed: dict[str, Tensor] = {}
    for key, value in weights.items():
        stem, found, _ = key.partition("attn.q_bias")
        if found and f"{stem}attn.v_bias" in weights:
            v_bias = weights[f"{stem}attn.v_bias"]
            renamed[f"{stem}attn.qkv.bias"] = torch.cat([value, torch.zeros_like(value), v_bias])
        elif not key.endswith("attn.v_bias"):
            renamed[re.sub(r"mlp\.(\w+_proj)", lambda match: f"mlp.{layers[match[1]]}", key)] = value
    renamed["storage_tokens"] = renamed.pop("register_tokens")
    return renamed


def _dinov2_gates(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Join the gated layers of DINOv2's giant, which transformers 5 has apart in memory and together in files."""
    for key in [key for key in weights if ".mlp.gate_proj." in key]:
        gate, up, down = (key.replace("gate", name) for name in ("gate", "up", "down"))
        if missing := [name for name in (up, down) if name not in weights]:
            raise ValueError(f"a part of a layer is missing in the weights: {missing[0]}")
        weights[gate.replace("gate_proj", "fc1")] = torch.cat([weights.pop(gate), weights.pop(up)])
        weights[gate.replace("gate_proj", "fc2")] = weights.pop(down)
    return weights


def _dinov2_registers(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Add the class token's row of DINOv2's table to the class token: with registers, timm's table is for patches."""
    if {"register_tokens", "cls_token", "pos_embed"} <= set(weights):
        row, table = weights["pos_embed"].tensor_split([1], dim=1)
        weights |= {"cls_token": weights["cls_token"] + row, "pos_embed": table}
        weights["reg_token"] = weights.pop("register_tokens")
    return weights


def _attention_pool(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Cut the projection of SigLIP's pooling, torch's for q, k and v, into timm's for q and for k and v."""
    for part in ("weight", "bias"):
        if f"head.attention.in_proj_{part}" in weights:
            q, k, v = weights.pop(f"head.attention.in_proj_{part}").chunk(3)
            weights |= {f"attn_pool.q.{part}": q, f"attn_pool.kv.{part}": torch.cat([k, v])}
    return weights


def _hiera(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Count Hiera's blocks through all stages, and name its head as timm does."""
    places = sorted({tuple(map(int, found)) for key in weights for found in re.findall(STAGE, key)})
    if not places:
        return weights
    index = {place: block for block, place in enumerate(places)}

    def rename(key: str) -> str:
        key = re.sub(STAGE, lambda match: f"blocks.{index[int(match[1]), int(match[2])]}.", key)
        return re.sub(r"^pooler\.layernorm\.", "head.norm.", re.sub(r"^head\.(weight|bias)$", r"head.fc.\1", key))

    return {rename(key): value for key, value in weights.items()}


STAGE = r"^encoder\.stages\.(\d+)\.layers\.(\d+)\."


def _mean_pooling(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Name BEiT's norm after pooling as timm and its authors do."""
    return {re.sub(r"^pooler\.layernorm\.", "fc_norm.", key): value for key, value in weights.items()}
