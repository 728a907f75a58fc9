"""A worker of a sweep: it takes the next run that is free, trains and evaluates it, until none is left.

No list could disagree with the runs: a run is finished when its directory has a result, being trained while a process
has locked the directory, and otherwise free. So the run of a killed worker is at once continued by another. A run that
fails is recorded in its directory and left alone by all workers now at work; one started later tries it once more.
"""

import os
import socket
import sys
import time
import traceback

import torch

from visionpos.training.errors import ConfigError, Interrupted, one_line
from visionpos.training.run.classification import train
from visionpos.training.run.evaluation import evaluate
from visionpos.training.run.lock import hold, holder
from visionpos.training.run.loop import duration
from visionpos.training.run.record import write_json
from visionpos.training.sweeps.plan import Job, Plan

__all__ = ["Worker", "do", "record_failure"]

POLL_SECONDS = 2.0  # between looks for a run that a killed worker left


class Worker:
    """Train what is free until nothing is left.

    Args:
        plan: The runs, which other workers may share.
    """

    slots = 1  # runs that it does at a time
    has_room = True  # whether it can begin another one

    def __init__(self, plan: Plan):
        self.plan = plan
        self.seconds: list[float] = []  # that each run of this worker took
        self.earlier = {job.path: job.error for job in plan.jobs(lambda job: job.finished)}

    def run(self) -> list[Job]:
        """Do jobs until all are done, and return those that failed."""
        while self._take_one():
            pass
        return [job for job in self.plan.jobs(self.is_done) if job.error and not job.finished]

    def is_done(self, job: Job) -> bool:
        """Return whether a job is finished, or has failed since this worker started."""
        return job.finished or (job.error not in (None, self.earlier.get(job.path)) and holder(job.path) is None)

    def _take_one(self) -> bool:
        """Begin the first job that is free; if there is none, wait a little. Return False if all are done."""
        busy = False
        for job in self.plan.jobs(self.is_done, ask=self.has_room):
            if not self.is_done(job):
                if job.is_known and self._attempt(job):
                    return True
                busy = True
        if busy:
            time.sleep(POLL_SECONDS)
        return busy

    def _announce(self, job: Job, begun: int = 0) -> None:
        """Print which of how many runs is next, and how long all that are left would take this worker alone."""
        done = [self.is_done(each) for each in self.plan.jobs(self.is_done)]
        left = ""
        if self.seconds:
            mean = sum(self.seconds) / len(self.seconds) / self.slots
            left = f", about {duration(mean * done.count(False))} left for this worker alone"
        print(f"{job.path}: {done.count(True) + begun + 1} of {len(done)}{left}", flush=True)

    def _attempt(self, job: Job) -> bool:
        """Do a job unless another worker does; return whether this worker did."""
        with hold(job.path) as ours:
            if ours and not job.finished:
                self._announce(job)
                self._note(do(job))
        return ours

    def _note(self, seconds: float | None) -> None:
        """Remember how long a run took; None for one that failed."""
        if seconds is not None:
            self.seconds.append(seconds)


def do(job: Job) -> float | None:
    """Do a job that this process has locked, and return the seconds it took; None if it failed, which is recorded."""
    started = time.monotonic()
    try:
        perform(job)
    except Interrupted:
        raise
    except Exception as error:  # whatever it is, the other jobs go on
        record_failure(job, error)
        return None
    (job.path / "error.json").unlink(missing_ok=True)
    return time.monotonic() - started


def perform(job: Job) -> None:
    """Train the run of a job, then evaluate it."""
    if job.problem is not None:
        raise ConfigError(job.problem)
    torch.compiler.reset()  # compiled code of earlier models counts against a limit, beyond which none is compiled
    train(job.config)
    if job.evaluate:
        for extrapolate in (False, True):
            evaluate(job.path, **job.evaluate, extrapolate=extrapolate)


def record_failure(job: Job, error: Exception) -> None:
    """Leave the error in the run directory, and one line of it on stderr."""
    line = f"{type(error).__name__}: {one_line(error)}"
    print(f"error: {job.path}: {line}", file=sys.stderr)
    where = {"host": socket.gethostname(), "pid": os.getpid(), "time": time.time()}
    write_json(job.path / "error.json", {"error": line, **where, "traceback": traceback.format_exc()})
