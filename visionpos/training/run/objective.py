"""Objectives: what a model learns from a batch, and what it is measured by."""

from collections.abc import Callable, Iterable
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visionpos.masked.model import MaskedImageModel, Reconstruction
from visionpos.training.config.schema import Config
from visionpos.training.run.distributed import Distributed
from visionpos.training.run.source import Source, stream

__all__ = ["Classification", "MaskedImages", "Objective", "answers", "correct"]

Batch = tuple[Tensor, Tensor]


@runtime_checkable
class Objective(Protocol):
    """Say what one kind of training minimises and measures."""

    measure: ClassVar[str]  # what `evaluate` returns: the key of logs and results
    source: Source

    def loss(self, forward: Callable[..., Any], batch: Batch, step: int, distributed: Distributed) -> Tensor:
        """Return the loss of this process's share of a batch; `forward` is the model, compiled or not."""

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Return how good a model in evaluation mode is, on each split of the source."""


class Classification:
    """Learn by cross-entropy with smoothed labels, and measure the share of right answers."""

    measure = "accuracy"

    def __init__(self, source: Source, config: Config):
        self.source, self.label_smoothing = source, config.recipe.label_smoothing

    def loss(self, forward: Callable[..., Any], batch: Batch, step: int, distributed: Distributed) -> Tensor:
        """Return the cross-entropy of this process's rows, labels smoothed once."""
        images, targets = distributed.local_rows(batch)
        smoothing = 0.0 if targets.is_floating_point() else self.label_smoothing  # those of pictures are smooth already
        return F.cross_entropy(forward(images), targets, label_smoothing=smoothing)

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Return the share of right answers on each split."""
        return {
            split: correct(model, self.source.evaluation(split)).float().mean().item() for split in self.source.splits
        }


class MaskedImages:
    """Learn by a masked image model's reconstruction loss, and measure it too, with fixed masks."""

    measure = "reconstruction"

    def __init__(self, source: Source, config: Config, model: MaskedImageModel, device: torch.device):
        self.source, self.model, self.seed = source, model, config.seed
        self.generator = torch.Generator(device)

    def loss(self, forward: Callable[..., Any], batch: Batch, step: int, distributed: Distributed) -> Tensor:
        """Return the reconstruction loss of this process's rows, under masks drawn for the step."""
        images, _ = batch
        self.generator.manual_seed(stream("mask", self.seed, step))
        mask = self.model.draw_mask(images, self.generator)
        return forward(distributed.local_rows(images), distributed.local_rows(mask)).loss

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Return the mean reconstruction loss on each split."""
        return {split: self._mean_loss(model, split) for split in self.source.splits}

    def _mean_loss(self, model: nn.Module, split: str) -> float:
        """Return the reconstruction loss of a split, the mean over its pictures."""
        losses, sizes = zip(
            *((self.reconstruct(model, images).loss, len(images)) for images, _ in self.source.evaluation(split)),
            strict=True,
        )
        sizes = torch.tensor(sizes, dtype=torch.float64)
        return (torch.stack(losses).cpu().double() * sizes).sum().div(sizes.sum()).item()

    @torch.no_grad()
    def reconstruct(self, model: nn.Module, images: Tensor) -> Reconstruction:
        """Reconstruct evaluation pictures, always with the same masks."""
        self.generator.manual_seed(stream("mask", "evaluation"))
        return model(images, model.draw_mask(images, self.generator))


@torch.no_grad()
def answers(model: nn.Module, batches: Iterable[Batch], top: int = 1) -> Batch:
    """Return what a model takes pictures for, best first, (N, top), and what they are, (N,); in order."""
    given, labels = zip(*((best(model(images), top), labels) for images, labels in batches), strict=True)
    return torch.cat(given), torch.cat(labels)


def best(logits: Tensor, top: int) -> Tensor:
    """Return the classes of the highest logits (B, K), best first; of equal ones the first class."""
    return logits.argsort(dim=-1, descending=True, stable=True)[:, :top]


def correct(model: nn.Module, batches: Iterable[Batch]) -> Tensor:
    """Return which pictures a model classifies rightly: (N,) bool, in order."""
    given, labels = answers(model, batches)
    return given[:, 0] == labels
