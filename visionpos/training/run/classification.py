"""The task behind `train.classify`: a timm model, an encoding, and pictures or a position task to classify.

The demo, the sweep and the tests train through `train` as well.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import nn

from visionpos.training.config.schema import Config
from visionpos.training.run.build import build_model, check_model, load_encoder, pretrained_encoder
from visionpos.training.run.engine import Trainer
from visionpos.training.run.loop import Script, count, execute, resolved_encodings
from visionpos.training.run.objective import Classification, correct
from visionpos.training.run.record import RunDirectory, write_tensors
from visionpos.training.run.source import Source

__all__ = ["headline", "train"]


def train(config: Config) -> dict[str, Any]:
    """Train as configured, or continue; returns the result, which is also in the run directory."""
    return execute(Classify(), config)


class Classify(Script):
    """Classification from random weights, or from those of a pretrained encoder."""

    def check(self, config: Config) -> None:
        check_model(config)
        if config.init is not None:
            pretrained_encoder(config.start)

    def build(self, config: Config, source: Source, device: torch.device) -> tuple[nn.Module, Classification]:
        model = build_model(config, source.facts)
        if config.init is not None:
            load_encoder(model, config.start)
        return model, Classification(source, config)

    def finish(self, trainer: Trainer, run: RunDirectory) -> None:
        """Which test pictures the final model gets right, for paired comparisons of runs."""
        final = trainer.models[trainer.final]
        with trainer.evaluating():
            right = {part: correct(final, trainer.source.evaluation(part)).cpu() for part in trainer.source.parts}
        if trainer.team.is_main:
            write_tensors(run.path / "predictions.safetensors", right)

    def summary(self, config: Config, trainer: Trainer) -> dict[str, Any]:
        plain = build_model(replace(config, encoding="none"), trainer.source.facts)
        return {
            "chance": trainer.source.facts["chance"],
            "encoding_parameters": count(trainer.model) - count(plain),
            "encodings": resolved_encodings(trainer.model),
        }

    def headline(self, result: dict[str, Any]) -> str:
        return headline(result)


def headline(result: dict[str, Any]) -> str:
    """A finished run in one line."""
    parts = ", ".join(f"{part} {value:.1%}" for part, value in result["final"].items() if part != "weights")
    seconds = f"{result['seconds']:.0f} s of training"
    return f"accuracy {parts} ({result['final']['weights']} weights, chance {result['chance']:.1%}), {seconds}"
