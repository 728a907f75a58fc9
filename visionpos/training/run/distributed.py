"""The processes that train one model together, and the signals that stop them.

One process alone needs neither torchrun nor a process group. Under torchrun each process gets a GPU, or the CPU with
gloo, through accelerate; every step is the same batch for all of them, of which each takes its share of the rows.
"""

import os
import re
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from accelerate import PartialState
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from visionpos.training.config.schema import Config
from visionpos.training.errors import CheckpointError, ConfigError, Interrupted

__all__ = ["Distributed", "Stop", "full_tensor", "shard_like"]

TIMEOUT = timedelta(seconds=60)  # for a process that does not answer


class Distributed:
    """Know the processes of a run, this one among them, and talk to the others.

    Args:
        device: Where this process computes; under torchrun a GPU of its own in place of `cuda`.
    """

    def __init__(self, device: torch.device):
        self.size = int(os.environ.get("WORLD_SIZE", "1"))
        self.device, self.rank = device, 0
        if self.size > 1:
            state = PartialState(cpu=device.type == "cpu", timeout=TIMEOUT)
            self.rank, self.device = state.process_index, state.device

    @property
    def is_main(self) -> bool:
        """Return whether this process writes files."""
        return self.rank == 0

    def local_rows(self, rows: Tensor | tuple[Tensor, ...]):
        """Return this process's rows of a tensor, or of each tensor of a tuple, that all have in full."""
        if self.size == 1:
            return rows
        if isinstance(rows, Tensor):
            return rows[self.rank :: self.size]
        own = [self.local_rows(each) for each in rows]
        return type(rows)(*own) if hasattr(rows, "_fields") else tuple(own)

    def all_rows(self, own: Tensor) -> Tensor:
        """Return all rows of a tensor of which each process has its `local_rows`, equally many; all must ask."""
        if self.size == 1:
            return own
        own = own.to(self.device)
        shares = [torch.empty_like(own) for _ in range(self.size)]
        dist.all_gather(shares, own)
        return torch.stack(shares, dim=1).flatten(0, 1)  # row i of process r was row i * size + r

    def check(self, config: Config) -> None:
        """Raise ConfigError for what these processes cannot do, such as FSDP where there is only one."""
        batch_size = config.recipe.batch_size
        if self.size == 1 and config.parallel == "fsdp":
            raise ConfigError(
                "parallel: fsdp given, but this is one process; accepted: torchrun with 2 or more, or ddp"
            )
        if self.size > 1 and ":" in config.device:
            raise ConfigError(f"device: {config.device!r} given; accepted under torchrun: auto, cpu, cuda")
        if batch_size % self.size:
            raise ConfigError(
                f"recipe.batch_size: {batch_size} given; accepted: a multiple of the {self.size} processes"
            )

    @contextmanager
    def answering(self) -> Iterator[None]:
        """Report in the block that another process is frozen or has ended, as CheckpointError of one line."""
        try:
            yield
        except RuntimeError as error:
            if self.size == 1 or not re.search(
                "timed? ?out|connection (closed|reset|refused)", str(error), re.IGNORECASE
            ):
                raise
            raise CheckpointError(
                f"another process has ended, or does not answer for {TIMEOUT.seconds} s; run again to continue "
                "after the last checkpoint"
            ) from error

    def wrap(self, model: nn.Module) -> nn.Module:
        """Return the model with gradients averaged over the processes."""
        if self.size == 1:
            return model
        own = [self.device.index] if self.device.type == "cuda" else None
        return DistributedDataParallel(model, device_ids=own, broadcast_buffers=False)

    def fully_shard(self, model: nn.Module) -> nn.Module:
        """Leave a share of every weight in each process, gathered block by block as the model computes (FSDP2).

        Raises:
            ConfigError: a weight that cannot be shared, such as a scalar.
        """
        if self.size > 1:
            mesh = init_device_mesh(self.device.type, (self.size,))
            blocks = [module for name, module in model.named_modules() if name.split(".")[-2:-1] == ["blocks"]]
            try:
                for module in (*blocks, model):
                    fully_shard(module, mesh=mesh)
                    module.set_force_sum_reduction_for_comms(self.device.type == "cpu")  # torch 2.8 has no mean there
            except ValueError as error:
                raise ConfigError(f"parallel: fsdp given; accepted for this model: ddp ({error})") from None
        return model

    def all_reduce_max(self, flag: int) -> int:
        """Return the largest of the processes' flags."""
        if self.size == 1:
            return flag
        flags = torch.tensor(flag, device=self.device)
        dist.all_reduce(flags, dist.ReduceOp.MAX)
        return int(flags)

    def all_reduce_mean(self, values: Tensor) -> Tensor:
        """Return the mean of the processes' values."""
        if self.size > 1:
            values = values.to(self.device)
            dist.all_reduce(values)
            values = values / self.size
        return values

    def print0(self, text: str) -> None:
        """Print a line, once for all processes."""
        if self.is_main:
            print(text, flush=True)

    def barrier(self) -> None:
        """Wait until all processes have come here."""
        if self.size > 1:
            dist.barrier()


def full_tensor(value: Tensor) -> Tensor:
    """Return a tensor of which each process has a share, in full, and any other as it is; all processes must ask."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def shard_like(value: Tensor, other: Tensor | None) -> Tensor:
    """Return this process's share of a tensor that all have, if the other tensor is shared; else the tensor."""
    if isinstance(other, DTensor) and value.shape == other.shape:
        return distribute_tensor(value.to(other.device), other.device_mesh, other.placements)
    return value


class Stop:
    """Note the signal that asks this process to stop: SIGTERM or SIGINT, or 0. A second one ends it at once."""

    def __init__(self):
        self.signal = 0

    def _handle(self, number: int, frame: object) -> None:
        """Note the signal, or end the process if there was one before."""
        if self.signal:
            os._exit(128 + number)
        self.signal = number

    @contextmanager
    def listening(self) -> Iterator["Stop"]:
        """Take the signals for the block."""
        before = {number: signal.signal(number, self._handle) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def raise_if(self, number: int, step: int) -> None:
        """Raise Interrupted for a signal number other than 0, after `step` has been saved."""
        if number:
            raise Interrupted(number, f"stopped by {signal.Signals(number).name} after step {step}, which is saved")
