"""State dicts in the formats of the original code, under the names that a timm model has.

A format is one function, in `FORMATS` under the name of a tensor that only this format has. What holds for several of
them (buffers, layer scale, biases of q and v, tensors that moved into an encoding) is done for all.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Callable, Container, Iterable, Mapping
from typing import Any

import torch
from timm.models import clean_state_dict
from torch import Tensor, nn

from ..hosts.host import find_host
from ..input.sincos2d import SinCos2D
from ..positions import Positions
from ..rotary.rope_axial import RopeAxial
from . import flax, huggingface, torchvision

_logger = logging.getLogger(__name__)

Weights = dict[str, Tensor]

# computed from the configuration, whatever a checkpoint says
RECOMPUTED = re.compile(
    r"(^|\.)(relative_position_index|attn_mask|relative_coords_table|periods|bias_mask|freqs_t_[xy]|rope_t_[xy]"
    r"|freqs_(cos|sin))$"
)
PRETRAINING = re.compile(r"(^mask_token$|^decoder_|^lm_head\.|^pooler\.dense\.|^pre_logits\.)")

# other libraries: the pattern of their names, and what carries these over to timm's or those of the formats below
ORIGINS = {"Hugging Face": huggingface, "torchvision": torchvision, "JAX (npz)": flax}
FOREIGN = {
    **{origin: library.NAMES for origin, library in ORIGINS.items()},
    "a ResNet": re.compile(r"^layer\d\.\d+\.(conv|bn)\d\."),
}


def convert_weights(weights: Mapping[str, Any], model: nn.Module) -> Weights:
    """Return a state dict of any known format with the names that `model` has. No tensor is resized.

    Raises:
        ValueError: names of a network that is not read, or a value that is no dense tensor of floating-point numbers.
    """
    names = model.state_dict()
    weights = {k: v for k, v in rename_foreign(weights, names).items() if k in names or not RECOMPUTED.search(k)}
    _check_origin([key for key in weights if key not in names])
    _check_values(weights, names)
    left_out = [key for key in weights if PRETRAINING.search(key) and key not in names]
    if left_out:
        _logger.warning("left out, of use in pretraining only: %s", shorten(left_out))
    for mark, convert in FORMATS.items():
        if mark in weights and mark not in names:
            weights = convert(weights, model)
    weights = {key: value for key, value in weights.items() if key not in left_out}
    return _fold_biases({_rename(key, names): value for key, value in weights.items()}, names)


def unwrap(weights: Mapping[str, Any]) -> Weights:
    """Return the state dict inside a checkpoint, without what wrappers of the model put before its names."""
    for wrapper in ("model", "module", "state_dict"):
        weights = weights[wrapper] if isinstance(weights.get(wrapper), Mapping) else weights
    return dict(clean_state_dict({str(key): value for key, value in weights.items()}))


def origin_of(keys: Iterable[str]) -> str | None:
    """Return which other library gave these names; None for timm's and those of the authors' code."""
    return next((origin for origin, library in ORIGINS.items() if any(map(library.NAMES.search, keys))), None)


def rename_foreign(weights: Mapping[str, Any], names: Container[str] = ()) -> Weights:
    """Return the state dict inside a checkpoint, with names of other libraries carried over as far as they are known.

    Args:
        weights: a checkpoint.
        names: of the model, which are nobody else's.
    """
    weights = unwrap(weights)
    origin = origin_of([key for key in weights if key not in names])
    if origin is None:
        return weights
    weights = {key: value for key, value in weights.items() if not RECOMPUTED.search(key)}
    _check_values(weights, names if isinstance(names, Mapping) else {})
    return ORIGINS[origin].read(weights)


def _check_origin(unknown: list[str]) -> None:
    for origin, pattern in FOREIGN.items():
        if key := next(filter(pattern.search, unknown), None):
            raise ValueError(f"the weights have the names of {origin}, such as {key!r}, of a network that is not read")


def _check_values(weights: Mapping[str, Any], names: Mapping[str, Tensor]) -> None:
    """Check that values are dense tensors of floating-point numbers, or of the model's own kind: norms count steps."""
    for key, value in weights.items():
        if not isinstance(value, Tensor):
            seen = f"of type {type(value).__name__}"
        elif value.is_meta:
            seen = "on the meta device, where tensors have no values"
        elif (
            value.layout != torch.strided
            or value.is_nested
            or not (value.is_floating_point() or (key in names and value.dtype == names[key].dtype))
        ):
            seen = f"{value.dtype}, {value.layout}"
        else:
            continue
        raise ValueError(f"{shorten([key])} is {seen}; weights are dense tensors of floating-point numbers")


def shorten(keys: list[str]) -> str:
    """Return the first few names as text, and how many more there are."""
    first = ", ".join(key if key.isprintable() else repr(key) for key in keys[:4])
    return first + (f" and {len(keys) - 4} more" if len(keys) > 4 else "")


def mae(weights: Weights, model: nn.Module) -> Weights:
    """Convert MAE: its frozen table of sines and cosines is what the encoding computes, if the model has that one."""
    table = weights.get("pos_embed")
    encoding = next((module for module in model.modules() if isinstance(module, SinCos2D)), None)
    if table is None or encoding is None:
        return weights
    shape, num_prefix_tokens = find_host(model).input_facts(model).feat_shape, getattr(model, "num_prefix_tokens", 0)
    positions = Positions.grid(shape, num_prefix_tokens, device=table.device)
    computed = encoding(table.new_zeros(1, positions.num_tokens, encoding.dim), positions)
    if table.shape != computed.shape or not torch.allclose(table, computed, atol=1e-5):
        return weights  # reported: another grid, or another preset
    return {key: value for key, value in weights.items() if key != "pos_embed"}


