"""The way back: weights of a converted model under the names that timm's plain model or Hugging Face's has."""

from __future__ import annotations

import re
from typing import Literal

import torch
from timm.models.eva import Eva
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from ..hosts.host import find_host
from ..positions import Positions
from .formats import Weights, shorten

# each family -> the encodings that timm's and Hugging Face's model of it have
FAMILIES = {
    VisionTransformer: ("learned", "sincos2d"),
    SwinTransformer: ("relative_table",),
    Eva: ("rope_dinov3",),
}
BLOCK = {
    "norm1.": "layernorm_before.",
    "norm2.": "layernorm_after.",
    "attn.proj.": "attention.output.dense.",
    "mlp.fc1.": "intermediate.dense.",
    "mlp.fc2.": "output.dense.",
}
STEM = {
    "cls_token": "embeddings.cls_token",
    "pos_embed": "embeddings.position_embeddings",
    "reg_token": "embeddings.register_tokens",
    "norm.": "layernorm.",
}
VIT = {f"attn.{x[0]}.": f"attention.attention.{x}." for x in ("query", "key", "value")} | BLOCK
SWIN = {f"attn.{x[0]}.": f"attention.self.{x}." for x in ("query", "key", "value")} | BLOCK
SWIN |= {"attn.relative_position_bias_table": "attention.self.relative_position_bias_table"}
DINOV3 = {f"attn.{x}.": f"attention.{x}_proj." for x in "qkv"} | {f"norm{i}.": f"norm{i}." for i in (1, 2)}
DINOV3 |= {"attn.proj.": "attention.o_proj.", "mlp.fc1_g.": "mlp.gate_proj.", "mlp.fc1_x.": "mlp.up_proj."}
DINOV3 |= {"mlp.fc1.": "mlp.up_proj.", "mlp.fc2.": "mlp.down_proj."}
DINOV3 |= {f"gamma_{i}": f"layer_scale{i}.lambda1" for i in (1, 2)}


def export_state_dict(model: nn.Module, format: Literal["timm", "huggingface"]) -> Weights:
    """Return the weights of a ViT, a Swin or a DINOv3 as another library reads them.

    Args:
        model: of one of these families, with the encoding that it has in timm; a ViT also with `sincos2d`, whose table
            is written out.
        format: "timm", for `load_state_dict` of timm's plain model, or "huggingface", the names in the
            model.safetensors of transformers: with the model's prefix if there is a classifier, else without.

    Raises:
        ValueError: another family, encodings that the format has no place for, or an unknown format.

    Example:
        >>> model = vp.create_model("vit_tiny_patch16_224", encoding="sincos2d", depth=1, num_classes=0)
        >>> weights = vp.export_state_dict(model, "huggingface")
        >>> weights["embeddings.position_embeddings"].shape
        torch.Size([1, 197, 192])
    """
    if format not in ("timm", "huggingface"):
        raise ValueError(f"format must be 'timm' or 'huggingface', got {format!r}")
    family = next((family for family in FAMILIES if isinstance(model, family)), None)
    if family is None:
        raise ValueError(f"exported are ViT, Swin and DINOv3, not {type(model).__name__}")
    weights = _timm(model, FAMILIES[family])
    return weights if format == "timm" else _huggingface(weights, family)


def _timm(model: nn.Module, native: tuple[str, ...]) -> Weights:
    host = find_host(model)
    host.convert(model)
    inputs, layers = host.encodings(model)
    found = dict.fromkeys(encoding.name for encodings in ([*inputs], *layers) for encoding in encodings)
    places = [inputs] if native[0] == "learned" else layers
    if any(len(encodings) != 1 for encodings in places) or not set(found) <= set(native):
        raise ValueError(
            f"the format has a place for {' or '.join(native)}, once; this model has: {', '.join(found) or 'none'}"
        )
    weights = dict(model.state_dict())
    if "sincos2d" in found:
        kernel, prefix = model.patch_embed.proj.weight, 0 if model.no_embed_class else model.num_prefix_tokens
        positions = Positions.grid(model.patch_embed.grid_size, prefix, device=kernel.device)
        weights["pos_embed"] = inputs[0].prepare(positions).to(kernel.dtype).unsqueeze(0)
    return weights


def _huggingface(weights: Weights, family: type[nn.Module]) -> Weights:
    split: Weights = {}
    for key, value in weights.items():
        if re.search(r"attn\.qkv\.(weight|bias)$", key):
            split |= {key.replace("qkv", part): rows for part, rows in zip("qkv", value.chunk(3), strict=True)}
        else:
            split[re.sub(r"attn\.([qkv])_bias$", r"attn.\1.bias", key)] = value
    if family is Eva:
        split = {key: value for key, value in split.items() if not key.endswith("attn.k.bias")}
        split["embeddings.mask_token"] = torch.zeros_like(split["cls_token"])
    prefix = {VisionTransformer: "vit.", SwinTransformer: "swin."}.get(family, "")
    prefix = prefix if any(key.startswith("head.") for key in split) else ""
    names = {key: _rename(key, family, prefix) for key in split}
    if unknown := [key for key, name in names.items() if name is None]:
        raise ValueError(f"the format of Hugging Face has no place for {shorten(unknown)}")
    return {names[key]: value for key, value in split.items()}


def _rename(key: str, family: type[nn.Module], prefix: str) -> str | None:
    """Return the name in transformers, or None if there is none."""
    if head := re.match(r"head\.(?:fc\.)?(weight|bias)$", key):
        return None if family is Eva else f"classifier.{head[1]}"
    if key == "embeddings.mask_token":
        return key
    if merge := re.match(r"layers\.(\d+)\.downsample\.", key):
        return f"{prefix}encoder.layers.{int(merge[1]) - 1}.downsample.{key[merge.end() :]}"
    names, place = {VisionTransformer: (VIT, "encoder.layer."), SwinTransformer: (SWIN, "encoder.layers.")}.get(
        family, (DINOV3, "layer.")
    )
    if block := re.match(r"(?:blocks|layers)\.(\d+)\.(blocks\.\d+\.)?", key):
        rest = key[block.end() :]
        found = next((theirs + rest[len(ours) :] for ours, theirs in names.items() if rest.startswith(ours)), None)
        return found and f"{prefix}{place}{block[1]}.{block[2] or ''}{found}"
    if patch := re.match(r"patch_embed\.(proj|norm)\.(weight|bias)$", key):
        projection = "embeddings.patch_embeddings." + ("" if family is Eva else "projection.")
        return f"{prefix}{projection if patch[1] == 'proj' else 'embeddings.norm.'}{patch[2]}"
    stem = {**STEM, **({"norm.": "norm."} if family is Eva else {})}
    return next((prefix + theirs + key[len(ours) :] for ours, theirs in stem.items() if key.startswith(ours)), None)
