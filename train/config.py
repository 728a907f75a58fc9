"""The configuration of a run: what can be set, and what is accepted."""

import operator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from train.errors import ConfigError, did_you_mean
from train.tasks import TASKS

__all__ = ["Config", "Data", "Model", "Recipe", "encoding_label"]


@dataclass
class Model:
    """A timm model.

    Args:
        name: Any name `timm.create_model` knows and visionpos can convert.
        options: Arguments of that model, as in timm; `num_classes` and `img_size` come from the data.
    """

    name: str
    options: dict[str, Any] = field(default_factory=dict)


@dataclass
class Data:
    """Pictures, or a position task made on the fly.

    Args:
        name: cifar10, cifar100, a folder of class folders, a .tar.xz of one, or the name of a position task.
        root: Pictures: where downloads and archives lie.
        size: Pictures: resize them to this many pixels a side.
        download: Pictures: fetch them when they are missing.
        per_class: Pictures: train on this many of each class, the same ones for every seed.
        validation: Pictures: hold this many training pictures out and evaluate on them instead of the test pictures.
        grid: Task: cells down and across.
        cell: Task: pixels a side of a cell.
        holdout: Task: 'left' trains in the left half of the grid and tests in the right half too.
        noise: Task: standard deviation of the background.
    """

    name: str
    root: str = "data"
    size: int | None = None
    download: bool = False
    per_class: int | None = None
    validation: int = 0
    grid: tuple[int, int] = (6, 6)
    cell: int = 4
    holdout: Literal["none", "left"] = "none"
    noise: float = 0.3

    @property
    def is_task(self) -> bool:
        return self.name in TASKS


@dataclass
class Recipe:
    """How to train.

    Args:
        epochs: Length in passes over the pictures; for a position task give `steps`.
        steps: Length in steps, for a position task.
        eval_every: Evaluate, log and save after this many epochs, or steps for a position task; and at the end.
        batch_size: Examples in a step; the last, partial batch of an epoch is dropped.
        lr: Peak learning rate of AdamW.
        min_lr: Learning rate at the end of the cosine.
        betas: Decay rates of AdamW's two moments.
        weight_decay: Of the weights timm decays: no norms, biases, or what `no_weight_decay()` names.
        warmup: Share of the steps in which the learning rate rises linearly.
        clip_grad: Largest norm of the gradient; null for none.
        label_smoothing: Share of the target spread evenly over the classes.
        ema_decay: Decay of the averaged weights, reached gradually as in timm; null for none.
        crop_padding: Pad by this many pixels and crop at random, per picture; 0 for none.
        flip: Mirror every picture with probability one half.
    """

    epochs: int | None = None
    steps: int | None = None
    eval_every: int = 1
    batch_size: int = 128
    lr: float = 1e-3
    min_lr: float = 1e-5
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.05
    warmup: float = 0.05
    clip_grad: float | None = 1.0
    label_smoothing: float = 0.0
    ema_decay: float | None = 0.999
    crop_padding: int = 0
    flip: bool = False


@dataclass
class Config:
    """Everything that decides a run.

    Args:
        model: The host.
        data: What it learns.
        recipe: How it learns.
        encoding: A name, names joined by '+', {name: ..., option: ...}, a list of those, or a file of one.
        seed: Decides shared weights, order of the data and augmentation, alike for every encoding.
        output: Directory of the run; by default runs/<config file>/<encoding>-seed<seed>.
        resume: Continue the run found in `output`; false makes an existing run an error.
        device: cpu, cuda, cuda:1, ...; auto takes a GPU if there is one.
        precision: fp32, or bf16 autocast; auto is bf16 on a GPU.
        compile: Use torch.compile; auto does on a GPU.
        log_every: Steps between looks at the loss, each of which waits for the device.
    """

    model: Model
    data: Data
    recipe: Recipe = field(default_factory=Recipe)
    encoding: Any = "none"
    seed: int = 0
    output: str | None = None
    resume: bool = True
    device: str = "auto"
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    compile: Literal["auto", "on", "off"] = "auto"
    log_every: int = 50

    def check(self) -> None:
        """Raise ConfigError for values outside their range, or that contradict each other."""
        for name, (accepts, text) in RANGES.items():
            value = operator.attrgetter(name)(self)
            if value is not None and not accepts(value):
                raise ConfigError(f"{name}: {value} given; accepted: {text}")
        recipe, data = self.recipe, self.data
        if data.name not in (*TASKS, *CIFAR) and not Path(data.name).exists():
            hint = did_you_mean(data.name, [*CIFAR, *TASKS])
            raise ConfigError(
                f"data.name: {data.name!r} given; {hint}, or an existing folder or .tar.xz of class folders"
            )
        kind, unit, other = ("a position task", "steps", "epochs") if data.is_task else ("pictures", "epochs", "steps")
        if getattr(recipe, unit) is None or getattr(recipe, other) is not None:
            given = f"epochs={recipe.epochs}, steps={recipe.steps} given"
            raise ConfigError(f"recipe.{unit}: {given}; data {data.name!r} is {kind}: accepted: {unit} and no {other}")
        for name in PICTURE_FIELDS if data.is_task else TASK_FIELDS:
            if getattr(data, name) != Data.__dataclass_fields__[name].default:
                raise ConfigError(
                    f"data.{name}: {getattr(data, name)} given, but {kind} ({data.name!r}) has no use for it"
                )
        if data.is_task and (recipe.flip or recipe.crop_padding):
            raise ConfigError(
                "recipe.flip, recipe.crop_padding: a flip or a crop changes the answer of a position task"
            )


CIFAR = ["cifar10", "cifar100"]
PICTURE_FIELDS = ["root", "size", "download", "per_class", "validation"]
TASK_FIELDS = ["grid", "cell", "holdout", "noise"]
COUNT = (lambda value: value >= 1, "a whole number from 1")
NATURAL = (lambda value: 0 <= value < float("inf"), "a number from 0")
SHARE = (lambda value: 0 <= value < 1, "a number from 0 to below 1")
POSITIVE = (lambda value: 0 < value < float("inf"), "a number above 0")
RANGES = {
    "seed": NATURAL,
    "log_every": COUNT,
    "data.size": COUNT,
    "data.per_class": COUNT,
    "data.validation": NATURAL,
    "data.grid": (lambda value: min(value) >= 1, "two whole numbers from 1, cells down and across"),
    "data.cell": COUNT,
    "data.noise": NATURAL,
    "recipe.epochs": COUNT,
    "recipe.steps": COUNT,
    "recipe.eval_every": COUNT,
    "recipe.batch_size": COUNT,
    "recipe.lr": POSITIVE,
    "recipe.min_lr": NATURAL,
    "recipe.betas": (lambda value: all(0 <= beta < 1 for beta in value), "two numbers from 0 to below 1"),
    "recipe.weight_decay": NATURAL,
    "recipe.warmup": SHARE,
    "recipe.clip_grad": POSITIVE,
    "recipe.label_smoothing": SHARE,
    "recipe.ema_decay": SHARE,
    "recipe.crop_padding": NATURAL,
}


def encoding_label(spec: Any) -> str:
    """A short name of an encoding spec, for tables: `learned(init_std=0.5)+rope_axial`."""
    if isinstance(spec, list):
        return "+".join(encoding_label(part) for part in spec)
    if isinstance(spec, dict):
        options = ",".join(f"{key}={value}" for key, value in spec.items() if key != "name")
        return f"{spec['name']}({options})" if options else spec["name"]
    return spec
