"""The accuracy of a trained run on pictures of other sizes and shapes, moved, or on a larger canvas.

`train.evaluate` and the sweep measure by `measure`, which says what it returns, and write by `record`. The weights are
those of the last checkpoint, averaged if the run has such; the patch, and Swin's windows, stay as trained.
"""

import copy
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import visionpos as vp
from visionpos.options import fits, hints
from visionpos.registry import constructor_parameters
from visionpos.rotary.scaling import SCALINGS, FrequencyRotary, is_scaling
from visionpos.training.config.schema import Config, encoding_label
from visionpos.training.errors import ConfigError
from visionpos.training.run.build import trained_model
from visionpos.training.run.engine import mixed_precision, pick_device
from visionpos.training.run.objective import answers
from visionpos.training.run.record import open_run, write_json, write_tensors
from visionpos.training.run.source import (
    Batching,
    open_evaluation,
    open_task,
    picture_split,
    task_batches,
    task_splits,
)

__all__ = [
    "evaluate",
    "measure",
    "on_canvas",
    "parse_size",
    "record",
    "scaled",
    "shifted",
    "size_text",
    "with_input_size",
]

Size = tuple[int, int]


def evaluate(path: Path, *args: Any, **options: Any) -> dict[str, Any]:
    """Measure the run at `path` as `measure` does, record it in its directory, and return the report."""
    report, kept = measure(path, *args, **options)
    record(path, report, kept)
    return report


def record(path: Path, report: dict[str, Any], kept: dict[str, Tensor]) -> None:
    """Write what `measure` returned into a run directory: `evaluate.*`, `evaluate_extrapolated.*`, `evaluate_ntk.*` ...

    Raises:
        OSError: nothing can be written there.
    """
    way = report["coordinates"].removesuffix("-scaled")
    name = "evaluate" if way == "interpolated" else f"evaluate_{way}"
    write_tensors(path / f"{name}.safetensors", kept)  # before the report: where that is, they are
    write_json(path / f"{name}.json", report)


