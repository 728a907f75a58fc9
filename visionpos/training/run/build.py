"""Models: from a configuration and the metadata of the data to a timm model with its encoding."""

import inspect
import re
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import timm
from timm.layers import to_2tuple
from torch import Tensor, nn

import visionpos as vp
from visionpos.training.config.ranges import is_file
from visionpos.training.config.schema import Config
from visionpos.training.errors import CheckpointError, ConfigError, did_you_mean, one_line, reason, reporting
from visionpos.training.run import checkpoint
from visionpos.training.run.checkpoint import Checkpoint
from visionpos.training.run.start import ACCEPTED, fit_start, is_run, reachable_hub

__all__ = ["build_model", "check_model", "load_encoder", "pretrained_encoder", "trained_model", "without_files"]

FILE_OPTIONS = ("checkpoint_path", "pretrained", "pretrained_cfg", "pretrained_cfg_overlay")


def build_model(config: Config, metadata: Mapping[str, Any]) -> nn.Module:
    """Return the model with its encoding, and with the classes, picture size and channels of the data."""
    size = tuple(metadata["image_size"])
    from_data = {"num_classes": metadata["num_classes"], "img_size": size, "in_chans": metadata["channels"]}
    for key, value in from_data.items():
        given = config.model.options.get(key, value)
        if _comparable(key, given) != value:
            raise ConfigError(f"model.options.{key}: {given} given, but the data have {value}; leave it out")
    model = _assemble(config, {**config.model.options, **from_data})
    patch = model.patch_embed.patch_size
    if size[0] % patch[0] or size[1] % patch[1]:
        raise ConfigError(
            f"model: pictures of {size[0]}x{size[1]} pixels are not whole patches of {patch[0]}x{patch[1]}"
        )
    return model


def check_model(config: Config) -> nn.Module:
    """Find mistakes in the model, its encoding and its start before any picture is read.

    What only the pictures say may be another here: their size, and the number of classes. So files that
    `model.options` names, whose classifier must fit, are left to the run.
    """
    file = config.model.options.get("checkpoint_path")
    if file and not is_file(str(file)):
        raise ConfigError(f"model.options.checkpoint_path: {file!r} given; accepted: an existing file")
    config = without_files(config)
    options = config.model.options
    with reporting("model.options.patch_size"):
        patches = tuple(4 * side for side in to_2tuple(options.get("patch_size") or 16))
    small = config.data.shape or (32 if config.data.name.startswith("cifar") else patches)
    model = _assemble(config, {"img_size": small, **options})
    if config.start is not None:
        pretrained_encoder(config.start) if is_run(config.start) else fit_start(model, config.start)
    return model


def pretrained_encoder(path: str) -> dict[str, Tensor]:
    """Return the weights of the encoder of a pretraining run, averaged ones if there are any.

    Raises:
        ConfigError: no such run.
    """
    found = checkpoint.load(Path(path) / "checkpoints")
    tensors = {} if found is None else found.tensors.get("ema", found.tensors["model"])
    encoder = {key.removeprefix("encoder."): value for key, value in tensors.items() if key.startswith("encoder.")}
    if not encoder:
        raise ConfigError(f"init: {path!r} given; accepted: {ACCEPTED}")
    return encoder


def load_encoder(model: nn.Module, path: str) -> None:
    """Give a model the weights of the encoder of a pretraining run, or others that `init` may name; its head stays.

    Raises:
        ConfigError: there are none, or a run of another model or encoding, or weights of another model.
    """
    if not is_run(path):
        return fit_start(model, path)
    head = {key: value for key, value in model.state_dict().items() if key.startswith("head")}
    try:
        vp.load_weights(model, pretrained_encoder(path) | head)
    except ValueError as error:
        raise ConfigError(f"init: the encoder of {path} does not fit the model: {error}") from None


def without_files(config: Config) -> Config:
    """Return the configuration without the weights that `model.options` names: its model is the same, untrained."""
    options = {key: value for key, value in config.model.options.items() if key not in FILE_OPTIONS}
    return replace(config, model=replace(config.model, options=options))


def trained_model(config: Config, found: Checkpoint) -> tuple[nn.Module, str]:
    """Return the model with the weights of a checkpoint, averaged if there are such, and which: `ema` or `raw`."""
    model = build_model(without_files(config), found.metadata).eval()
    averaged = found.tensors.get("ema")
    with reporting(f"the checkpoint of step {found.step} does not fit the configuration", CheckpointError):
        model.load_state_dict(found.tensors["model"] if averaged is None else averaged)
    return model, "raw" if averaged is None else "ema"


def _assemble(config: Config, options: Mapping[str, Any]) -> nn.Module:
    """Return timm's model with the encoding; ConfigError for what either refuses."""
    name = config.model.name
    try:
        with reachable_hub() if ":" in name or options.get("pretrained") else nullcontext():
            model = timm.create_model(name, **options)
    except Exception as error:  # whatever timm, the hub and PyTorch come up with for these options
        raise ConfigError(_explain(name, options, one_line(reason(error)))) from error
    try:
        return vp.set_encoding(model, config.encoding)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"encoding: {error}") from error


def _explain(name: str, options: Mapping[str, Any], message: str) -> str:
    """Return timm's complaint, with the field that it is about; for an unknown name or option, with those there are."""
    architecture, _, tag = name.partition(".")
    if ":" in name or "/" in name:
        return f"model.name: {name}: {message}"
    if not timm.is_model(architecture):
        close = did_you_mean(name, timm.list_models(), listed=False)
        return f"model.name: {message}; {close}accepted: what timm.list_models() lists"
    if tag and "pretrained tag" in message:
        return f"model.name: {message}; accepted: {', '.join(timm.list_pretrained(architecture))}"
    if unknown := re.search(r"unexpected keyword argument '(\w+)'", message):
        parameters = inspect.signature(type(timm.create_model(architecture))).parameters
        return f"model.options.{unknown[1]}: no such option; {did_you_mean(unknown[1], list(parameters))}"
    quoted = (f".{key}" for key, value in options.items() if isinstance(value, str) and repr(value) in message)
    return f"model.options{next(quoted, '')}: {message}"


def _comparable(key: str, value: Any) -> Any:
    """Return a picture size as (height, width), however it was given, and anything else as it is."""
    if key != "img_size":
        return value
    return tuple(value) if isinstance(value, (list, tuple)) else (value, value)
