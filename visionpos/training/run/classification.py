"""Classification, the task behind `train.classify`: a timm model learns pictures or a position task.

The demo, the sweep and the tests train through `train` as well.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import nn

from visionpos.training.config.schema import Config
from visionpos.training.run.build import build_model, check_model, load_encoder, without_files
from visionpos.training.run.engine import Trainer
from visionpos.training.run.loop import TrainingTask, count, execute, resolved_encodings
from visionpos.training.run.objective import Classification, correct
from visionpos.training.run.record import RunDirectory, write_tensors
from visionpos.training.run.source import Source

__all__ = ["headline", "train"]


def train(config: Config) -> dict[str, Any]:
    """Train as configured, or continue, and return the result, which is also in the run directory."""
    return execute(Classify(), config)


class Classify(TrainingTask):
    """Classify from random weights, or from pretrained ones."""

    def check(self, config: Config) -> None:
        """Raise ConfigError for a model or a start that cannot be."""
        check_model(config)

    def build(self, config: Config, source: Source, device: torch.device) -> tuple[nn.Module, Classification]:
        """Return the model, with pretrained weights if the run starts from such, and the objective."""
        model = build_model(config, source.metadata)
        if config.init is not None:
            load_encoder(model, config.start)
        return model, Classification(source, config)

    def on_end(self, trainer: Trainer, run: RunDirectory) -> None:
        """Write which pictures the final model gets right, for paired comparisons of runs."""
        final = trainer.models[trainer.final]
        with trainer.evaluating():
            right = {split: correct(final, trainer.source.evaluation(split)).cpu() for split in trainer.source.splits}
        if trainer.distributed.is_main:
            write_tensors(run.path / "predictions.safetensors", right)

    def summary(self, config: Config, trainer: Trainer) -> dict[str, Any]:
        """Return what chance gives, the parameters of the encoding, and its options as they were built."""
        plain = build_model(without_files(replace(config, encoding="none")), trainer.source.metadata)
        return {
            "chance": trainer.source.metadata["chance"],
            "encoding_parameters": count(trainer.model) - count(plain),
            "encodings": resolved_encodings(trainer.model),
        }

    def headline(self, result: dict[str, Any]) -> str:
        """Return a finished run in one line."""
        return headline(result)


def headline(result: dict[str, Any]) -> str:
    """Return a finished run in one line."""
    splits = ", ".join(f"{split} {value:.1%}" for split, value in result["final"].items() if split != "weights")
    seconds = f"{result['seconds']:.0f} s of training"
    return f"accuracy {splits} ({result['final']['weights']} weights, chance {result['chance']:.1%}), {seconds}"
