"""The task behind `train.pretrain_mae`: a model that reconstructs the patches that are hidden from it."""

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
from visionpos.training.run.loop import Script, count, execute, resolved_encodings
from visionpos.training.run.objective import MaskedImages
from visionpos.training.run.record import RunDirectory
from visionpos.training.run.source import Source

__all__ = ["build_masked", "train"]

SHOWN = 8  # test pictures in the picture of an evaluation


def train(config: PretrainConfig) -> dict[str, Any]:
    """Pretrain as configured, or continue; returns the result, which is also in the run directory."""
    return execute(Pretrain(), config)


def build_masked(config: PretrainConfig, encoder: nn.Module) -> MaskedImageModel:
    """The masked image model around an encoder."""
    options = vars(config.masked).copy()
    method, ratio = options.pop("method"), options.pop("ratio")
    if method == "simmim":
        options = {key: value for key, value in options.items() if not key.startswith("decoder_")}
    try:
        return {"mae": vp.MaskedAutoencoder, "simmim": vp.SimMIM}[method](encoder, mask_ratio=ratio, **options)
    except (ValueError, AssertionError) as error:
        raise ConfigError(f"masked: {error}") from None


class Pretrain(Script):
    """Masked image modelling."""

    def check(self, config: PretrainConfig) -> None:
        build_masked(config, check_model(config))

    def build(self, config: PretrainConfig, source: Source, device: torch.device) -> tuple[nn.Module, MaskedImages]:
        model = build_masked(config, build_model(config, source.facts | {"num_classes": 0}))
        return model, MaskedImages(source, config, model, device)

    def look(self, trainer: Trainer, run: RunDirectory) -> None:
        """Test pictures, what is visible of them, and their reconstruction, in three rows."""
        images = next(iter(trainer.source.evaluation(trainer.source.parts[0])))[0][:SHOWN]
        final = trainer.models[trainer.final]
        with trainer.evaluating():
            result = trainer.objective.reconstruct(final, images)
        rows = images, final.visible(images, result.mask), final.reconstruct(images, result)
        run.picture(
            "reconstruction", make_grid(torch.cat([pixels(row, trainer.source) for row in rows]), SHOWN), trainer.step
        )

    def summary(self, config: PretrainConfig, trainer: Trainer) -> dict[str, Any]:
        return {
            "encoder_parameters": count(trainer.model.encoder),
            "encodings": resolved_encodings(trainer.model.encoder),
        }

    def headline(self, result: dict[str, Any]) -> str:
        parts = ", ".join(f"{part} {value:.4f}" for part, value in result["final"].items() if part != "weights")
        return (
            f"reconstruction loss {parts} ({result['final']['weights']} weights), {result['seconds']:.0f} s of training"
        )


def pixels(images: Tensor, source: Source) -> Tensor:
    """Normalised pictures (B, C, H, W) as they were, in [0, 1]; those of a position task are cut off."""
    mean, std = (
        images.new_tensor(source.facts.get(name, default)).view(-1, 1, 1)
        for name, default in (("mean", [0.0]), ("std", [1.0]))
    )
    return (images * std + mean).clamp(0, 1)
