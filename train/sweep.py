"""Train every encoding with every seed, on as many GPUs and machines as there are.

    python -m train.sweep configs/sweep/direction_small.yaml --dry-run
    python -m train.sweep configs/sweep/direction_small.yaml --recipe.steps 200
    python -m train.sweep configs/sweep/direction_small.yaml --data.grid "[6, 8]" --output runs/wide

Start the same command as often as wished, once for each GPU (CUDA_VISIBLE_DEVICES=1 python -m train.sweep ...), on
every machine that sees the output directory: each takes the next run that is free, and ends when all are finished. No
list could disagree with the runs: a run is finished when its directory has a result, being trained while a process has
locked the directory, and otherwise free. So the run of a killed worker is at once continued by another. A run that
fails is recorded in its directory and left alone by all workers now at work; one started later tries it once more. The
six runs of this sweep file, with its own 400 steps, take 3.6 minutes of one CPU thread's time; other files say theirs.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, NoReturn

from visionpos.training.config.command_line import find_config, path_given
from visionpos.training.errors import ConfigError, one_line, reporting, run_script

if TYPE_CHECKING:
    from visionpos.training.sweeps.plan import Job, Plan


def listing(plan: Plan) -> str:
    """Return a line for every job, with its state."""
    rows = [(*state(job), str(job.path.relative_to(plan.folder))) for job in plan.jobs(lambda job: job.finished)]
    width = max(len(name) for *_, name in rows)
    return "\n".join(f"{short:9} {name:{width}} {long}".rstrip() for short, long, name in rows)


def state(job: Job) -> tuple[str, str]:
    """Return how far a job is: in one word, and in more."""
    from visionpos.training.run.classification import headline
    from visionpos.training.run.lock import holder
    from visionpos.training.run.record import RESULT_KEYS, read_json

    if job.finished:
        with reporting(f"{job.path / 'result.json'} is damaged"):
            return "finished", one_line(headline(read_json(job.path / "result.json", *RESULT_KEYS)))
    if someone := holder(job.path):
        return "running", one_line(someone)
    if job.problem or job.error:
        return "failed", one_line(job.problem or job.error["error"])
    if job.config is None:
        return "waiting", "for the outcome of trials"
    begun = any((job.path / "checkpoints").glob("step-*"))
    return ("begun", "continues after its last checkpoint") if begun else ("waiting", "")


class Parser(argparse.ArgumentParser):
    """Raise where argparse would print its usage, as jsonargparse does, which cannot leave other flags for later."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(message)


def command(argv: Sequence[str]) -> list[Job]:
    """Read the command line, list the jobs or do them, and return those that failed."""
    parser = Parser(usage=argparse.SUPPRESS, allow_abbrev=False, description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = "All other flags are those of train.classify, and hold for every run; --debug shows tracebacks."
    parser.add_argument("sweep", help="the sweep file, or the name of one in configs/sweep")
    parser.add_argument("--dry-run", action="store_true", help="list the runs and their state, and train nothing")
    parser.add_argument("--output", help="directory of the runs; by default as the file says, or runs/<sweep file>")
    parser.add_argument("--storage", help="Optuna's journal; by default optuna.journal in the directory of the runs")
    flags, overrides = parser.parse_known_args(argv)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError("torchrun: a sweep trains each run in one process; start it without, once for each GPU")
    for name in ("output", "storage"):
        if getattr(flags, name) is not None:
            path_given(f"--{name}", getattr(flags, name))
    file = find_config("sweep", flags.sweep, "sweep")
    from visionpos.training.run.lock import hold
    from visionpos.training.run.record import write_json
    from visionpos.training.sweeps.plan import open_plan
    from visionpos.training.sweeps.worker import Worker

    plan = open_plan(file, overrides, flags.output, flags.storage)
    if flags.dry_run:
        print(listing(plan))
        return []
    with hold(plan.folder) as ours:
        if ours:  # for the report; another worker that is here at this moment writes the same
            write_json(plan.folder / "sweep.json", {"vary": list(plan.sweep.vary), "tune": plan.sweep.tune.fields})
    failed = Worker(plan).run()
    for job in failed:
        print(one_line(f"failed: {job.path}: {job.error['error']}"), file=sys.stderr)
    print(f"{plan.folder}: {'all runs are finished' if not failed else f'{len(failed)} runs failed'}")
    return failed


def main() -> None:
    """Run the command line of this process and exit with its code: 1 if a run failed."""
    run_script(lambda argv: sys.exit(bool(command(argv))))


if __name__ == "__main__":
    main()
