"""What the frozen features of a run are worth: a linear probe, nearest neighbours, and how well positions can be read.

`train.probe` is its command line.
"""

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visionpos.analysis.position_probe import position_probe
from visionpos.training.config.schema import Config, PretrainConfig, encoding_label
from visionpos.training.data.datasets import Pictures
from visionpos.training.errors import ConfigError
from visionpos.training.run.build import build_model, load_encoder, trained_model, without_files
from visionpos.training.run.checkpoint import Checkpoint
from visionpos.training.run.engine import mixed_precision, pick_device
from visionpos.training.run.record import open_run
from visionpos.training.run.source import (
    evaluation_pictures,
    open_task,
    picture_batches,
    picture_split,
    task_batches,
    training_pictures,
)

__all__ = ["fit_linear", "nearest_neighbours", "positions", "probe"]

NUM_NEIGHBOURS, VOTE_TEMPERATURE = 20, 0.07
Labelled = tuple[Tensor, Tensor]


def probe(path: Path, l2: float = 1e-4, device: str | None = None) -> dict[str, Any]:
    """Measure the encoder of the run at `path` and the same one with random weights, for `probe.json` there.

    Args:
        path: The directory of a run of `train.pretrain_mae` or `train.classify` on pictures.
        l2: Weight of the squared weights of the linear probe in its loss.
        device: Where to compute; by default where the run did.
    """
    config, found = open_run(path)
    if config.data.is_task:
        raise ConfigError(f"{path}: a position task ({config.data.name!r}) has no training pictures to probe with")
    place = pick_device(device or config.device)
    metadata, splits = found.metadata, [split.to(place) for split in training_pictures(config.data)]
    torch.manual_seed(config.seed)
    models = {"random": build_model(without_files(config), metadata), "trained": encoder_of(config, path, found)}
    report = {
        "run": str(path),
        "encoding": encoding_label(config.encoding),
        "step": found.step,
        "part": picture_split(config.data),
        "train_size": len(splits[0]),
        "test_size": len(splits[1]),
        "chance": 1 / len(splits[0].classes),
        "l2": l2,
        "note": metadata["note"],
    }
    for kind, model in models.items():
        with mixed_precision(place, config.precision):
            train, test = (features(model.to(place).eval(), pictures, metadata) for pictures in splits)
        report[kind] = {
            "linear": fit_linear(train, test, len(splits[0].classes), l2),
            "neighbours": nearest_neighbours(train, test, len(splits[0].classes)),
        }
    return report


def positions(path: Path, device: str | None = None) -> dict[str, Any]:
    """Measure, for the run at `path` and for its model with random weights, how well positions can be read.

    Args:
        path: The directory of a run, on pictures or on a position task.
        device: Where to compute; by default where the run did.
    """
    config, found = open_run(path)
    place, metadata = pick_device(device or config.device), found.metadata
    torch.manual_seed(config.seed)
    models = {"random": build_model(without_files(config), metadata), "trained": encoder_of(config, path, found)}
    if config.data.is_task:
        batches = task_batches(open_task(config.data), "whole", torch.Generator(place))
    else:
        batches = picture_batches(evaluation_pictures(config.data).to(place), metadata["mean"], metadata["std"])
    images, _ = next(batches)
    layers = {
        kind: [each._asdict() for each in position_probe(model.to(place), images)] for kind, model in models.items()
    }
    return {"run": str(path), "encoding": encoding_label(config.encoding), "images": len(images), **layers}


def encoder_of(config: Config, path: Path, found: Checkpoint) -> nn.Module:
    """Return the model of a run with its trained weights."""
    if not isinstance(config, PretrainConfig):
        return trained_model(config, found)[0]
    model = build_model(config, found.metadata)
    load_encoder(model, str(path))
    return model


@torch.no_grad()
def features(model: nn.Module, pictures: Pictures, metadata: dict[str, Any]) -> Labelled:
    """Return the pooled features (N, dim) of pictures, float32, and their labels (N,)."""
    batches = [
        (model.forward_head(model.forward_features(images), pre_logits=True).float(), labels)
        for images, labels in picture_batches(pictures, metadata["mean"], metadata["std"])
    ]
    return tuple(map(torch.cat, zip(*batches, strict=True)))


def fit_linear(train: Labelled, test: Labelled, num_classes: int, l2: float = 1e-4) -> float:
    """Fit logistic regression on frozen features, and return its accuracy on others.

    Args:
        train: features (N, dim) and labels (N,) to fit.
        test: those to measure on.
        num_classes: how many labels there are.
        l2: weight of the sum of the squared weights in the mean loss.
    """
    (inputs, labels), (test_inputs, test_labels) = train, test
    mean, std = inputs.mean(0), inputs.std(0) + 1e-6
    inputs, test_inputs = (inputs - mean) / std, (test_inputs - mean) / std
    weight = torch.zeros(num_classes, inputs.shape[1], device=inputs.device, requires_grad=True)
    bias = torch.zeros(num_classes, device=inputs.device, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        """Return the loss, with its gradient, at the weights that L-BFGS has come to."""
        optimizer.zero_grad()
        loss = F.cross_entropy(F.linear(inputs, weight, bias), labels) + l2 * weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    with torch.no_grad():
        return (F.linear(test_inputs, weight, bias).argmax(1) == test_labels).float().mean().item()


def nearest_neighbours(train: Labelled, test: Labelled, num_classes: int) -> float:
    """Return the accuracy of a vote of the training pictures with the most similar features.

    The vote of a picture weighs exp(cosine / 0.07).
    """
    (inputs, labels), (test_inputs, test_labels) = train, test
    inputs, votes = F.normalize(inputs, dim=1), F.one_hot(labels, num_classes).float()
    right = []
    for queries, wanted in zip(F.normalize(test_inputs, dim=1).split(512), test_labels.split(512), strict=True):
        cosine, nearest = (queries @ inputs.T).topk(min(NUM_NEIGHBOURS, len(inputs)), dim=1)
        scores = ((cosine / VOTE_TEMPERATURE).exp().unsqueeze(2) * votes[nearest]).sum(1)
        right.append(scores.argmax(1) == wanted)
    return torch.cat(right).float().mean().item()
