"""timm entry points with an encoding: `timm.create_model("visionpos_vit_tiny_patch4_32", encoding="rope_axial")`.

`encoding` is any spec; without it a model keeps its host's own positions. All other arguments are timm's. Weights load
after the conversion, so that a model saved by `timm.models.save_for_hf` comes back with its encoding.

This file is imported as soon as visionpos and timm are. It asks for the rest of visionpos when a model is built: the
import of timm that it follows may be that of `convert`, which is then not ready.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from timm.layers import register_notrace_module, to_2tuple
from timm.models import build_model_with_cfg, generate_default_cfgs, get_pretrained_cfg, register_model
from torch import nn

from .encoding import OneNode
from .registry import Spec

register_notrace_module(OneNode)

CIFAR = {
    "num_classes": 10,
    "input_size": (3, 32, 32),
    "fixed_input_size": True,
    "crop_pct": 1.0,
    "interpolation": "bicubic",
    "mean": (0.4914, 0.4822, 0.4465),
    "std": (0.2470, 0.2435, 0.2616),
    "first_conv": "patch_embed.proj",
}
VIT, SWIN = {**CIFAR, "classifier": "head"}, {**CIFAR, "classifier": "head.fc"}
VIT_HOST, SWIN_HOST = "vit_tiny_patch16_224", "swin_tiny_patch4_window7_224"

default_cfgs = generate_default_cfgs(
    {
        "visionpos_vit_tiny_patch4_32": VIT,
        "visionpos_vit_small_patch4_32": VIT,
        "visionpos_vit_xs_patch4_32": VIT,
        "visionpos_swin_xs_patch2_window4_32": SWIN,
        "visionpos_vit_tiny_patch16_224": get_pretrained_cfg(VIT_HOST).to_dict(),
        "visionpos_swin_tiny_patch4_window7_224": get_pretrained_cfg(SWIN_HOST).to_dict(),
    }
)


def _build(
    host: str, encoding: Spec | None, encoded_size: Sequence[int] | None, levels: dict, img_size=None, **kwargs: Any
) -> nn.Module:
    """Return the converted model, without weights; encodings are made for `encoded_size` and carried to `img_size`.

    If the host is asked for features, `levels` gets which ones and in which layout.
    """
    from .create import create_model

    def note(model: nn.Module, out_indices, output_fmt: str = "NCHW", **_: Any) -> nn.Module:
        levels.update(out_indices=out_indices, output_fmt=output_fmt)
        return model

    size, built_size = (given and to_2tuple(given) for given in (img_size, encoded_size or img_size))
    extracted = {"feature_cls": note} if "features_only" in kwargs else {}
    model = create_model(host, encoding=encoding, img_size=built_size, **kwargs, **extracted)
    if size and size != built_size:
        if not hasattr(model, "set_input_size"):  # SAM and Hiera, which have one size for life
            return _build(host, encoding, None, levels, size, **kwargs)
        windows = {"window_size": kwargs["window_size"]} if "window_size" in kwargs else {}
        model.set_input_size(size, **windows)
    model._model_args = {k: v for k, v in getattr(model, "_model_args", {}).items() if k not in ("host", "feature_cls")}
    return model


def _create(
    variant: str,
    pretrained: bool,
    host: str,
    encoding: Spec | None = None,
    encoded_size: Sequence[int] | None = None,
    **kwargs: Any,
) -> nn.Module:
    from .create import FeatureExtractor
    from .weights.load import fit_pretrained

    levels = {"feature_cls": FeatureExtractor, "flatten_sequential": True}  # timm reads it after the host was built
    asked = {
        key: kwargs[key] for key in ("features_only", "out_indices") if kwargs.get("features_only") and key in kwargs
    }
    return build_model_with_cfg(
        partial(_build, host, encoding, encoded_size, levels, **asked),
        variant,
        pretrained,
        pretrained_filter_fn=fit_pretrained,
        feature_cfg=levels,
        **kwargs,
    )


@register_model
def visionpos(
    pretrained: bool = False, *, host: str | None = None, pretrained_cfg: Any = None, **kwargs: Any
) -> nn.Module:
    """Build any timm model that takes encodings, by its name as `host`. Saved conversions come back through it.

    Raises:
        ValueError: the model is no host, or an unknown encoding; no host, as where timm saved a model without the
            arguments that made it.
    """
    from .convert import ARCHITECTURE

    if host is None:
        raise ValueError(
            "host: not given; accepted: the name of a timm model. A saved model that says none was saved by a timm "
            "older than 1.0.31 without model_args={'host': ..., 'encoding': ..., and what else made it}"
        )
    known, given = get_pretrained_cfg(host), pretrained_cfg or {}
    has_weights = not isinstance(given, dict) or any(map(given.get, ("file", "url", "hf_hub_id", "state_dict")))
    if known is not None and not has_weights:
        pretrained_cfg = {**known.to_dict(), "architecture": ARCHITECTURE}
    return _create(ARCHITECTURE, pretrained, host, pretrained_cfg=pretrained_cfg, **kwargs)


@register_model
def visionpos_vit_tiny_patch4_32(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Build ViT-Ti for images of 32 x 32: 64 tokens of 4 x 4 pixels and a class token; 5.4M parameters."""
    options = {"patch_size": 4, "embed_dim": 192, "depth": 12, "num_heads": 3}
    return _create("visionpos_vit_tiny_patch4_32", pretrained, VIT_HOST, **{**options, **kwargs})


