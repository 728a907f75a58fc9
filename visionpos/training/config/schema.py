"""The configuration of a run: what can be set, and what is accepted."""

import hashlib
import re
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from visionpos.training.config import ranges
from visionpos.training.config.ranges import check_ranges, within
from visionpos.training.data.augmentation import Augmentation
from visionpos.training.data.names import CIFAR_NAMES, TASKS
from visionpos.training.errors import ConfigError, did_you_mean

__all__ = ["Config", "Data", "Masked", "Model", "PretrainConfig", "Recipe", "encoding_label", "file_name"]

LONGEST_NAME = 220  # bytes of a directory's name, of which file systems accept 255, before "-seed0" is added


@dataclass
class Model:
    """Choose the timm model.

    Args:
        name: Any name `timm.create_model` knows and visionpos can convert.
        options: Arguments of that model, as in timm; `num_classes` and `img_size` come from the data.
    """

    name: str
    options: dict[str, Any] = field(default_factory=dict)


@dataclass
class Data:
    """Choose pictures, or a position task made on the fly.

    Args:
        name: cifar10, cifar100, a folder of class folders, a .tar.xz of one, a timm name of a data set (torch/cifar10,
            hfds/USER/NAME, wds/NAME ...), or the name of a position task.
        root: Pictures: where downloads, archives and what timm's names stand for lie.
        size: Pictures: resize them to this many pixels a side, or to [height, width].
        crop_pct: Pictures: keep their aspect ratio: the shorter side becomes size / crop_pct pixels, and the centre is
            cut out; null squashes them to `size`.
        mean: Pictures: subtracted from the channels, in [0, 1]; null takes that of the training pictures.
        std: Pictures: the channels are divided by it; null takes that of the training pictures.
        download: Pictures: fetch them when they are missing.
        per_class: Pictures: train on this many of each class, the same ones for every seed.
        validation: Pictures: hold this many training pictures out and evaluate on them instead of the test pictures.
        test_fraction: Pictures: of a folder of class folders without train/ and test/, the share of each class that is
            for testing; null is 0.2. Which pictures those are is written into the run's split.json.
        split_seed: Pictures: of that split.
        memory: Pictures: GiB of a device that a folder's pictures may take, uint8 at their size; a larger set is read
            batch by batch by timm's loaders.
        workers: Pictures: processes of such a loader.
        splits: Pictures: for timm's names, what training and test pictures are called there.
        num_classes: Pictures: for timm's names, where the set does not say it.
        grid: Task: cells down and across.
        cell: Task: pixels a side of a cell.
        holdout: Task: 'left' trains in the left half of the grid and tests in the right half too.
        noise: Task: standard deviation of the background.
    """

    name: str = within(ranges.PATH)
    root: str = within(ranges.PATH, "data")
    size: int | tuple[int, int] | None = within(ranges.SIZE, None)
    crop_pct: float | None = within(ranges.PORTION, None)
    mean: tuple[float, float, float] | None = within(ranges.MEAN, None)
    std: tuple[float, float, float] | None = within(ranges.STD, None)
    download: bool = False
    per_class: int | None = within(ranges.COUNT, None)
    validation: int = within(ranges.NATURAL, 0)
    test_fraction: float | None = within(ranges.FRACTION, None)
    split_seed: int = within(ranges.NATURAL, 0)
    memory: float = within(ranges.NATURAL, 4.0)
    workers: int = within(ranges.NATURAL, 2)
    splits: tuple[str, str] = ("train", "validation")
    num_classes: int | None = within(ranges.COUNT, None)
    grid: tuple[int, int] = within(ranges.GRID, (6, 6))
    cell: int = within(ranges.COUNT, 4)
    holdout: Literal["none", "left"] = "none"
    noise: float = within(ranges.NATURAL, 0.3)

    @property
    def is_task(self) -> bool:
        """Return whether the data are a position task."""
        return self.name in TASKS

    @property
    def is_named(self) -> bool:
        """Return whether the data are a set by timm's name."""
        return self.name.partition("/")[0] in TIMM_PREFIXES and not Path(self.name).exists()

    @property
    def shape(self) -> tuple[int, int] | None:
        """Return `size` as (height, width)."""
        return (self.size, self.size) if isinstance(self.size, int) else self.size


