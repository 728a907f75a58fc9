"""Pretrained weights that a run starts from: what `init` may name, what they say of themselves, how they are fitted.

    init: vit_tiny_patch16_224.augreg_in21k      a name of timm.list_pretrained(), or hf-hub:USER/MODEL
    init: saved/                                 a directory that timm's save_for_hf wrote, or local-dir:saved
    init: downloaded/                            one of Hugging Face transformers: config.json, model.safetensors
    init: weights.safetensors                    one file; a config.json beside it is its configuration
    init: runs/mae/rope_axial-seed0              a run of train.pretrain_mae, which build.py reads

Whatever the weights' configuration says of mean, std, picture size and crop becomes part of the run's configuration,
unless that says otherwise. So `config.yaml` of the run is complete, and nothing later needs the weights again.
"""

import functools
import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

import timm
from huggingface_hub import constants
from timm.layers import to_2tuple
from timm.models import load_model_config_from_hf
from timm.models._hub import load_model_config_from_path  # timm exports that of the hub alone
from torch import Tensor, nn

from visionpos.training.config.schema import Config
from visionpos.training.errors import ConfigError, did_you_mean
from visionpos.weights.load import fit_pretrained, load_converted
from visionpos.weights.read import read_config, read_weights

__all__ = ["adopt_statistics", "fit_start", "is_run", "reachable_hub", "start_weights"]

ANSWER_SECONDS = 1.5  # to wait for the hub before weights are looked for in the cache alone
ACCEPTED = (
    "the directory of a train.pretrain_mae run with a checkpoint, a .safetensors file, a directory that timm's "
    "save_for_hf or Hugging Face's save_pretrained wrote, hf-hub:USER/MODEL, or a name of timm.list_pretrained()"
)
# what a file cannot be read by, a directory lacks, the hub refuses, or timm asserts
FAULTS = (OSError, ValueError, RuntimeError, KeyError, TypeError, AssertionError)


def adopt_statistics(config: Config) -> Config:
    """Return the configuration with mean, std, size and crop of the pretrained weights where it gives none.

    Raises:
        ConfigError: `init` names nothing that is there.
    """
    known = {} if config.data.is_task else own_configuration(config)
    if not known:
        return config
    height, width = known["input_size"][-2:]
    size = height if height == width else (height, width)
    own = {"mean": known.get("mean"), "std": known.get("std"), "crop_pct": known.get("crop_pct"), "size": size}
    if known.get("crop_mode") == "squash":
        del own["crop_pct"]
    if not config.init:
        own = {name: own[name] for name in ("mean", "std")}  # model.options.pretrained: the data's size, as ever
    data = {name: value for name, value in own.items() if value is not None and getattr(config.data, name) is None}
    data = {name: tuple(value) if name in ("mean", "std") else value for name, value in data.items()}
    return replace(config, data=replace(config.data, **data))


def own_configuration(config: Config) -> dict[str, Any]:
    """Return timm's configuration of the weights that a run starts from; empty if they have none, or there are none."""
    if config.start is not None:
        return configuration_of(config.start)
    if not config.model.options.get("pretrained"):
        return {}
    overlay = config.model.options.get("pretrained_cfg_overlay") or {}
    return configuration_of(config.model.name) | overlay


def is_run(start: str) -> bool:
    """Return whether a start is the directory of a run."""
    return (Path(start) / "checkpoints").is_dir()


@functools.cache
def configuration_of(start: str) -> dict[str, Any]:
    """Return what timm's configuration of pretrained weights says; empty for a run, and for a file alone.

    Raises:
        ConfigError: there are none of that name, or their configuration cannot be read.
    """
    path = Path(start)
    if is_of_transformers(start):
        return _transformers_configuration(path if path.is_dir() else path.parent)
    if is_run(start) or path.is_file():
        folder = path.parent
        return {} if is_run(start) or not (folder / "config.json").is_file() else _configuration(f"local-dir:{folder}")
    return _configuration(_source(start))


def is_of_transformers(start: str) -> bool:
    """Return whether a directory, or that of a file, is one that Hugging Face transformers saved a model in."""
    return "model_type" in _saved(start) and "architecture" not in _saved(start)


def _saved(start: str) -> dict[str, Any]:
    """Return what the config.json of a directory, or beside a file, says; empty for other starts.

    Raises:
        ConfigError: it cannot be read.
    """
    try:
        return read_config(start) if Path(start).exists() else {}
    except FAULTS as error:
        raise ConfigError(f"init: the configuration of {start} cannot be read: {error}") from None


