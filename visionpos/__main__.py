"""Say what position encodings there are, and measure what one does.

    python -m visionpos list "rope*" --place rotary
    python -m visionpos compare rope_axial alibi2d --grid 14 10 --option temperature=10
    python -m visionpos plot rope_axial --output rope.png

Encodings of your own come along with `--import MODULE`. `python -m visionpos COMMAND --help` has the options of one.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path

BASELINE = "sinusoidal"


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line, with one subcommand for each question."""
    parser = argparse.ArgumentParser(
        prog="visionpos", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--import",
        dest="modules",
        action="append",
        default=[],
        metavar="MODULE",
        help="register your own encodings first",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    listing = commands.add_parser("list", help="names, places, summaries")
    listing.add_argument("pattern", nargs="?", default="*", help="such as 'rope*'")
    listing.add_argument("--place", help="input, rotary, bias or conditional")
    commands.add_parser("show", help="paper, formula, options, claims").add_argument("name")
    check = commands.add_parser("check", help="hold it to the contract and measure it")
    check.add_argument("name")
    plot = commands.add_parser("plot", help="one picture of what it does")
    plot.add_argument("name")
    plot.add_argument("--output", help="a file such as x.png or x.pdf; NAME.png by default")
    compare = commands.add_parser("compare", help="a table of measured properties")
    compare.add_argument("names", nargs="+", metavar="name")
    for command in (check, plot, compare):
        command.add_argument("--grid", type=int, nargs=2, default=(14, 14), metavar=("H", "W"), help="14 14 by default")
        command.add_argument("--option", action="append", default=[], metavar="KEY=VALUE", help="of the encoding")
    for command in (check, compare):
        command.add_argument("--test-grid", type=int, nargs=2, metavar=("H", "W"), help="twice the grid by default")
    hosts = commands.add_parser("hosts", help="try every encoding in a small model of every family")
    hosts.add_argument("--coverage", action="store_true", help="what share of timm's pretrained weights converts")
    explore = commands.add_parser("explore", help="write a page to look at two encodings side by side, token by token")
    explore.add_argument("names", nargs="*", metavar="name", help="of encodings; all by default")
    explore.add_argument("--output", default="explorer.html", help="the file, explorer.html by default")
    docs = commands.add_parser("docs", help="write encodings.md and its pictures")
    docs.add_argument("--output", default="docs", help="folder")
    docs.add_argument("--no-pictures", action="store_true")
    return parser


def run(flags: argparse.Namespace) -> None:
    """Answer one command and print the answer.

    Raises:
        ValueError: a mistake in the command.
    """
    from .analysis import report  # torch, which --help does without

    for module in flags.modules:
        importlib.import_module(module)
    if flags.command == "list":
        print(report.listing(flags.pattern, flags.place))
    elif flags.command == "show":
        print(report.facts(flags.name))
    elif flags.command == "hosts":
        from .analysis.census import census, coverage
        from .analysis.hosts import host_matrix

        print(coverage(census()) if flags.coverage else host_matrix(), end="")
    elif flags.command == "explore":
        from .analysis.explorer import explorer

        Path(flags.output).write_text(explorer(flags.names or None), encoding="utf-8")
        print(f"wrote {flags.output}")
    elif flags.command == "docs":
        from .analysis.page import write_page

        print(f"wrote {write_page(Path(flags.output), pictures=not flags.no_pictures)}")
    else:
        measured(flags)


def measured(flags: argparse.Namespace) -> None:
    """Answer one of the commands that build encodings: check, plot or compare."""
    from .analysis import plot_encoding, report
    from .registry import encoding_info

    grid, options = tuple(flags.grid), report.parse_options(flags.option)
    if min(grid) < 1:
        raise ValueError(f"--grid must be two positive numbers, got {grid}")
    if flags.command == "plot":
        encoding_info(flags.name)
        out = flags.output or f"{flags.name}.png"
        plot_encoding(flags.name, grid, **options).savefig(out)
        print(f"wrote {out}")
        return
    test_grid = tuple(flags.test_grid or (2 * size for size in grid))
    if flags.command == "compare":
        print(report.comparison([(name, shared(name, options, flags.names)) for name in flags.names], grid, test_grid))
        return
    from .testing import check_encoding  # timm, which the other commands do without

    specs = [(flags.name, options), (BASELINE, {})]
    table = report.comparison(specs if specs[0] != specs[1] else specs[:1], grid, test_grid)
    print(f"{flags.name}: {report.claims(flags.name)}")
    print(f"the contract holds: {', '.join(check_encoding(flags.name)) or 'nothing to check'}\n\n{table}")


def shared(name: str, options: dict, names: Sequence[str]) -> dict:
    """Return those of the options that an encoding has.

    Raises:
        ValueError: an option that none of `names` has.
    """
    from .registry import encoding_info

    accepted = {each: {*encoding_info(each)["options"], *encoding_info(each)["required"]} for each in names}
    for key in options:
        if not any(key in keys for keys in accepted.values()):
            raise ValueError(f"none of {', '.join(names)} has an option {key!r}")
    return {key: value for key, value in options.items() if key in accepted[name]}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status.

    0 is success, 1 an encoding that breaks the contract, 2 a mistake, which is told in one line on stderr.
    """
    flags = make_parser().parse_args(argv)
    try:
        run(flags)
    except AssertionError as broken:
        print(f"visionpos: {broken}", file=sys.stderr)
        return 1
    except (ValueError, ImportError, OSError) as mistake:
        print(f"visionpos: {' '.join(str(mistake).split())}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