@dataclass(frozen=True)
class Optimization:
    """Set how long to train, and by what rule.

    Args:
        epochs: Length in passes over the pictures; for a position task give `steps`.
        steps: Length in steps, for a position task.
        eval_every: Evaluate, log and save after this many epochs, or steps for a position task; and at the end.
        batch_size: Examples in a step; the last, partial batch of an epoch is dropped.
        optimizer: adamw, or muon for the matrices of the blocks (rates are scaled to AdamW's) and nadamw for the rest.
        lr: Peak learning rate.
        min_lr: Learning rate at the end of the cosine.
        betas: Decay rates of AdamW's two moments.
        weight_decay: Of the weights timm decays: no norms, biases, or what `no_weight_decay()` names.
        layer_decay: Factor of the learning rate from each layer to the one below it, for fine-tuning; null for none.
        warmup: Share of the steps in which the learning rate rises linearly.
        clip_grad: Largest norm of the gradient; null for none.
        ema_decay: Decay of the averaged weights, reached gradually as in timm; null for none.
    """

    epochs: int | None = within(ranges.COUNT, None)
    steps: int | None = within(ranges.COUNT, None)
    eval_every: int = within(ranges.COUNT, 1)
    batch_size: int = within(ranges.COUNT, 128)
    optimizer: Literal["adamw", "muon"] = "adamw"
    lr: float = within(ranges.POSITIVE, 1e-3)
    min_lr: float = within(ranges.NATURAL, 1e-5)
    betas: tuple[float, float] = within(ranges.BETAS, (0.9, 0.95))
    weight_decay: float = within(ranges.NATURAL, 0.05)
    layer_decay: float | None = within(ranges.DECAY_FACTOR, None)
    warmup: float = within(ranges.SHARE, 0.05)
    clip_grad: float | None = within(ranges.POSITIVE, 1.0)
    ema_decay: float | None = within(ranges.SHARE, 0.999)


@dataclass(frozen=True)
class Recipe(Augmentation, Optimization):  # fields in the order of bases from the last
    """Set how to train.

    Args:
        mixup_off_epoch: Neither mixup nor CutMix from this epoch on; null for never.
        crop_scale: Cut every training picture at random out of its file, by timm's RandomResizedCrop: smallest and
            largest share of the area, as [0.08, 1]; null for none. The pictures are then read by timm's loaders.
    """

    mixup_off_epoch: int | None = within(ranges.NATURAL, None)
    crop_scale: tuple[float, float] | None = within(ranges.CROP_SCALE, None)

    def __post_init__(self):
        """Raise ConfigError for an augmentation outside its range."""
        try:
            super().__post_init__()
        except ValueError as error:
            raise ConfigError(f"recipe.{error}") from None


