"""Where does a model know the position of a patch? Row and column, read linearly from the features of each layer."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

__all__ = ["LayerProbe", "position_probe"]


class LayerProbe(NamedTuple):
    """Hold what can be read from the patch tokens that a layer returns.

    Args:
        layer: Which of the model's intermediate features, from 0.
        row: R^2 of the row: 1 if it can be read exactly, 0 if no better than the middle, below 0 if worse.
        column: R^2 of the column.
    """

    layer: int
    row: float
    column: float


@torch.no_grad()
def position_probe(model: nn.Module, images: Tensor, l2: float = 1e-3) -> list[LayerProbe]:
    """Return how well row and column of a patch can be read from a model's frozen features, for each layer.

    The position of patch n is fitted by ridge regression on its features, standardised to z_n:

        W = argmin_W mean_n |y_n - W z_n|^2 + l2 |W|^2,    R^2 = 1 - mean_n (y_n - W z_n)^2 / mean_n y_n^2

    where y_n is the row (or the column) of the patch, from the middle of the grid. W is fitted on the first half of the
    images and R^2 measured on the second, so that what is read is position and not the content of single pictures. An
    axis of one patch has NaN. The model is left as it was.

    Args:
        model: Any timm model with `forward_intermediates`, converted or not, pretrained or not.
        images: (B, C, H, W) normalised as the model was trained, two at least. With fewer patches in half of them than
            a layer has channels, only `l2` keeps the fit from remembering them: a few hundred images are good.
        l2: Weight of the squared coefficients in the mean loss, above 0.

    Raises:
        ValueError: a model without `forward_intermediates`, fewer than two images, or `l2` not above 0.

    Example:
        >>> model = vp.create_model("vit_tiny_patch16_224", encoding="learned", img_size=(32, 48), depth=2)
        >>> [each.layer for each in position_probe(model, torch.randn(4, 3, 32, 48))]
        [0, 1]
    """
    if not hasattr(model, "forward_intermediates"):
        raise ValueError(f"model: {type(model).__name__} given; accepted: a timm model with forward_intermediates")
    if images.ndim != 4 or len(images) < 2:
        raise ValueError(f"images: shape {tuple(images.shape)} given; accepted: (B, C, H, W) with two images or more")
    if not 0 < l2 < float("inf"):
        raise ValueError(f"l2: {l2} given; accepted: a number above 0")
    modes = {module: module.training for module in model.modules()}
    try:
        found = model.eval().forward_intermediates(images, output_fmt="NCHW", intermediates_only=True)
    finally:
        for module, training in modes.items():
            module.training = training
    return [LayerProbe(layer, *explained(features.double(), l2)) for layer, features in enumerate(found)]


def explained(features: Tensor, l2: float) -> list[float]:
    """Return R^2 of row and column from features (B, C, H, W) float64, fitted on the first half of the B images."""
    height, width = features.shape[2:]
    axes = torch.meshgrid(*(torch.arange(side, dtype=features.dtype) for side in (height, width)), indexing="ij")
    targets = torch.stack(axes, -1).flatten(0, 1).to(features.device)  # (H W, 2)
    targets = targets - targets.mean(0)
    fitted, judged = (half.permute(0, 2, 3, 1).flatten(0, 2) for half in features.tensor_split(2))  # (B/2 H W, C)
    mean, std = fitted.mean(0), fitted.std(0, correction=0).clamp(min=1e-12)
    fitted, judged = (fitted - mean) / std, (judged - mean) / std  # the targets' mean is 0: no constant is needed
    gram = fitted.T @ fitted / len(fitted) + l2 * torch.eye(fitted.shape[1]).to(fitted)  # (C, C)
    weight = torch.linalg.solve(gram, fitted.T @ targets.repeat(len(fitted) // len(targets), 1) / len(fitted))  # (C, 2)
    errors = judged @ weight - targets.repeat(len(judged) // len(targets), 1)
    spread = targets.square().mean(0)
    return [
        1 - (error / scale).item() if scale else float("nan")
        for error, scale in zip(errors.square().mean(0), spread, strict=True)
    ]
