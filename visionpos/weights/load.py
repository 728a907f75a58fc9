"""Loading of weights into a model with encodings, from its own state dict or from original formats (`formats.py`)."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from timm.layers import resample_patch_embed, to_2tuple
from torch import Tensor, nn

from ..bias.relative_table import RelativeTable
from ..encoding import PositionEncoding
from ..hosts.host import find_host
from ..hosts.rel_pos import HeadsFirst
from ..input.learned import Learned
from ..resize import resize_position_table
from .architecture import PATCHES, needed_options
from .formats import Weights, convert_weights, origin_of, rename_foreign, shorten, unwrap
from .read import read_config, read_weights

_logger = logging.getLogger(__name__)

Resize = bool | tuple[int, int]

POSITIONS = re.compile(r"(pos_embed|relative_position_bias_table|cpb_mlp\.\d\.\w+|freqs)$")


def load_weights(
    model: nn.Module, weights: str | Path | Mapping[str, Any], strict: bool = True, resize: Resize = False
):
    """Load weights into a model, converted or not: its own, or those of another origin.

    Known are ViT, DeiT, MAE, Swin, Swin v2, BEiT, DINOv3 and rope-vit in their original formats and ViT's .npz files;
    of Hugging Face ViT, DeiT, DINOv2, DINOv3, MAE, Swin, Swin v2, BEiT, SigLIP, I-JEPA and Hiera; of torchvision ViT,
    Swin and Swin v2.

    Args:
        model: a timm model of a supported family.
        weights: a .safetensors or .npz file, a directory that Hugging Face or timm saved a model in, or a state dict,
            also one inside {"model": ...} or {"state_dict": ...}.
        strict: every tensor of the model must be there, and no other. False keeps the initial values of the missing
            ones, such as those that a new encoding brought, leaves the others out, and logs both in one line.
        resize: carry position tables over from another grid or window. True where the weights' was square, else
            its (h, w).

    Returns:
        `missing_keys` and `unexpected_keys`, as `load_state_dict` does.

    Raises:
        ValueError: a file of another type or a damaged one, names of another library, weights of which nothing is for
            the layers of the model, values that are no dense floating-point tensors, tensors of another shape, or,
            when strict, missing or unknown ones. No tensor of the model is changed then.

    Example:
        >>> model = vp.create_model("vit_tiny_patch16_224", "learned+rope_mixed", depth=1)
        >>> plain = timm.create_model("vit_tiny_patch16_224", depth=1)  # knows nothing of the frequencies
        >>> vp.load_weights(model, plain.state_dict(), strict=False).missing_keys
        ['blocks.0.attn.encodings.0.freqs']
    """
    if not isinstance(resize, bool):
        resize = _checked_size(resize)
    weights = unwrap(read_weights(weights))
    find_host(model).convert(model)
    with naming_origin(weights, model):
        weights = convert_weights(weights, model)
        return load_converted(model, weights, strict, {key: resize for _, key in _tables(model)})


@contextmanager
def naming_origin(weights: Mapping[str, Any], model: nn.Module | None = None) -> Iterator[None]:
    """Say in errors which other library the weights are of."""
    names = {} if model is None else model.state_dict()
    origin = origin_of([key for key in weights if key not in names])
    try:
        yield
    except ValueError as error:
        if origin is None or origin in str(error):
            raise
        raise ValueError(f"weights of {origin}: {error}") from error


def create_with_weights(
    create: Callable[..., nn.Module], weights: str | Path | Mapping[str, Any], options: dict[str, Any]
) -> nn.Module:
    """Return a model of the sizes that a checkpoint needs, with its weights.

    Args:
        create: builds and converts the model from arguments of `timm.create_model`.
        weights: as `load_weights` takes them.
        options: arguments that were asked for, which go before those that the checkpoint needs: a head of other classes
            stays new, tables are carried over to another size.

    Raises:
        ValueError: weights that do not fit the architecture.
    """
    config, given = read_config(weights), unwrap(read_weights(weights))
    with naming_origin(given):
        needed = needed_options(rename_foreign(given), config)
    model = create(**{**needed, **options})
    find_host(model).convert(model)
    with naming_origin(given, model):
        shape = needed.get("img_size", 0)
        converted = fit_pretrained(given, model, to_2tuple(shape) if shape else None)
        names = model.state_dict()
        heads = [key for key in {**names, **converted} if re.match(r"head(_dist)?\.(fc\.)?(weight|bias)$", key)]
        if any(key not in converted or key not in names or converted[key].shape != names[key].shape for key in heads):
            if any(key in names for key in heads):
                _logger.warning("the head for %s classes is new", model.num_classes)
            converted = {key: value for key, value in converted.items() if key not in heads}
            converted |= {key: names[key] for key in heads if key in names}
        load_converted(model, converted)
    return model


def load_converted(model: nn.Module, weights: Weights, strict: bool = True, resize: Mapping[str, Resize] | None = None):
    """Load tensors that have the model's own names; `resize` is for each of its position tables, by name.

    Everything is checked before the first tensor is written.
    """
    difference, misfit = _difference(weights, model), f"the weights do not fit {type(model).__name__}"
    if _are_strangers(weights, model):
        raise ValueError(f"{misfit}, nothing of them is for its layers: {difference}")
    weights = _resized(weights, model, resize or {})
    _check_targets(weights, model)
    if difference and strict:
        raise ValueError(f"{misfit}: {difference}; strict=False loads the rest")
    if difference:
        _logger.warning("loaded without these: %s", difference)
    return model.load_state_dict(weights, strict=False)


def fit_pretrained(weights: Weights, model: nn.Module, img_size: tuple[int, int] | None = None) -> Weights:
    """Return pretrained weights that fit a converted model: only encodings may differ, and one line says how.

    This is the model's `pretrained_filter_fn` in timm's sense: patches of another size and position tables are
    resampled here, as timm's own filters do; the classifier and the channels, which timm adapts afterwards, are left.

    Args:
        weights: of any known format.
        model: the converted model.
        img_size: of the pictures that the weights are for; by default what timm knows of the architecture.
    """
    weights = convert_weights(weights, model)
    size = img_size or model.pretrained_cfg["input_size"][-2:]
    weights = _resized(weights, model, _source_shapes(weights, model, size))
    kernel, target = weights.get(PATCHES), model.state_dict().get(PATCHES)
    if kernel is not None and target is not None and kernel.ndim == target.ndim == 4:
        weights[PATCHES] = resample_patch_embed(kernel, list(target.shape[-2:]))
    ours = _encoding_tensors(model)
    new = {key: ours[key] for key in ours if key not in weights}
    old = [key for key in weights if POSITIONS.search(key) and key not in model.state_dict()]
    if new or old:
        _logger.warning("pretrained weights: %s", _sentence({"new in this encoding": new, "positions left out": old}))
    return {**{key: value for key, value in weights.items() if key not in old}, **new}


def _checked_size(resize: Any) -> tuple[int, int]:
    if not (isinstance(resize, (tuple, list)) and len(resize) == 2 and all(type(n) is int and n > 0 for n in resize)):
        raise ValueError(f"resize must be True, False or a grid (h, w) of positive integers, got {resize!r}")
    return tuple(resize)


def _resized(weights: Weights, model: nn.Module, resize: Mapping[str, Resize]) -> Weights:
    """Return weights with the position tables that `resize` names carried over to the model's grid or window."""
    weights, names = dict(weights), model.state_dict()
    for encoding, key in _tables(model):
        # also of the same shape: 2 x 8 tokens are as many as 4 x 4
        if resize.get(key) and key in weights and weights[key].ndim == names[key].ndim:
            weights[key] = _resize_table(weights[key], encoding, resize[key])
    return weights


