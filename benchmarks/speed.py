"""Cost of an encoding: layers, whole models and single operations, over the same without it and over timm's.

    python -m benchmarks.speed --quick                              the small rows, about 4 minutes on one core
    python -m benchmarks.speed --output docs                        everything, hours on a CPU
    python -m benchmarks.speed --rows layer "Swin-T" --dtype bf16   groups of rows, or rows by name

Writes speed.json and speed.md. Exit status 1: a row does not compute what its peer does.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from benchmarks import layers, models, operations, windows
from benchmarks.measure import Row, Setting, Unequal, measure
from benchmarks.report import facts, page, progress, write
from visionpos.registry import hint

ROWS = [*operations.ROWS, *layers.ROWS, *windows.ROWS, *models.ROWS]
GROUPS = list(dict.fromkeys(row.group for row in ROWS))
DTYPES, MODES = ("float32", "bf16"), ("eager", "compiled")


def choose(rows: list[str] | None, device: str, quick: bool) -> list[Row]:
    """Return the rows of some groups, or of some names, that a device can run; None stands for all.

    Raises:
        ValueError: neither a group nor a row, or none that is left.
    """
    known = [*GROUPS, *(row.name for row in ROWS)]
    for name in rows or ():
        if name not in known:
            raise ValueError(f"--rows {name!r} is no row{hint(name, known)} Groups: {', '.join(GROUPS)}")
    chosen = [row for row in ROWS if rows is None or row.name in rows or row.group in rows]
    if not any(row.quick or not quick for row in chosen):
        raise ValueError(f"--rows {' '.join(rows)}: none of these is small enough for --quick")
    if all(row.cuda for row in chosen) and device == "cpu":
        raise ValueError(f"--rows {' '.join(rows)}: these need --device cuda")
    return [row for row in chosen if (row.quick or not quick) and not (row.cuda and device == "cpu")]


def check(args: argparse.Namespace) -> None:
    """Raise ValueError for a device, dtype, mode or number of rounds that cannot be measured."""
    for option, valid in (("dtype", DTYPES), ("mode", MODES)):
        for given in getattr(args, option):
            if given not in valid:
                raise ValueError(f"--{option} must be among {', '.join(valid)}, got {given!r}")
    if args.rounds < 3:
        raise ValueError(f"--rounds must be 3 or more, got {args.rounds}")
    if args.device not in ("cpu", "cuda"):
        raise ValueError(f"--device must be cpu or cuda (CUDA_VISIBLE_DEVICES says which), got {args.device!r}")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: this torch sees no CUDA device")


def run(row: Row, setting: Setting, rounds: int) -> dict[str, Any]:
    """Measure a row; a compiled one in a process of its own, so that no other one's code and guards are in its way."""
    try:
        if setting.mode == "eager":
            return measure(row, setting, rounds)
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            return pool.submit(measure, row, setting, rounds).result()
    except Unequal as error:
        return {"row": row.name, "group": row.group, **vars(setting), "error": f"not measured: {error}"}
    finally:
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.speed", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", nargs="+", metavar="ROW", help=f"groups ({', '.join(GROUPS)}) or names of rows")
    parser.add_argument(
        "--quick", action="store_true", help="the small rows; float32, eager and 5 rounds, if not given"
    )
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--dtype", nargs="+", help=", ".join(DTYPES))
    parser.add_argument("--mode", nargs="+", help=", ".join(MODES))
    parser.add_argument("--rounds", type=int, help="measurements of each variant, 11 if not given")
    parser.add_argument(
        "--output", type=Path, default=Path("runs/speed"), metavar="DIR", help="for speed.json, speed.md"
    )
    args = parser.parse_args()
    args.dtype = args.dtype or DTYPES[: 1 if args.quick else None]
    args.mode = args.mode or MODES[: 1 if args.quick else None]
    args.rounds = (5 if args.quick else 11) if args.rounds is None else args.rounds
    try:
        check(args)
        rows = choose(args.rows, args.device, args.quick)
    except ValueError as error:
        raise SystemExit(f"error: {error}") from None
    command = shlex.join(["python", "-m", "benchmarks.speed", *sys.argv[1:]])
    measured = {**facts(torch.device(args.device), command, args.rounds), "rows": []}
    for mode in args.mode:
        for dtype in args.dtype:
            for row in rows:
                for backward in (False, True):
                    result = run(row, Setting(args.device, dtype, mode, backward), args.rounds)
                    measured["rows"].append(result)
                    print(progress(result), flush=True)
                write(measured, args.output)  # what is there so far, if the rest is interrupted
    print(f"\n{page(measured)}\nwritten to {args.output}/speed.json and speed.md")
    if any("error" in result for result in measured["rows"]):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
