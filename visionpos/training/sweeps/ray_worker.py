"""A worker that lets Ray train its runs: as many at a time as the nodes of a cluster have room for.

Nothing else is different. A task locks the directory of its run and does what any worker does there, so that plain
workers may help, and the run of a process or node that dies is continued after its last checkpoint, by the task that
Ray starts in place of the dead one. The directory of the runs must be the same on all nodes, under the same path.
"""

import importlib.util
import os
import socket
from dataclasses import dataclass
from types import ModuleType
from typing import Any
from urllib.parse import urlsplit

from visionpos.training.errors import ConfigError, Interrupted, reporting
from visionpos.training.run.lock import hold, holder
from visionpos.training.sweeps.plan import Job, Plan
from visionpos.training.sweeps.worker import Worker, do, record_failure

__all__ = ["PerRun", "RayWorker"]

ANSWER_SECONDS = 5.0  # to wait for the cluster's first node


@dataclass(frozen=True)
class PerRun:
    """Say what Ray gives to each run.

    Args:
        cpus: Cores that are counted for it, which must fit one node.
        gpus: GPUs that it has to itself, or the share of one.
        retries: How often it is begun again, at its last checkpoint, after its process or node has died.

    Raises:
        ConfigError: a number outside its range.
    """

    cpus: float = 1.0
    gpus: float = 0.0
    retries: int = 3

    def __post_init__(self):
        """Raise ConfigError for a number outside its range."""
        if not 0 < self.cpus < 1 and not (self.cpus >= 1 and float(self.cpus).is_integer()):
            raise ConfigError(
                f"--cpus: {self.cpus:g} given; accepted: a whole number from 1, or a share of one above 0"
            )
        if not 0 <= self.gpus <= 1:
            raise ConfigError(f"--gpus: {self.gpus:g} given; accepted: from 0 to 1, as a run is one process on one GPU")
        if self.retries < 0:
            raise ConfigError(f"--retries: {self.retries} given; accepted: a whole number from 0")


class RayWorker(Worker):
    """Hand every run that is free to Ray, until none is left.

    Ray's cluster is the one that RAY_ADDRESS names, or that of this machine; without either, one of this machine's
    cores and GPUs is started for as long as the sweep takes.

    Args:
        plan: The runs.
        per_run: What each gets.

    Raises:
        ConfigError: Ray is not installed, no cluster answers, or no node has what a run needs.
    """

    def __init__(self, plan: Plan, per_run: PerRun):
        super().__init__(plan)
        self.needs = {"CPU": per_run.cpus, "GPU": per_run.gpus}
        self.ray = connected(self.needs, plan.devices)
        self.task = self.ray.remote(
            num_cpus=per_run.cpus,
            num_gpus=per_run.gpus,
            max_retries=per_run.retries,
            retry_exceptions=[Interrupted],  # a process that was asked to stop has saved its run
        )(take)
        self.tasks: dict[Any, Job] = {}

    @property
    def slots(self) -> int:
        """Return how many runs the cluster has room for at this moment, one at least."""
        there = self.ray.cluster_resources()
        return max(1, min(int(there.get(name, 0) / need) for name, need in self.needs.items() if need))

    @property
    def has_room(self) -> bool:
        """Return whether another run is to be handed over: one always waits, which tells Ray to add nodes if it can."""
        return len(self.tasks) <= self.slots

    def _take_one(self) -> bool:
        """Note which tasks have ended, and go on as any worker."""
        ended, _ = self.ray.wait([*self.tasks], num_returns=len(self.tasks), timeout=0) if self.tasks else ([], [])
        for task in ended:
            self._end(task, self.tasks.pop(task))
        return super()._take_one()

    def _attempt(self, job: Job) -> bool:
        """Hand a job over, unless that is done, there is no room, or another worker does it; return whether it was."""
        if job.path in [each.path for each in self.tasks.values()] or not self.has_room or holder(job.path):
            return False
        self._announce(job, len(self.tasks))
        self.tasks[self.task.options(name=job.path.name).remote(os.getcwd(), job)] = job
        return True

    def _end(self, task: Any, job: Job) -> None:
        """Note how long a task took, or record in the run directory why Ray has given it up."""
        try:
            self._note(self.ray.get(task))
        except self.ray.exceptions.RayError as error:
            with hold(job.path) as ours:
                if ours and not job.finished:
                    record_failure(job, getattr(error, "cause", error))


def take(folder: str, job: Job) -> float | None:
    """Do a job in a process of Ray's, with paths relative to a folder, unless another worker does or has done it."""
    os.chdir(folder)
    with hold(job.path) as ours:
        return do(job) if ours and not job.finished else None


def connected(needs: dict[str, float], devices: set[str]) -> ModuleType:
    """Return Ray, connected to a cluster in which runs with these needs can be trained on these devices."""
    for device in devices:
        if ":" in device:
            raise ConfigError(f"device: {device!r} given, but Ray chooses the GPU of a run; accepted: auto, cpu, cuda")
    if importlib.util.find_spec("ray") is None:
        raise ConfigError(
            "--engine: ray given, but Ray is not installed (pip install 'visionpos[ray]'); accepted without it: loop"
        )
    import ray

    address = os.environ.get("RAY_ADDRESS", "")
    with reporting(f"--engine: ray given, but no cluster of Ray's answers (RAY_ADDRESS: {address or 'not set'})"):
        where = urlsplit(address if "://" in address else f"//{address}")
        if where.port:  # else it is empty, or a word of Ray's; Ray itself tries for ten minutes and more
            socket.create_connection((where.hostname, where.port), ANSWER_SECONDS).close()
        ray.init(logging_level="warning")
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    largest = {name: max(node.get(name, 0) for node in nodes) for name in needs}
    for name, need in needs.items():
        if need > largest[name]:
            raise ConfigError(
                f"--{name.lower()}s: {need:g} given; accepted: at most {largest[name]:g}, which a node here has"
            )
    if not needs["GPU"] and largest["GPU"] and devices != {"cpu"}:
        raise ConfigError("--gpus: 0 given, but there are GPUs; accepted: above 0, such as 0.5, or device cpu")
    return ray