def _check_targets(weights: Weights, model: nn.Module) -> None:
    """Check that every tensor can be copied into that of its name.

    Raises:
        ValueError: a model without memory, or a tensor of another shape; names both, and what converts it.
    """
    tables = {key: encoding for encoding, key in _tables(model)}
    for key, target in model.state_dict().items():
        if key in weights and weights[key].shape != target.shape:
            raise ValueError(
                f"{key} is {tuple(weights[key].shape)} in the weights and {tuple(target.shape)} in the model; "
                + _advice(key, tables.get(key), weights[key])
            )
        if target.is_meta:
            raise ValueError(f"{key} of the model is on the meta device; call model.to_empty(device=...) first")


def _are_strangers(weights: Weights, model: nn.Module) -> bool:
    """Return whether weights are those of another network: nothing is for a layer, and most of them or all unknown."""
    known = [key for key in model.state_dict() if key in weights]
    return not known or (2 * len(known) < len(weights) and not any(re.search(r"\.\d+\.", key) for key in known))


def _tables(model: nn.Module) -> Iterable[tuple[Learned | RelativeTable, str]]:
    paths = {module: path for path, module in model.named_modules()}
    for module in paths:
        if isinstance(module, (Learned, RelativeTable)):
            name = "pos_embed" if isinstance(module, Learned) else "relative_position_bias_table"
            yield module, f"{paths[module.owner]}.{name}".removeprefix(".")


