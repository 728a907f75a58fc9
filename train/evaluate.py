"""Measure the accuracy of a trained run on pictures of other sizes and shapes.

    python -m train.evaluate runs/vit_cifar10_small/rope_axial-seed0
    python -m train.evaluate runs/vit_cifar10_small/rope_axial-seed0 --sizes 24 32 40 48 64 --canvas 40 48 --shifts 1 4
    python -m train.evaluate runs/vit_cifar10_small/rope_axial-seed0 --aspect 32x48 48x32 --scaling ntk

`--sizes` and `--aspect` scale the test pictures (bicubic, antialiased); `--canvas` leaves them at their scale, centred
on a larger canvas whose rest is filled by reflection; `--shifts` moves them down and right by some pixels, filled by
reflection, and counts how many answers stay what they were. A run on a position task is tested on other grids instead.
On a size that was not trained, coordinates are interpolated, or run on (`--extrapolate`), or the frequencies of rotary
encodings are scaled (`--scaling ntk`); the title says which of these the model does by itself.
The accuracy of each class, the confusion matrix and, with more than five classes, top-5 accuracy are in the report.
The weights are those of the last checkpoint, averaged if the run has such; the patch, and Swin's windows, stay as
trained. Where those do not divide the grid, a Swin with its own encoding sees across the border of the picture, as
timm's does, and the note below the table names these sizes. Each size is one pass over the test pictures: a run of the
demo's task at two sizes takes 9 seconds of one CPU thread, imports included.
"""

import itertools
from collections.abc import Sequence
from typing import Any

from visionpos.training.config.command_line import make_parser, parse_flags
from visionpos.training.config.ranges import path_given
from visionpos.training.errors import run_script


def table(report: dict[str, Any]) -> str:
    """Return the report in Markdown: one line for each size, one column for each split of the test."""
    from visionpos.training.run.evaluation import size_text

    splits = list(dict.fromkeys(row["part"] for row in report["rows"]))
    lines = [f"| pictures | {' | '.join(splits)} |", f"|---|{'---|' * len(splits)}"]
    for (how, *size), found in itertools.groupby(report["rows"], lambda row: (row["how"], *row["size"])):
        rows = list(found)
        cells = [f"{row['accuracy']:.1%}" + (f" (top 5 {row['top5']:.1%})" if "top5" in row else "") for row in rows]
        kept = "".join(f", {row['consistency']:.1%} of the answers kept" for row in rows if "consistency" in row)
        lines.append(f"| {how} {size_text(size)}{kept} | {' | '.join(cells)} |")
    way, own = report["coordinates"], report["own_coordinates"]
    by_itself = "" if not own else ", as the model does it" if way == own else f", where the model has {own} ones"
    title = f"{report['encoding']}, step {report['step']}, {report['weights']} weights, {way} coordinates{by_itself}"
    basis = f"{report['test_size']} test pictures, chance {report['chance']:.1%}"
    note = ["", f"Note: {report['note']}."] if report["note"] else []
    return "\n".join([f"{title}; {basis}", "", *lines, "", by_class(report), *note])


def by_class(report: dict[str, Any]) -> str:
    """Return the accuracy of each class at the size that was trained on, and what it is most often mistaken for."""
    lines = ["| class | pictures | accuracy | most often taken for |", "|---|---|---|---|"]
    for label, (name, accuracy, row) in enumerate(
        zip(report["classes"], report["class_accuracy"], report["confusion"], strict=True)
    ):
        count, other = max((count, other) for other, count in enumerate(row) if other != label)
        mistaken = f"{report['classes'][other]} ({count})" if count else ""
        share = "" if accuracy is None else f"{accuracy:.1%}"
        lines.append(f"| {name} | {sum(row)} | {share} | {mistaken} |")
    return "\n".join(lines)


def command(argv: Sequence[str]) -> None:
    """Read the command line, evaluate, print the table, and record it in the run."""
    parser = make_parser(__doc__)
    parser.add_argument("run", help="the run directory")
    pictures = parser.add_argument_group("other pictures")
    pictures.add_argument("--sizes", nargs="+", default=[], help="scale the pictures to these sizes: 24 32 48 or 32x48")
    pictures.add_argument("--aspect", nargs="+", default=[], help="the same, for shapes: 32x48 48x32")
    pictures.add_argument("--canvas", nargs="+", default=[], help="put the pictures on a larger canvas: 40 48 or 32x48")
    pictures.add_argument("--shifts", nargs="+", default=[], help="move the pictures down and right: 1 4 or 0x4")
    coordinates = parser.add_argument_group("coordinates on a size that was not trained")
    coordinates.add_argument(
        "--extrapolate", action="store_true", help="let coordinates run on beyond the trained grid"
    )
    coordinates.add_argument(
        "--scaling", default=None, help="scale rotary frequencies: linear, ntk, ntk_by_parts or yarn"
    )
    parser.add_argument("--device", default=None, help="where to compute; by default where the run did")
    flags = parse_flags(
        parser,
        argv,
        dict.fromkeys(["sizes", "aspect", "canvas", "shifts", "extrapolate", "scaling", "device"], str | None),
    )
    from visionpos.training.run.evaluation import measure, parse_size, record

    sizes = [parse_size(f"--{name}", text) for name in ("sizes", "aspect") for text in flags[name]]
    canvas = [parse_size("--canvas", text) for text in flags.canvas]
    shifts = [parse_size("--shifts", text) for text in flags.shifts]
    run = path_given("run", flags.run)
    report, kept = measure(run, sizes, canvas, flags.extrapolate, flags.device, shifts, flags.scaling)
    print(table(report), flush=True)  # also where nothing can be written
    record(run, report, kept)


def main() -> None:
    """Run the command line of this process and exit with its code."""
    run_script(command)


if __name__ == "__main__":
    main()