def _transformers_configuration(folder: Path) -> dict[str, Any]:
    """Return in timm's words the size of a transformers model, and the mean and std of its preprocessor_config.json."""
    try:
        height, width = to_2tuple(read_config(folder).get("image_size", 224))
        file = folder / "preprocessor_config.json"
        seen = json.loads(file.read_text()) if file.is_file() else {}
        statistics = {"mean": seen.get("image_mean"), "std": seen.get("image_std")}
        return {"input_size": (3, height, width)} | {key: tuple(each) for key, each in statistics.items() if each}
    except FAULTS as error:
        raise ConfigError(f"init: the configuration of {folder} cannot be read: {error}") from None


def _configuration(source: str) -> dict[str, Any]:
    """Return the configuration of a timm name with its source."""
    kind, _, where = source.partition(":")
    try:
        if kind == "local-dir":
            return load_model_config_from_path(where)[0]
        if kind == "hf-hub":
            with reachable_hub():
                return load_model_config_from_hf(where)[0]
        return timm.get_pretrained_cfg(source).to_dict()
    except FAULTS as error:
        raise ConfigError(f"init: the configuration of {source} cannot be read: {error}") from None


def _source(start: str) -> str:
    """Return the name by which timm knows weights that are neither a run nor a file."""
    if Path(start).is_dir() and (Path(start) / "config.json").is_file():
        return f"local-dir:{start}"
    if start.startswith(("hf-hub:", "local-dir:")) or timm.models.is_model_pretrained(start):
        return start
    close = did_you_mean(start, timm.list_pretrained(), listed=False)
    raise ConfigError(f"init: {start!r} given; {close}accepted: {ACCEPTED}")


def start_weights(start: str) -> dict[str, Tensor]:
    """Return pretrained weights that are no run, by the names timm gives them.

    Raises:
        ConfigError: they are not there, cannot be read, or cannot be fetched.
    """
    try:
        if Path(start).is_file() or is_of_transformers(start):
            return dict(read_weights(start))
        source = _source(start)
        with nullcontext() if source.startswith("local-dir:") else reachable_hub():
            return timm.create_model(source, pretrained=True).state_dict()
    except ConfigError:
        raise
    except FAULTS as error:
        raise ConfigError(f"init: the weights of {start} cannot be read: {error}") from None


def fit_start(model: nn.Module, start: str) -> None:
    """Give a converted model the weights that are no run; its classifier stays, and what its encoding brings anew.

    Patches of another size and position tables of another grid are resampled, as timm does.

    Raises:
        ConfigError: they are not there, or those of another model.
    """
    weights, known = start_weights(start), configuration_of(start)
    if known:
        model.pretrained_cfg = {**model.pretrained_cfg, **known}  # the grid that their tables were made for
    try:
        weights, own = fit_pretrained(weights, model), model.state_dict()
        after = {name for name in {**own, **weights} if name.startswith(("norm.", "fc_norm."))}
        new = {name for name in own if name.startswith("head") or (name in after and name not in weights)}
        out = {name for name in weights if name.startswith("head") or (name in after and name not in own)}
        weights = {name: value for name, value in weights.items() if name not in out}
        load_converted(model, weights | {name: own[name] for name in new})
    except ValueError as error:
        raise ConfigError(f"init: the weights of {start} do not fit the model{_options(start)}: {error}") from None


def _options(start: str) -> str:
    """Return the model's options that weights were saved with, as a hint."""
    path = Path(start.removeprefix("local-dir:"))
    file = (path if path.is_dir() else path.parent) / "config.json"
    if not file.is_file():
        return " (no config.json of timm's save_for_hf beside them says which model and size they are of)"
    saved = json.loads(file.read_text())
    if is_of_transformers(start):
        return f" (theirs is a {saved['model_type']} of transformers; docs/weights.md says which timm model takes it)"
    return f" (theirs is {saved.get('architecture')} with model.options {saved.get('model_args', {})})"


@contextmanager
def reachable_hub() -> Iterator[None]:
    """Look in the cache alone for the block if the hub does not answer, instead of trying for a minute."""
    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = before or not _answers(constants.ENDPOINT)
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


@functools.cache
def _answers(address: str) -> bool:
    """Return whether the host of an address, or the proxy on the way to it, takes a connection in time."""
    parts = urlsplit(address)
    parts = urlsplit(getproxies().get(parts.scheme) or address)
    found = threading.Event()

    def connect() -> None:
        """Connect and hang up; a name server that is silent holds up this thread alone."""
        try:
            port = parts.port or {"http": 80}.get(parts.scheme, 443)
            socket.create_connection((parts.hostname, port), ANSWER_SECONDS).close()
            found.set()
        except OSError:
            pass

    thread = threading.Thread(target=connect, daemon=True)
    thread.start()
    thread.join(ANSWER_SECONDS)
    return found.is_set()
