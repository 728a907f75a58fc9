"""Measure what the frozen features of a run are worth, by a linear probe and by nearest neighbours.

    python -m train.probe runs/mae_vit_cifar10/rope_axial-seed0

Features are what timm's own pooling gives before the classifier. The same model with random weights is measured beside
it. The linear probe is multinomial logistic regression on features standardised by the training pictures, fitted by
L-BFGS; the neighbours vote with weights exp(cosine / 0.07), 20 of them (Wu et al. 2018; Caron et al. 2021). It takes
the time of two passes over all pictures, one for each model, and of two fits.

    python -m train.probe runs/vit_cifar10_small/rope_axial-seed0 --positions

asks something else: how well row and column of a patch can be read, linearly, from the features of each layer
(`visionpos.analysis.position_probe`), on a batch of the test pictures. docs/position_probe.md does it for any model.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visionpos.analysis.position_probe import position_probe
from visionpos.training.config.command_line import make_parser, parse_flags, path_given
from visionpos.training.config.schema import Config, PretrainConfig, encoding_label
from visionpos.training.data.datasets import Pictures
from visionpos.training.errors import ConfigError, run_script
from visionpos.training.run.build import build_model, load_encoder, trained_model, without_files
from visionpos.training.run.checkpoint import Checkpoint
from visionpos.training.run.engine import mixed_precision, pick_device
from visionpos.training.run.record import open_run, write_json
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


def position_table(report: dict[str, Any]) -> str:
    """Return how well positions can be read in Markdown, a line for each layer."""
    lines = [
        f"{report['encoding']}: R^2 of row and column of a patch, {report['images']} pictures, half of them to fit",
        "",
        "| layer | random: row | column | trained: row | column |",
        "|---|---|---|---|---|",
    ]
    for random, trained in zip(report["random"], report["trained"], strict=True):
        cells = " | ".join(f"{each[axis]:.2f}" for each in (random, trained) for axis in ("row", "column"))
        lines.append(f"| {random['layer']} | {cells} |")
    return "\n".join(lines)


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


def table(report: dict[str, Any]) -> str:
    """Return the report in Markdown."""
    lines = [
        f"{report['encoding']}, step {report['step']}: features of {report['train_size']} training pictures, measured "
        f"on {report['test_size']} {report['part']} pictures, chance {report['chance']:.1%}",
        "",
        "| weights | linear probe | nearest neighbours |",
        "|---|---|---|",
    ]
    lines += [f"| {k} | {report[k]['linear']:.1%} | {report[k]['neighbours']:.1%} |" for k in ("random", "trained")]
    note = ["", f"Note: {report['note']}."] if report["note"] else []
    return "\n".join([*lines, *note])


def command(argv: Sequence[str]) -> None:
    """Read the command line, measure, print the table, and record it in the run."""
    parser = make_parser("A linear probe and nearest neighbours on the frozen features of a run.")
    parser.add_argument("run", help="the run directory")
    parser.add_argument("--l2", type=float, default=None, help="weight decay of the linear probe; by default 1e-4")
    parser.add_argument("--positions", action="store_true", help="read row and column of patches instead of classes")
    parser.add_argument("--device", default=None, help="where to compute; by default where the run did")
    flags = parse_flags(parser, argv, {"l2": float | None, "positions": bool, "device": str | None})
    if flags.positions and flags.l2 is not None:
        raise ConfigError(f"--l2: {flags.l2} given with --positions, which has no use for it")
    if flags.l2 is not None and not 0 <= flags.l2 < float("inf"):
        raise ConfigError(f"--l2: {flags.l2} given; accepted: a number from 0")
    run = path_given("run", flags.run)
    if flags.positions:
        report, text, name = positions(run, flags.device), position_table, "position_probe.json"
    else:
        report, text, name = probe(run, 1e-4 if flags.l2 is None else flags.l2, flags.device), table, "probe.json"
    print(text(report), flush=True)  # also where nothing can be written
    write_json(run / name, report)


def main() -> None:
    """Run the command line of this process and exit with its code."""
    run_script(command)


if __name__ == "__main__":
    main()
