"""Models: from a configuration and the metadata of the data to a timm model with its encoding."""

import inspect
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
from torch import Tensor, nn

import visionpos as vp
from visionpos.training.config.schema import Config
from visionpos.training.errors import ConfigError, did_you_mean
from visionpos.training.run import checkpoint
from visionpos.training.run.checkpoint import Checkpoint

__all__ = ["build_model", "check_model", "load_encoder", "pretrained_encoder", "trained_model"]


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
    """Find mistakes in the model and its encoding before any picture is read; the size may not be the final one."""
    options = config.model.options
    small = config.data.size or (32 if config.data.name.startswith("cifar") else 4 * options.get("patch_size", 16))
    return _assemble(config, {"img_size": small, **options})


def pretrained_encoder(path: str) -> dict[str, Tensor]:
    """Return the weights of the encoder of a pretraining run, averaged ones if there are any.

    Raises:
        ConfigError: no such run.
    """
    found = checkpoint.load(Path(path) / "checkpoints")
    tensors = {} if found is None else found.tensors.get("ema", found.tensors["model"])
    encoder = {key.removeprefix("encoder."): value for key, value in tensors.items() if key.startswith("encoder.")}
    if not encoder:
        raise ConfigError(
            f"init: {path!r} given; accepted: the directory of a train.pretrain_mae run with a checkpoint"
        )
    return encoder


def load_encoder(model: nn.Module, path: str) -> None:
    """Give a model the weights of the encoder of a pretraining run; its head stays.

    Raises:
        ConfigError: no such run, or one of another model or encoding.
    """
    head = {key: value for key, value in model.state_dict().items() if key.startswith("head")}
    try:
        vp.load_weights(model, pretrained_encoder(path) | head)
    except ValueError as error:
        raise ConfigError(f"init: the encoder of {path} does not fit the model: {error}") from None


def trained_model(config: Config, found: Checkpoint) -> tuple[nn.Module, str]:
    """Return the model with the weights of a checkpoint, averaged if there are such, and which: `ema` or `raw`."""
    model = build_model(config, found.metadata).eval()
    averaged = found.tensors.get("ema")
    model.load_state_dict(found.tensors["model"] if averaged is None else averaged)
    return model, "raw" if averaged is None else "ema"


def _assemble(config: Config, options: Mapping[str, Any]) -> nn.Module:
    """Return timm's model with the encoding; ConfigError for what either refuses."""
    try:
        model = timm.create_model(config.model.name, **options)
    except RuntimeError as error:
        close = did_you_mean(config.model.name, timm.list_models(), listed=False)
        raise ConfigError(f"model.name: {error}; {close}accepted: what timm.list_models() lists") from None
    except (TypeError, ValueError, AssertionError, ArithmeticError) as error:
        raise ConfigError(f"model.options{_explain(config.model.name, str(error))}") from None
    try:
        return vp.set_encoding(model, config.encoding)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"encoding: {error}") from None


def _explain(name: str, message: str) -> str:
    """Return timm's complaint; for an unknown option, with those that the model takes."""
    if unknown := re.search(r"unexpected keyword argument '(\w+)'", message):
        parameters = inspect.signature(type(timm.create_model(name))).parameters
        return f".{unknown[1]}: no such option; {did_you_mean(unknown[1], list(parameters))}"
    return f": {message}"


def _comparable(key: str, value: Any) -> Any:
    """Return a picture size as (height, width), however it was given, and anything else as it is."""
    if key != "img_size":
        return value
    return tuple(value) if isinstance(value, (list, tuple)) else (value, value)