@dataclass
class Config:
    """Set everything that decides a run.

    Args:
        model: The host.
        data: What it learns.
        recipe: How it learns.
        encoding: A name, names joined by '+', {name: ..., option: ...}, a list of those, or a file of one.
        init: Pretrained weights to start from: a `train.pretrain_mae` run, a .safetensors file, a directory of timm's
            save_for_hf or of transformers, hf-hub:USER/MODEL, or a timm name such as
            vit_tiny_patch16_224.augreg_in21k; null for random weights. {encoding} and {seed} in it stand for this
            run's, as in directory names. Mean, std, size and crop of the pictures are then those of the weights'
            configuration where `data` gives none.
        seed: Decides shared weights, order of the data and augmentation, alike for every encoding.
        output: Directory of the run; by default runs/<config file>/<encoding>-seed<seed>.
        resume: Continue the run found in `output`; false makes an existing run an error.
        device: cpu, cuda, cuda:1, mps (a Mac's GPU) ...; auto takes a GPU if there is one.
        threads: Threads of the CPU that a process computes with; null leaves it to torch. Two that wait for each other
            on a busy machine are slower than one.
        deterministic: On a GPU, allow only kernels that give the same bits again; some are slower. A CPU's all do.
        tracker: Also log to a tracker of accelerate's: wandb, mlflow, comet_ml, ...; it must be installed.
        precision: fp32, or bf16 autocast; auto is bf16 on a GPU.
        parallel: Under torchrun, ddp: every process has the whole model; fsdp: each a share of every weight (FSDP2).
        compile: Use torch.compile, with CUDA graphs or without; auto does on a GPU, with graphs up to batch 2048.
        log_every: Steps between looks at the loss, each of which waits for the device.
        profile: Train nothing; time this many steps and say where the time goes.
    """

    model: Model
    data: Data
    recipe: Recipe = field(default_factory=Recipe)
    encoding: Any = "none"
    init: str | None = within(ranges.PATH, None)
    seed: int = within(ranges.SEED, 0)
    output: str | None = within(ranges.PATH, None)
    resume: bool = True
    device: str = "auto"
    threads: int | None = within(ranges.COUNT, None)
    deterministic: bool = False
    tracker: str | None = None
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    parallel: Literal["ddp", "fsdp"] = "ddp"
    compile: Literal["auto", "on", "graphs", "off"] = "auto"
    log_every: int = within(ranges.COUNT, 50)
    profile: int | None = within(ranges.COUNT, None)

    @property
    def start(self) -> str | None:
        """Return what `init` names for this encoding and seed; None for random weights."""
        if self.init is None:
            return None
        encoding = file_name(encoding_label(self.encoding))
        return self.init.replace("{encoding}", encoding).replace("{seed}", str(self.seed))

    def check(self) -> None:
        """Raise ConfigError for values outside their range, or that contradict each other."""
        check_ranges(self)
        recipe, data = self.recipe, self.data
        if data.name not in (*TASKS, *CIFAR_NAMES) and not data.is_named and not Path(data.name).exists():
            hint = did_you_mean(data.name, [*CIFAR_NAMES, *TASKS])
            raise ConfigError(
                f"data.name: {data.name!r} given; {hint}, or an existing folder or .tar.xz of class folders, or a timm "
                f"name ({', '.join(f'{prefix}/...' for prefix in TIMM_PREFIXES)})"
            )
        given = changed(data, PICTURES_BY_NAME_FIELDS) if data.is_named else changed(data, ["splits", "num_classes"])
        if given:
            kinds = ("folders and archives", "timm's names") if data.is_named else ("timm's names", "other data")
            raise ConfigError(
                f"data.{given[0]}: {getattr(data, given[0])} given for {data.name!r}; accepted for {kinds[0]} alone"
            )
        kind, unit, other = ("a position task", "steps", "epochs") if data.is_task else ("pictures", "epochs", "steps")
        if getattr(recipe, unit) is None or getattr(recipe, other) is not None:
            given = f"epochs={recipe.epochs}, steps={recipe.steps} given"
            raise ConfigError(f"recipe.{unit}: {given}; data {data.name!r} is {kind}: accepted: {unit} and no {other}")
        if data.crop_pct is not None and data.size is None and self.init is None:
            raise ConfigError(f"data.crop_pct: {data.crop_pct} given without data.size; accepted: with data.size")
        for name in changed(data, PICTURE_FIELDS if data.is_task else TASK_FIELDS):
            raise ConfigError(f"data.{name}: {getattr(data, name)} given, but {kind} ({data.name!r}) has no use for it")
        if self.parallel == "fsdp" and recipe.optimizer == "muon":
            raise ConfigError("parallel: fsdp given; accepted with recipe.optimizer muon, for whole matrices: ddp")
        given = changed(recipe, AUGMENTATION_FIELDS)
        if data.is_task and given:
            raise ConfigError(f"recipe.{given[0]}: augmentation changes the answer of a position task")


