"""Masked image modelling, the task behind `train.pretrain_mae`: a model reconstructs hidden patches."""

from typing import Any

import torch
from torch import Tensor, nn
from torchvision.utils import make_grid

import visionpos as vp
from visionpos.masked.model import MaskedImageModel
from visionpos.training.config.schema import PretrainConfig
from visionpos.training.errors import ConfigError
from visionpos.training.run.build import build_model, check_model
from visionpos.training.run.engine import Trainer
from visionpos.training.run.loop import TrainingTask, count, execute, resolved_encodings
from visionpos.training.run.objective import MaskedImages
from visionpos.training.run.record import RunDirectory
from visionpos.training.run.source import Source

__all__ = ["build_masked", "train"]

NUM_SHOWN_IMAGES = 8  # test pictures in the picture of an evaluation


def train(config: PretrainConfig) -> dict[str, Any]:
    """Pretrain as configured, or continue, and return the result, which is also in the run directory."""
    return execute(Pretrain(), config)


def build_masked(config: PretrainConfig, encoder: nn.Module) -> MaskedImageModel:
    """Return the masked image model around an encoder."""
    options = vars(config.masked).copy()
    method, ratio = options.pop("method"), options.pop("ratio")
    if method == "simmim":
        options = {key: value for key, value in options.items() if not key.startswith("decoder_")}
    try:
        return {"mae": vp.MaskedAutoencoder, "simmim": vp.SimMIM}[method](encoder, mask_ratio=ratio, **options)
    except (ValueError, AssertionError) as error:
        raise ConfigError(f"masked: {error}") from None


class Pretrain(TrainingTask):
    """Pretrain an encoder by masked image modelling."""

    def check(self, config: PretrainConfig) -> None:
        """Raise ConfigError for a model that cannot be."""
        build_masked(config, check_model(config))

    def build(self, config: PretrainConfig, source: Source, device: torch.device) -> tuple[nn.Module, MaskedImages]:
        """Return the masked image model and its objective."""
        model = build_masked(config, build_model(config, source.metadata | {"num_classes": 0}))
        return model, MaskedImages(source, config, model, device)

    def on_evaluate(self, trainer: Trainer, run: RunDirectory) -> None:
        """Draw test pictures, what is visible of them, and their reconstruction, in three rows."""
        images = next(iter(trainer.source.evaluation(trainer.source.splits[0])))[0][:NUM_SHOWN_IMAGES]
        final = trainer.models[trainer.final]
        with trainer.evaluating():
            result = trainer.objective.reconstruct(final, images)
        rows = images, final.visible(images, result.mask), final.reconstruct(images, result)
        grid = make_grid(torch.cat([pixels(row, trainer.source) for row in rows]), NUM_SHOWN_IMAGES)
        run.picture("reconstruction", grid, trainer.step)

    def summary(self, config: PretrainConfig, trainer: Trainer) -> dict[str, Any]:
        """Return the parameters of the encoder, and its encodings' options as they were built."""
        return {
            "encoder_parameters": count(trainer.model.encoder),
            "encodings": resolved_encodings(trainer.model.encoder),
        }

    def headline(self, result: dict[str, Any]) -> str:
        """Return a finished run in one line."""
        splits = ", ".join(f"{split} {value:.4f}" for split, value in result["final"].items() if split != "weights")
        seconds = f"{result['seconds']:.0f} s of training"
        return f"reconstruction loss {splits} ({result['final']['weights']} weights), {seconds}"


def pixels(images: Tensor, source: Source) -> Tensor:
    """Return normalised pictures (B, C, H, W) as they were, in [0, 1]; those of a position task are cut off."""
    mean, std = (
        images.new_tensor(source.metadata.get(name, default)).view(-1, 1, 1)
        for name, default in (("mean", [0.0]), ("std", [1.0]))
    )
    return (images * std + mean).clamp(0, 1)
