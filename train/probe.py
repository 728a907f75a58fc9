"""Measure what the frozen features of a run are worth, by a linear probe and by nearest neighbours.

    python -m train.probe runs/mae_vit_cifar10/rope_axial-seed0
    python -m train.probe runs/mae_vit_cifar10/rope_axial-seed0 --l2 1e-3 --device cpu
    python -m train.probe runs/vit_cifar10_small/rope_axial-seed0 --positions

Features are what timm's own pooling gives before the classifier. The same model with random weights is measured beside
it. The linear probe is multinomial logistic regression on features standardised by the training pictures, fitted by
L-BFGS; the neighbours vote with weights exp(cosine / 0.07), 20 of them (Wu et al. 2018; Caron et al. 2021). It takes
the time of two passes over all pictures, one for each model, and of two fits.

`--positions` asks something else: how well row and column of a patch can be read, linearly, from the features of each
layer (`visionpos.analysis.position_probe`), on a batch of the test pictures. docs/position_probe.md does it for any
model.
"""

from collections.abc import Sequence
from typing import Any

from visionpos.training.config.command_line import make_parser, parse_flags
from visionpos.training.config.ranges import path_given
from visionpos.training.errors import ConfigError, run_script


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


def command(argv: Sequence[str]) -> None:
    """Read the command line, measure, print the table, and record it in the run."""
    parser = make_parser(__doc__)
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
    from visionpos.training.run.probing import positions, probe
    from visionpos.training.run.record import write_json

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