@register_model
def visionpos_vit_small_patch4_32(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Build the ViT of the CIFAR recipe: 64 tokens, 6 heads of 32 channels, mean of the tokens; 2.7M parameters."""
    options = {"patch_size": 4, "embed_dim": 192, "depth": 9, "num_heads": 6, "mlp_ratio": 2.0}
    options |= {"class_token": False, "global_pool": "avg"}
    return _create("visionpos_vit_small_patch4_32", pretrained, VIT_HOST, **{**options, **kwargs})


@register_model
def visionpos_vit_xs_patch4_32(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Build the small ViT of the CIFAR recipe: 64 tokens, 4 heads of 32, mean of the tokens; 0.8M parameters."""
    options = {"patch_size": 4, "embed_dim": 128, "depth": 6, "num_heads": 4, "mlp_ratio": 2.0}
    options |= {"class_token": False, "global_pool": "avg"}
    return _create("visionpos_vit_xs_patch4_32", pretrained, VIT_HOST, **{**options, **kwargs})


@register_model
def visionpos_swin_xs_patch2_window4_32(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Build a Swin for images of 32 x 32: grids of 16, 8 and 4 tokens a side, windows of 4; 7.1M parameters."""
    options = {"patch_size": 2, "window_size": 4, "embed_dim": 96, "depths": (2, 6, 4), "num_heads": (3, 6, 12)}
    return _create(
        "visionpos_swin_xs_patch2_window4_32", pretrained, SWIN_HOST, **{**options, "mlp_ratio": 2.0, **kwargs}
    )


@register_model
def visionpos_vit_tiny_patch16_224(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Build timm's vit_tiny_patch16_224 with its pretrained weights."""
    options = {"patch_size": 16, "embed_dim": 192, "depth": 12, "num_heads": 3}
    return _create("visionpos_vit_tiny_patch16_224", pretrained, VIT_HOST, **{**options, **kwargs})


@register_model
def visionpos_swin_tiny_patch4_window7_224(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Build timm's swin_tiny_patch4_window7_224 with its pretrained weights."""
    options = {"patch_size": 4, "window_size": 7, "embed_dim": 96, "depths": (2, 2, 6, 2), "num_heads": (3, 6, 12, 24)}
    return _create("visionpos_swin_tiny_patch4_window7_224", pretrained, SWIN_HOST, **{**options, **kwargs})