def swin(weights: Weights, model: nn.Module) -> Weights:
    """Convert Swin and Swin v2: the authors merge patches at the end of a stage, timm at the start of the next one."""

    def rename(key: str) -> str:
        key = re.sub(r"^layers\.(\d+)\.downsample", lambda match: f"layers.{int(match[1]) + 1}.downsample", key)
        return re.sub(r"^head\.(?!fc\.)", "head.fc.", key)

    return {rename(key): value for key, value in weights.items()}


def swin_absolute(weights: Weights, model: nn.Module) -> Weights:
    """Convert Swin with `ape`: a table that timm's Swin has only as the encoding `learned`."""
    table = next((key for key in model.state_dict() if re.match(r"pos_embed_input\.\d+\.pos_embed$", key)), "pos_embed")
    return {table if key == "absolute_pos_embed" else key: value for key, value in weights.items()}


def dinov3(weights: Weights, model: nn.Module) -> Weights:
    """Convert DINOv3: register tokens, gated layers under one name each, a bias of q, k, v with k's part masked."""
    replaced = {"storage_tokens": "reg_token", "mlp.w1.": "mlp.fc1_g.", "mlp.w2.": "mlp.fc1_x.", "mlp.w3.": "mlp.fc2."}
    names, converted = model.state_dict(), {}
    for key, value in weights.items():
        for theirs, timms in replaced.items():
            key = key.replace(theirs, timms)
        if key.endswith("attn.qkv.bias") and value.ndim == 1 and len(value) >= 3:
            q, k, v = value.chunk(3)
            stem = key.removesuffix("qkv.bias")
            if f"{stem}q_bias" in names:
                converted |= {f"{stem}q_bias": q, f"{stem}v_bias": v}
                continue
            if key not in names and not q.any() and not v.any():
                continue  # the distilled models have zeros here, and timm has models without
            value = torch.cat([q, torch.zeros_like(k), v])
        if not key.startswith("local_cls_norm."):  # for the local crops of the pretraining
            converted[key] = value
    return converted


def rope_vit(weights: Weights, model: nn.Module) -> Weights:
    """Convert rope-vit: the frequencies of all L layers in one tensor.

    It is (2, L, heads * head_dim / 2), or timm's (2, L, heads, head_dim / 2).

    Raises:
        ValueError: another number of layers, or of frequencies.
    """
    mark = "freqs" if "freqs" in weights else "rope.freqs"
    weights = dict(weights)
    names, freqs = model.state_dict(), weights.pop(mark)
    own = [key for key in names if re.search(r"encodings\.\d+\.freqs$", key)]
    if "rope.freqs" not in names and not own:
        return {**weights, mark: freqs}  # reported: this model has no frequencies
    shape = names["rope.freqs"].shape if "rope.freqs" in names else (2, len(own), *names[own[0]].shape[1:])
    if freqs.ndim < 3 or freqs.shape[:2] != shape[:2] or freqs[0, 0].numel() != math.prod(shape[2:]):
        raise ValueError(
            f"{mark} has the frequencies of {freqs.shape[1] if freqs.ndim > 1 else 0} layers, and the model has "
            f"{shape[1]} layers with {math.prod(shape[2:])} each; its shape is {tuple(freqs.shape)}"
        )
    freqs = freqs.reshape(shape)
    return weights | ({"rope.freqs": freqs} if not own else dict(zip(own, freqs.unbind(1), strict=True)))


def rope_swin(weights: Weights, model: nn.Module) -> Weights:
    """Convert rope-vit's Swin: a tensor in each layer; in the axial variant it is a buffer of what the formula says."""
    axial = any(isinstance(module, RopeAxial) for module in model.modules())
    kept = {key: value for key, value in weights.items() if not (axial and key.endswith(".rope_freqs"))}
    return {key.replace(".rope_freqs", ".freqs"): value for key, value in kept.items()}


# the name of a tensor that only this format has -> its function
FORMATS: dict[str, Callable[[Weights, nn.Module], Weights]] = {
    "pos_embed": mae,
    "layers.0.downsample.reduction.weight": swin,
    "absolute_pos_embed": swin_absolute,
    "storage_tokens": dinov3,
    "freqs": rope_vit,
    "rope.freqs": rope_vit,
    "layers.0.blocks.0.attn.rope_freqs": rope_swin,
}


def _rename(key: str, names: Mapping[str, Tensor]) -> str:
    """Return the model's name of a tensor that has another one in other families, or moved into an encoding."""
    if key in names:
        return key
    for theirs, ours in ((r"\.gamma_(\d)$", r".ls\1.gamma"), (r"\.ls(\d)\.gamma$", r".gamma_\1")):
        if (renamed := re.sub(theirs, ours, key)) in names:
            return renamed
    stem, attn, name = key.partition(".attn.")
    place = re.compile(re.escape(stem + attn) + r"encodings\.\d+\." + re.escape(name) + "$")
    return next(filter(place.match, names), key) if attn else key


def _fold_biases(weights: Weights, names: Mapping[str, Tensor]) -> Weights:
    """Fold BEiT's and Swin v2's biases of q and v into one of q, k and v, where the model has that."""
    for key in [key for key in weights if key.endswith("attn.q_bias") and key not in names]:
        stem = key.removesuffix("q_bias")
        parts = [weights.get(f"{stem}{part}_bias") for part in "qv"]
        if f"{stem}qkv.bias" in names and all(part is not None and part.ndim == 1 for part in parts):
            q, v = weights.pop(key), weights.pop(f"{stem}v_bias")
            weights[f"{stem}qkv.bias"] = torch.cat([q, torch.zeros_like(q), v])
    return weights
