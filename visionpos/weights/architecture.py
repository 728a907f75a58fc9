"""What a checkpoint needs of the architecture that it is loaded into: sizes that timm takes as arguments."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

# `hidden_act` of transformers -> `act_layer` of timm, where it is not the one that the architecture has by default
ACTIVATIONS = {"gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh", "quick_gelu": "quick_gelu"}
PATCHES = "patch_embed.proj.weight"  # (dim, channels, height, width of a patch)


def needed_options(weights: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Any]:
    """Return arguments of `timm.create_model` for the sizes of a checkpoint: patch, channels, classes, image, window.

    Args:
        weights: under timm's names or those of the authors' code, see `rename_foreign`.
        config: of config.json beside it, empty if there is none. Without it, tables are taken for square ones.

    Returns:
        patch_size, in_chans, num_classes, img_size, window_size and act_layer, those of them that the checkpoint tells.
    """
    options: dict[str, Any] = {}
    kernel, head = weights.get(PATCHES), weights.get("head.fc.weight", weights.get("head.weight"))
    if kernel is not None and kernel.ndim == 4:
        options["in_chans"] = kernel.shape[1]
        if not any(re.match(r"blocks\.\d+\.proj\.", key) for key in weights):  # Hiera's patches overlap
            options["patch_size"] = kernel.shape[2] if kernel.shape[2] == kernel.shape[3] else tuple(kernel.shape[2:])
    options["num_classes"] = 0 if head is None else head.shape[0]
    window = config.get("window_size", _table_side(weights, r"^layers\.0\..*relative_position_bias_table$", 0))
    if window:
        options["window_size"] = window
    if config.get("hidden_act") in ACTIVATIONS:
        options["act_layer"] = ACTIVATIONS[config["hidden_act"]]
    size = config.get("image_size") or _image_side(weights, options.get("patch_size"))
    if size:
        options["img_size"] = tuple(size) if isinstance(size, (list, tuple)) else size
    return options


def _image_side(weights: Mapping[str, Tensor], patch_size: Any) -> int | None:
    """Return the side of square images, from a table of their patches; None if there is none that could be square."""
    if not isinstance(patch_size, int):
        return None
    side = _table_side(weights, r"^(blocks\.0\.attn|rel_pos_bias)\.relative_position_bias_table$", 3)
    table = weights.get("pos_embed")
    if side is None and table is not None and table.ndim == 3:
        prefix = sum(weights[name].shape[1] for name in ("cls_token", "dist_token") if name in weights)
        sides = [math.isqrt(rows) for rows in (table.shape[1] - prefix, table.shape[1]) if rows > 0]
        side = next((s for s in sides if s * s in (table.shape[1] - prefix, table.shape[1])), None)
    return None if side is None else side * patch_size


def _table_side(weights: Mapping[str, Tensor], pattern: str, class_rows: int) -> int | None:
    """Return the side of the square window that a table of offsets is for, ((2 side - 1)^2 + class rows, heads)."""
    table = next((value for key, value in weights.items() if re.search(pattern, key)), None)
    if table is None or table.ndim != 2:
        return None
    side = (math.isqrt(max(len(table) - class_rows, 0)) + 1) // 2
    return side if side and (2 * side - 1) ** 2 == len(table) - class_rows else None
