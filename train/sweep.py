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

With `--engine ray` one command is enough for all GPUs of Ray's cluster; docs/scale.md has the commands.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, NoReturn

from visionpos.training.config.command_line import find_config
from visionpos.training.config.ranges import path_given
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


def arguments(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str], dict[str, float]]:
    """Return the flags of this command, those of the runs, and what each run is to get from Ray."""
    parser = Parser(usage=argparse.SUPPRESS, allow_abbrev=False, description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = "All other flags are those of train.classify, and hold for every run; --debug shows tracebacks."
    parser.add_argument("sweep", help="the sweep file, or the name of one in configs/sweep")
    parser.add_argument("--dry-run", action="store_true", help="list the runs and their state, and train nothing")
    parser.add_argument("--output", help="directory of the runs; by default as the file says, or runs/<sweep file>")
    parser.add_argument("--storage", help="Optuna's journal; by default optuna.journal in the directory of the runs")
    parser.add_argument("--engine", choices=["loop", "ray"], default="loop", help="one run after the other, or by Ray")
    ray = parser.add_argument_group("with --engine ray, for each run")
    ray.add_argument("--cpus", type=float, help="cores that are counted for it; by default 1")
    ray.add_argument("--gpus", type=float, help="1, or a share of one: 0.5 for two runs on a GPU; by default 0")
    ray.add_argument("--retries", type=int, help="how often it may lose its process or node; by default 3")
    flags, overrides = parser.parse_known_args(argv)
    given = {name: getattr(flags, name) for name in ("cpus", "gpus", "retries") if getattr(flags, name) is not None}
    if flags.engine == "loop" and given:
        name, value = next(iter(given.items()))
        raise ConfigError(f"--{name}: {value:g} given, but --engine loop has no use for it; accepted with --engine ray")
    return flags, overrides, given


def command(argv: Sequence[str]) -> list[Job]:
    """Read the command line, list the jobs or do them, and return those that failed."""
    flags, overrides, per_run = arguments(argv)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError("torchrun: a sweep trains each run in one process; start it without, once for each GPU")
    for name in ("output", "storage"):
        if getattr(flags, name) is not None:
            path_given(f"--{name}", getattr(flags, name))
    file = find_config("sweep", flags.sweep, "sweep")
    from visionpos.training.run.lock import hold
    from visionpos.training.run.record import write_json
    from visionpos.training.sweeps.plan import open_plan
    from visionpos.training.sweeps.ray_worker import PerRun, RayWorker
    from visionpos.training.sweeps.worker import Worker

    resources = PerRun(**per_run)
    plan = open_plan(file, overrides, flags.output, flags.storage)
    if flags.dry_run:
        print(listing(plan))
        return []
    worker = RayWorker(plan, resources) if flags.engine == "ray" else Worker(plan)
    with hold(plan.folder) as ours:
        if ours:  # for the report; another worker that is here at this moment writes the same
            write_json(plan.folder / "sweep.json", {"vary": list(plan.sweep.vary), "tune": plan.sweep.tune.fields})
    failed = worker.run()
    for job in failed:
        print(one_line(f"failed: {job.path}: {job.error['error']}"), file=sys.stderr)
    print(f"{plan.folder}: {'all runs are finished' if not failed else f'{len(failed)} runs failed'}")
    return failed


def main() -> None:
    """Run the command line of this process and exit with its code: 1 if a run failed."""
    run_script(lambda argv: sys.exit(bool(command(argv))))


if __name__ == "__main__":
    main()