@dataclass
class Masked:
    """Set which patches are hidden, and what predicts them.

    Args:
        method: mae, the visible patches alone are encoded (ViT, EVA, BEiT); simmim, all are (Swin).
        ratio: Share of the patches that are hidden.
        masking: Patches at random, in blocks, or in a regular grid.
        norm_pix_loss: Predict pixels normalised patch by patch.
        decoder_dim: mae: channels of the decoder.
        decoder_depth: mae: its blocks.
        decoder_num_heads: mae: its attention heads.
        decoder_encoding: mae: its encoding, as for the model.
    """

    method: Literal["mae", "simmim"] = "mae"
    ratio: float = within(ranges.MASK_RATIO, 0.75)
    masking: Literal["random", "block", "grid"] = "random"
    norm_pix_loss: bool = True
    decoder_dim: int = within(ranges.COUNT, 128)
    decoder_depth: int = within(ranges.COUNT, 2)
    decoder_num_heads: int = within(ranges.COUNT, 4)
    decoder_encoding: Any = "sincos2d"


@dataclass
class PretrainConfig(Config):
    """Set everything that decides a run of masked pretraining.

    Args:
        masked: What is hidden, and how it is predicted.
    """

    masked: Masked = field(default_factory=Masked)

    def check(self) -> None:
        """Raise ConfigError for what `Config.check` refuses, and for fields that pretraining has no use for."""
        super().check()
        for prefix, group, names in (("", self, ["init"]), ("recipe.", self.recipe, SUPERVISED_FIELDS)):
            for name in changed(group, names):
                raise ConfigError(f"{prefix}{name}: {getattr(group, name)} given, but pretraining has no use for it")
        decoder = [name for name in vars(self.masked) if name.startswith("decoder_")]
        for name in changed(self.masked, decoder) if self.masked.method == "simmim" else ():
            raise ConfigError(f"masked.{name}: {getattr(self.masked, name)} given, but simmim has no decoder")


def changed(group: object, names: Iterable[str]) -> list[str]:
    """Return those of the fields that do not have their default value."""
    return [name for name in names if getattr(group, name) != type(group).__dataclass_fields__[name].default]


TIMM_PREFIXES = ("torch", "hfds", "hfids", "wds", "tfds")
PICTURES_BY_NAME_FIELDS = ["per_class", "validation", "test_fraction", "split_seed", "memory"]
PICTURE_FIELDS = ["root", "size", "crop_pct", "mean", "std", "download", "workers", *PICTURES_BY_NAME_FIELDS]
MIXING_FIELDS = ["mixup_alpha", "cutmix_alpha", "mix_prob", "switch_prob", "mixup_off_epoch"]
AUGMENTATION_FIELDS = [
    *(each.name for each in fields(Augmentation) if each.name != "label_smoothing"),
    "mixup_off_epoch",
    "crop_scale",
]
SUPERVISED_FIELDS = ["label_smoothing", "layer_decay", *MIXING_FIELDS]
TASK_FIELDS = ["grid", "cell", "holdout", "noise"]


def encoding_label(spec: Any) -> str:
    """Return a short name of an encoding spec, for tables: `learned(init_std=0.5)+rope_axial`."""
    if isinstance(spec, list):
        return "+".join(encoding_label(part) for part in spec)
    if isinstance(spec, dict):
        options = ",".join(f"{key}={value}" for key, value in spec.items() if key != "name")
        return f"{spec['name']}({options})" if options else spec["name"]
    return spec


def file_name(text: str) -> str:
    """Return `text` with only those characters that no file system or shell minds, a long one as a start and a hash."""
    name = re.sub(r"[^\w.=+-]+", "-", text).strip("-")
    if len(name.encode()) <= LONGEST_NAME:
        return name
    start = name.encode()[: LONGEST_NAME - 11].decode(errors="ignore")
    return f"{start}-{hashlib.sha256(name.encode()).hexdigest()[:10]}"
