"""Classify pictures with a trained run: names and probabilities, as JSON or CSV.

    python -m train.predict runs/finetune_pretrained/learned-seed0 photo.jpg other.png
    python -m train.predict runs/finetune_pretrained/learned-seed0 photos/*.jpg --format csv > answers.csv
    python -m train.predict runs/finetune_pretrained/learned-seed0 photos/*.jpg --top 3 --device cuda

A picture is read and brought to the run's size as the pictures were that it was tested on, so any size will do. The
weights are those of the last checkpoint, averaged if the run has such. JSON has one object a file: the class, its
probability, and those of the `--top` most probable classes; CSV has one line a file and a column for each class.
"""

import csv
import json
import sys
from collections.abc import Sequence
from typing import Any

from visionpos.training.config.command_line import make_parser, parse_flags
from visionpos.training.config.ranges import path_given
from visionpos.training.errors import ConfigError, run_command


def as_object(file: str, probabilities: dict[str, float], top: int) -> dict[str, Any]:
    """Return what JSON says of a file."""
    ordered = sorted(probabilities.items(), key=lambda pair: -pair[1])
    name, probability = ordered[0]
    return {"file": file, "class": name, "probability": probability, "probabilities": dict(ordered[:top])}


def command(argv: Sequence[str]) -> None:
    """Read the command line, classify, and print."""
    parser = make_parser(__doc__)
    parser.add_argument("run", help="the run directory")
    parser.add_argument("files", nargs="+", help="the pictures")
    parser.add_argument("--format", choices=["json", "csv"], default="json", help="of what is printed")
    parser.add_argument("--top", type=int, default=5, help="json: how many classes, the most probable first")
    parser.add_argument("--device", default=None, help="where to compute; by default where the run did")
    flags = parse_flags(parser, argv, {"format": str, "top": int, "device": str | None})
    if flags.top < 1:
        raise ConfigError(f"--top: {flags.top} given; accepted: a whole number from 1")
    from visionpos.training.run.prediction import predict

    answers = predict(path_given("run", flags.run), flags.files, flags.device)
    if flags.format == "json":
        print(json.dumps([as_object(*answer, flags.top) for answer in answers], indent=1))
        return
    writer = csv.writer(sys.stdout, lineterminator="\n")
    for number, (file, probabilities) in enumerate(answers):
        if number == 0:
            writer.writerow(["file", "class", "probability", *probabilities])
        name = max(probabilities, key=probabilities.__getitem__)
        writer.writerow([file, name, probabilities[name], *probabilities.values()])


def main() -> None:
    """Run the command line of this process and exit with its code."""
    sys.exit(run_command(lambda: command(sys.argv[1:])))


if __name__ == "__main__":
    main()