def measure(
    path: Path,
    sizes: Sequence[Size],
    canvas: Sequence[Size] = (),
    extrapolate: bool = False,
    device: str | None = None,
    shifts: Sequence[Size] = (),
    scaling: str | None = None,
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Measure the run at `path` at the size it was trained on, scaled to each of `sizes`, and so on.

    Returns the report, and the answers (N,) to every test picture, named as in "scale 24x24 test", and which of them
    are right, (N,) bool, as in "right scale 24x24 test".

    Args:
        path: The run directory.
        sizes: (H, W) in pixels.
        canvas: (H, W) in pixels.
        extrapolate: Let coordinates run on beyond the trained grid instead of interpolating them into it.
        device: Where to compute; by default where the run did.
        shifts: (down, right) in pixels.
        scaling: Of the frequencies of the rotary encodings: linear, ntk, ntk_by_parts or yarn; see
            `visionpos.rotary.scaling`. Other encodings then do what they do by themselves.
    """
    if scaling is not None and (extrapolate or not is_scaling(scaling)):
        given = f"{scaling!r} given beside --extrapolate" if extrapolate else f"{scaling!r} given"
        raise ConfigError(f"--scaling: {given}; accepted: one of {', '.join(SCALINGS)}, without --extrapolate")
    config, found = open_run(path)
    device = pick_device(device or config.device)
    model, weights = trained_model(config, found)
    model.to(device)
    trained = tuple(found.metadata["image_size"])
    requests = [("scale", size) for size in dict.fromkeys([trained, *sizes])] + [("canvas", size) for size in canvas]
    requests += [("shift", shift) for shift in shifts]
    check_sizes(config, model, requests, trained)
    precision = mixed_precision(device, config.precision)
    pictures = None if config.data.is_task else open_evaluation(config.data, found.metadata, device, path)
    rows, unmoved, kept, joined, confusion = [], {}, {}, [], None
    for how, size in requests:
        try:
            resized = with_input_size(model, trained if how == "shift" else size, extrapolate, scaling)
            if hasattr(resized, "sees_across_border") and resized.sees_across_border():
                joined.append(f"{how} {size_text(size)}")
            for split, batches in splits_at(config, pictures, how, size, device):
                with precision:
                    best, labels = answers(resized, batches, TOP)
                given = best[:, 0]
                key = f"{how} {size_text(size)} {split}"
                kept |= {key: compact(given), f"right {key}": (given == labels).cpu()}
                row = {"how": how, "size": list(size), "part": split, "accuracy": fraction(given == labels)}
                if best.shape[1] == TOP:  # else every answer is among the best
                    row["top5"] = fraction((best == labels[:, None]).any(1))
                if confusion is None:  # of the size that was trained on, and the first split
                    confusion = confusion_matrix(given, labels, found.metadata["num_classes"])
                unmoved.setdefault(split, given)  # the first request is the size that was trained on
                rows.append(row | ({"consistency": fraction(given == unmoved[split])} if how == "shift" else {}))
        except ValueError as error:  # an encoding that is not defined at this size
            raise ConfigError(f"{how} {size_text(size)}: {error}") from None
    report = {
        "run": str(path),
        "encoding": encoding_label(config.encoding),
        "step": found.step,
        "weights": weights,
        "coordinates": f"{scaling}-scaled" if scaling else "extrapolated" if extrapolate else "interpolated",
        "own_coordinates": own_coordinates(model),
        "chance": found.metadata["chance"],
        "test_size": found.metadata["test_size"],
        "note": "; ".join([found.metadata["note"], *across_border(joined)]),
        "rows": rows,
        **by_class(confusion, found.metadata.get("classes")),
    }
    return report, kept


def across_border(requests: Sequence[str]) -> list[str]:
    """Return a sentence about the sizes at which a Swin sees across the border of the picture, if there are any."""
    what = "Swin's windows do not divide the grid, and tokens of opposite borders see each other, as in timm"
    return [f"{', '.join(requests)}: {what}"] if requests else []


def confusion_matrix(given: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """Return how many pictures of each class (row) were taken for each class (column): (K, K) int64."""
    pairs = labels * num_classes + given
    return torch.bincount(pairs, minlength=num_classes**2).view(num_classes, num_classes).cpu()


def by_class(confusion: Tensor, classes: Sequence[str] | None) -> dict[str, Any]:
    """Return the names of the classes, the accuracy of each (None where it has no pictures), and the matrix."""
    pairs = zip(confusion.diag().tolist(), confusion.sum(1).tolist(), strict=True)
    accuracy = [right / total if total else None for right, total in pairs]
    names = list(map(str, classes or range(len(confusion))))
    return {"classes": names, "class_accuracy": accuracy, "confusion": confusion.tolist()}


TOP = 5  # answers of which one must be right, for `top5`


def compact(answers: Tensor) -> Tensor:
    """Return answers (N,), numbers of classes, in the smallest type that holds them."""
    return answers.cpu().to(torch.uint8 if answers.max() < 256 else torch.int32)


def fraction(flags: Tensor) -> float:
    """Return how much of a bool tensor is True."""
    return flags.float().mean().item()


def check_sizes(config: Config, model: nn.Module, requests: Sequence[tuple[str, Size]], trained: Size) -> None:
    """Raise ConfigError, before anything is measured, for a size that cannot be."""
    patch = model.patch_embed.patch_size
    unit = (config.data.cell, config.data.cell) if config.data.is_task else patch
    for how, size in requests:
        if how in ("canvas", "shift") and config.data.is_task:
            raise ConfigError(
                f"--{how.replace('shift', 'shifts')}: a position task has no pictures for that; accepted: --sizes"
            )
        if how == "shift":
            if any(side >= own for side, own in zip(size, trained, strict=True)):
                raise ConfigError(f"--shifts: {size_text(size)} leaves nothing of the pictures, {size_text(trained)}")
            continue
        if any(side < 1 or side % step for side, step in zip(size, unit, strict=True)):
            raise ConfigError(
                f"{how}: {size_text(size)} is not a whole number of patches; accepted: multiples of {size_text(unit)}"
            )
        if how == "canvas" and any(side < own for side, own in zip(size, trained, strict=True)):
            raise ConfigError(f"--canvas: {size_text(size)} is smaller than the pictures, {size_text(trained)}")


def splits_at(
    config: Config, pictures: Batching | None, how: str, size: Size, device: torch.device
) -> Iterator[tuple[str, Iterator[tuple[Tensor, Tensor]]]]:
    """Yield each split of the test at another size: its name and its batches."""
    if pictures is None:
        task = open_task(replace(config.data, grid=tuple(side // config.data.cell for side in size)))
        for split in task_splits(task):
            yield split, task_batches(task, split, torch.Generator(device))
    else:
        change = {"scale": scaled, "canvas": on_canvas, "shift": shifted}[how]
        yield picture_split(config.data), pictures(lambda images: change(images, size))


def own_coordinates(model: nn.Module) -> str:
    """Return what the model does by itself: its coordinates are extrapolated, interpolated, or scaled.

    Empty where it makes no difference, as with learned tables.
    """

    def way(encoding: vp.PositionEncoding) -> str:
        if isinstance(encoding, FrequencyRotary) and encoding.scales:
            return f"{encoding.settings['type']}-scaled"
        return "extrapolated" if encoding.runs_on else "interpolated"

    free = (each for each in vp.get_encoding(model) if "extrapolate" in constructor_parameters(type(each)))
    return " and ".join(dict.fromkeys(map(way, free)))


def with_input_size(model: nn.Module, size: Size, extrapolate: bool, scaling: str | None = None) -> nn.Module:
    """Return a copy of the model for pictures of another size.

    Raises:
        ConfigError: no encoding of the model takes the scaling.
    """
    model = copy.deepcopy(model)
    encodings, taken = vp.get_encoding(model), False
    for encoding in encodings:
        if scaling is None:
            encoding.extrapolate = extrapolate
        elif isinstance(encoding, FrequencyRotary) and fits(scaling, hints(type(encoding))["scaling"]):
            encoding.scaling, taken = scaling, True
    if scaling is not None and not taken:
        names = ", ".join(dict.fromkeys(encoding.name for encoding in encodings)) or "none"
        raise ConfigError(f"--scaling: {scaling!r} given, which the encodings of the run do not take: {names}")
    windows = {}
    if hasattr(model, "layers"):  # Swin: the windows stay what they were
        each = [tuple(stage.blocks[0].window_size) for stage in model.layers]
        windows["window_size"] = each[0] if len(set(each)) == 1 else each  # timm before 1.0.31 takes one for all
    model.set_input_size(img_size=size, **windows)
    return model


def scaled(images: Tensor, size: Size) -> Tensor:
    """Return uint8 pictures (B, C, H, W) at another size: bicubic, antialiased, clamped and rounded to uint8."""
    if tuple(images.shape[2:]) == tuple(size):
        return images
    resized = F.interpolate(images.float(), size, mode="bicubic", antialias=True, align_corners=False)
    return resized.clamp(0, 255).round().to(torch.uint8)


def on_canvas(images: Tensor, size: Size) -> Tensor:
    """Return uint8 pictures (B, C, H, W) centred on a larger canvas, the rest filled by reflection, however large."""
    for axis, side in zip((2, 3), size, strict=True):
        own = images.shape[axis]
        period = max(2 * (own - 1), 1)
        index = (torch.arange(side, device=images.device) - (side - own) // 2) % period
        images = images.index_select(axis, torch.minimum(index, period - index))
    return images


def shifted(images: Tensor, shift: Size) -> Tensor:
    """Return uint8 pictures (B, C, H, W) moved down and right by some pixels, the gap filled by reflection."""
    for axis, by in zip((2, 3), shift, strict=True):
        images = images.index_select(axis, (torch.arange(images.shape[axis], device=images.device) - by).abs())
    return images


def parse_size(flag: str, text: str) -> Size:
    """Return (height, width), or (down, right), from `32x48`, or from `32` for both."""
    match = re.fullmatch(r"(\d+)(?:x(\d+))?", text)
    if match is None:
        raise ConfigError(f"{flag}: {text!r} given; accepted: pixels, as 32 or as HEIGHTxWIDTH, 32x48")
    return int(match[1]), int(match[2] or match[1])


def size_text(size: Sequence[int]) -> str:
    """Return a size as text: `32x48`, height first."""
    return f"{size[0]}x{size[1]}"
