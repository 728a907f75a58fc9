"""Models made with a chosen encoding: `create_model`, also as an extractor of features."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import timm
from timm.models._features import FeatureGetterNet
from torch import Tensor, nn

from .convert import ARCHITECTURE, Item, convert_model, items_of
from .hosts.host import find_host
from .registry import Spec
from .weights.load import create_with_weights

__all__ = ["FeatureExtractor", "create_model"]


def create_model(
    name: str,
    encoding: Spec | None = None,
    *,
    weights: str | Path | Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> nn.Module:
    """Build a timm model by name and convert it: `timm.create_model`, then `set_encoding`, then weights.

    Args:
        name: a timm model name.
        encoding: an encoding spec; None keeps the model's own.
        weights: a checkpoint, as `load_weights` takes it. The model gets its sizes (image, patch, channels, classes,
            window), unless kwargs say others: tables are carried over to another size, and another number of classes
            gets a new head. What differs by the encoding is said in one line.
        kwargs: everything that `timm.create_model` takes: pretrained, img_size, patch_size, num_classes ... With
            features_only=True the levels and their layout are those of the family, out of a `FeatureExtractor`.

    Raises:
        ValueError: an unknown encoding or option, or a model that is no host, both checked before the model is built;
            weights that do not fit the architecture.

    Example:
        >>> model = vp.create_model("vit_tiny_patch16_224", encoding="rope_axial", img_size=(32, 48), depth=2)
        >>> model(torch.randn(1, 3, 32, 48)).shape
        torch.Size([1, 1000])
    """
    spec = None if encoding is None else items_of(encoding)
    if weights is not None:
        return create_with_weights(partial(_create, name, spec), weights, kwargs)
    return _create(name, spec, **kwargs)


def _create(name: str, spec: list[Item] | None, **kwargs: Any) -> nn.Module:
    if spec is None:
        return timm.create_model(name, **kwargs)
    if kwargs.get("features_only"):
        return _create_extractor(name, spec, **kwargs)
    return convert_model(timm.create_model(name, **kwargs), spec)


class FeatureExtractor(FeatureGetterNet):
    """timm's feature extractor by `forward_intermediates`, which keeps a converted model whole.

    Swin's own in timm is made of the model's parts, among which input encodings would be missing. Its layout,
    (B, H, W, C), is one that timm's `forward_intermediates` does not give.
    """

    def __init__(self, model: nn.Module, out_indices: int | Sequence[int], output_fmt: str = "NCHW", **_: Any):
        super().__init__(model, out_indices=out_indices)
        self.channels_last = output_fmt == "NHWC"

    def forward(self, x: Tensor) -> list[Tensor]:
        """Return the features of images (B, C, H, W), one tensor for each level."""
        levels = super().forward(x)
        return [level.permute(0, 2, 3, 1) for level in levels] if self.channels_last else levels


def _create_extractor(
    name: str, spec: list[Item], feature_cls: str | Callable[..., nn.Module] = "getter", **kwargs: Any
) -> nn.Module:
    """Return a feature extractor around a model that is converted first: timm's wrappers cut layers away.

    Those that take a model apart are refused: they lose its input encodings.
    """
    if isinstance(feature_cls, str) and feature_cls != "getter":
        raise ValueError(f"feature_cls must be 'getter', which keeps a converted model whole, got {feature_cls!r}")
    wrap = FeatureExtractor if feature_cls == "getter" else feature_cls

    def convert(model: nn.Module, out_indices, output_fmt: str = "NCHW", **_: Any) -> nn.Module:
        layout = output_fmt if find_host(model).channels_last_features else "NCHW"  # timm says that of tokens, too
        return wrap(convert_model(model, spec), out_indices=out_indices, output_fmt=layout)

    features = timm.create_model(name, feature_cls=convert, **kwargs)
    if isinstance(features, FeatureGetterNet):  # what timm writes down names the host alone, and `convert`
        arguments = {**getattr(features, "_model_args", {}), **getattr(features.model, "_model_args", {})}
        features._model_args = {key: value for key, value in arguments.items() if key != "feature_cls"}
        features.pretrained_cfg = {**features.pretrained_cfg, "architecture": ARCHITECTURE}
        features.default_cfg = features.pretrained_cfg
    return features
