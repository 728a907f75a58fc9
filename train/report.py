"""Compare finished runs: which encoding is better, and how sure is that?

    python -m train.report runs/encodings_cifar10
    python -m train.report runs/first runs/second --vary recipe.epochs model.name --baseline sincos2d --output report
    python -m train.report results/* --page docs/results.md

The arguments are run directories, directories of them such as `train.sweep` leaves, or folders of `results/`.
`report.html`, `report.md`, `report.csv`, `report.json` and figures are written to `--output`. Runs may differ in
encoding and seed, in the fields that their sweep varied or tuned, and in those that `--vary` names; any other
difference is an error.

What the project publishes are finished runs kept as one small file each, by `--pack results/NAME --what "..." --command
"..." --commit 1234567`, and the page that `--page` writes of them. A report of six runs of a position task takes 9
seconds of one CPU thread, imports included.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from visionpos.training.config.command_line import make_parser, parse_flags
from visionpos.training.config.ranges import path_given
from visionpos.training.errors import ConfigError, run_script

PACKED = {
    "what": "what the runs are, in a line",
    "question": "what they are to answer",
    "command": "what made them",
    "commit": "of the code that made them",
}


def report(paths: Sequence[Path], output: Path | None, varied: Sequence[str], baseline: str | None) -> dict[str, Any]:
    """Write the report, and return the content of report.json with the directory that it is in.

    Args:
        paths: Run directories, or directories of them.
        output: Where to write; by default `report` in the only directory of `paths`.
        varied: Fields in which the runs may differ.
        baseline: Label of the encoding that others are compared to; by default `none`, if it is there.
    """
    from visionpos.training.reports.collect import find_runs, group_runs
    from visionpos.training.reports.figures import draw
    from visionpos.training.reports.html import html
    from visionpos.training.reports.markdown import markdown
    from visionpos.training.reports.summary import summarize
    from visionpos.training.reports.tables import csv_text
    from visionpos.training.run.record import write_json, write_whole

    if output is None:
        if len(paths) != 1 or (paths[0] / "config.yaml").exists():
            raise ConfigError("--output: not given; accepted: a directory (left out only for one directory of runs)")
        output = paths[0] / "report"
    found = find_runs(paths, varied)
    groups = group_runs(found)
    labels = list(dict.fromkeys(group.label for group in groups))
    if baseline is not None and baseline not in labels:
        raise ConfigError(f"--baseline: {baseline!r} given; accepted: {', '.join(labels)}")
    baseline = baseline or ("none" if "none" in labels else None)
    content = summarize(found, groups, baseline)
    try:
        output.mkdir(parents=True, exist_ok=True)
        content["figures"] = draw(content, output)
        write_json(output / "report.json", content)
        write_whole(output / "report.md", markdown(content))
        write_whole(output / "report.csv", csv_text(content))
        write_whole(output / "report.html", html(content))
    except OSError as error:
        raise ConfigError(f"--output: cannot write to {output}: {error}") from None
    return content | {"output": str(output)}


def command(argv: Sequence[str]) -> None:
    """Read the command line, write the report, and print it."""
    parser = make_parser(__doc__)
    parser.add_argument("runs", nargs="+", help="run directories, or directories of them")
    parser.add_argument("--output", default=None, help="where to write; by default `report` in the directory of runs")
    parser.add_argument("--vary", nargs="+", default=[], help="fields in which the runs may differ: recipe.epochs ...")
    parser.add_argument("--baseline", default=None, help="the encoding that others are compared to; by default none")
    published = parser.add_argument_group("what is published, in place of a report")
    published.add_argument("--page", default=None, help="write docs/results.md from folders of results/, and no report")
    published.add_argument("--pack", default=None, help="write the runs into this folder of results/, and no report")
    for name, text in PACKED.items():
        published.add_argument(f"--{name}", default=None, help=f"with --pack, if its study.json does not say: {text}")
    flags = parse_flags(
        parser, argv, dict.fromkeys(["runs", "output", "vary", "baseline", "page", "pack", *PACKED], str | None)
    )
    paths = [path_given("runs", run) for run in flags.runs]
    given = {name: flags[name] for name in PACKED if flags[name] is not None}
    if given and flags.pack is None:
        raise ConfigError(f"--{next(iter(given))}: given without --pack, which alone has use for it")
    publish = next((name for name in ("page", "pack") if flags[name] is not None), None)
    useless = ["output", "baseline", *(["vary", "pack"] if publish == "page" else [])]
    for name in useless if publish else ():
        if flags[name]:
            raise ConfigError(f"--{name}: given with --{publish}, which has no use for it")
    from visionpos.training.reports.collect import find_runs, group_runs
    from visionpos.training.reports.markdown import markdown
    from visionpos.training.reports.packed import pack_study
    from visionpos.training.reports.page import write_page

    if flags.pack is not None:
        found = find_runs(paths, flags.vary)
        group_runs(found)  # raises if the runs are no study
        pack_study(
            Path(flags.pack), [run.path for run in found.runs], given | {"vary": found.varied, "tune": found.tuned}
        )
        print(f"{len(found.runs)} runs are in {flags.pack}; {len(found.unfinished)} are not finished")
        if bare := [run.path.name for run in found.runs if not run.right]:
            print(f"without predictions.safetensors, so without intervals: {', '.join(bare)}")
        return
    if flags.page is not None:
        write_page(paths, Path(flags.page))
        print(f"{flags.page} is written")
        return
    output = None if flags.output is None else path_given("--output", flags.output)
    content = report(paths, output, flags.vary, flags.baseline)
    folder = Path(content["output"])
    print(
        f"{markdown(content)}\nThis is {folder / 'report.md'}; as a page with tables to sort, {folder / 'report.html'}."
    )


def main() -> None:
    """Run the command line of this process and exit with its code."""
    run_script(command)


if __name__ == "__main__":
    main()