def _resize_table(table: Tensor, encoding: Learned | RelativeTable, resize: Resize) -> Tensor:
    if table.ndim == 3 and isinstance(encoding, RelativeTable):  # in the layout of TensorFlow's MaxViT
        return HeadsFirst().write(_resize_table(HeadsFirst().read(table), encoding, resize), encoding)
    learned, rows = isinstance(encoding, Learned), table.shape[-2]
    old, new = resize, encoding.feat_shape
    if resize is True and (learned or encoding.preset == "levit"):
        old = _square(rows - encoding.num_prefix_tokens if learned else rows)
    elif resize is True:
        old = tuple((size + 1) // 2 for size in _square(rows - encoding.dialect.class_rows))
    if rows != _num_rows(encoding, old):
        raise ValueError(f"a table of {rows} rows is not that of {tuple(old)}, which has {_num_rows(encoding, old)}")
    if learned:
        return resize_position_table(
            table, new, old, encoding.num_prefix_tokens, encoding.interpolation, encoding.antialias
        )
    return encoding.dialect.resize(table, new, old, encoding.interpolation)


def _square(rows: int) -> tuple[int, int]:
    side = math.isqrt(max(rows, 0))
    if side * side != rows:
        raise ValueError(f"a table of {rows} rows is not that of a square grid: give its shape, resize=(h, w)")
    return side, side


def _source_shapes(weights: Weights, model: nn.Module, size: tuple[int, int]) -> dict[str, Resize]:
    """Return the grid of each table of pretrained weights: that of pictures of `size`, else square if it must be."""
    names = model.state_dict()
    patches, kernel = getattr(model, "patch_embed", None), weights.get(PATCHES)
    patch = getattr(patches, "patch_size", size) if kernel is None or kernel.ndim != 4 else kernel.shape[-2:]
    grid = tuple(pixels // side for pixels, side in zip(size, to_2tuple(patch), strict=True))
    shapes: dict[str, Resize] = {}
    for encoding, key in _tables(model):
        if key in weights:
            known = encoding.feat_shape == getattr(patches, "grid_size", None)
            known = known and weights[key].shape[-2] == _num_rows(encoding, grid)
            shapes[key] = grid if known else weights[key].shape != names[key].shape
    return shapes


def _num_rows(encoding: Learned | RelativeTable, shape: tuple[int, int]) -> int:
    h, w = shape
    if isinstance(encoding, Learned):
        return encoding.num_prefix_tokens + h * w
    return h * w if encoding.preset == "levit" else (2 * h - 1) * (2 * w - 1) + 3 * (encoding.preset == "beit")


def _advice(key: str, encoding: PositionEncoding | None, given: Tensor) -> str:
    if encoding is not None:
        function = "resize_position_table" if isinstance(encoding, Learned) else "resize_relative_table"
        square = "resize=True (of load_weights) carries it over from a square grid"
        return f"{square}, resize=(h, w) from any other (see {function})"
    if key.startswith("head") and given.ndim:
        return f"create the model with num_classes={given.shape[0]}, or leave the head out"
    if key == PATCHES and given.ndim == 4:
        return f"create the model with patch_size={tuple(given.shape[2:])} and in_chans={given.shape[1]}"
    return "create the model as the weights need it"


def _encoding_tensors(model: nn.Module) -> Weights:
    """Return what encodings have in the state dict, tables under the host's names included."""
    inside = {
        f"{path}.{name}"
        for path, module in model.named_modules()
        if isinstance(module, PositionEncoding)
        for name in module.state_dict()
    }
    inside |= {key for _, key in _tables(model)}
    return {key: value for key, value in model.state_dict().items() if key in inside}


def _difference(weights: Weights, model: nn.Module) -> str:
    names, ours = model.state_dict(), _encoding_tensors(model)
    missing = [key for key in names if key not in weights]
    return _sentence(
        {
            "new in this encoding": [key for key in missing if key in ours],
            "missing in the weights": [key for key in missing if key not in ours],
            "unknown to the model": [key for key in weights if key not in names],
        }
    )


def _sentence(groups: Mapping[str, Iterable[str]]) -> str:
    return "; ".join(f"{what}: {shorten(list(keys))}" for what, keys in groups.items() if keys)
