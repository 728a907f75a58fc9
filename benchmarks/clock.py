"""Timing of steps that take turns: in every round each of them runs once, in random order.

A CPU is asked for the CPU time of this process, a CUDA device for the time between two events.
"""

from __future__ import annotations

import ctypes
import gc
import itertools
import math
import random
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.profiler import ProfilerActivity, profile

Step = Callable[[], object]
Times = dict[str, list[float]]  # seconds of one step, round by round
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3  # of glibc's malloc.h


@dataclass(frozen=True)
class Ratio:
    """The time of a step over the time of another: median and quartiles of the ratios of all rounds."""

    median: float
    q1: float
    q3: float


def keep_memory() -> None:
    """Let this process keep the memory that it frees, as it does on a GPU, where the C library is glibc.

    Otherwise it goes back to the kernel whenever the heap happens to end with it, and fresh pages, a microsecond or two
    for each 4 KiB, cost more than what is measured: in some variants and not in others, by accident.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        for option, value in ((M_TRIM_THRESHOLD, 2**31 - 1), (M_TOP_PAD, 2**28), (M_MMAP_THRESHOLD, 2**25)):
            mallopt(option, value)


def time_on_cpu(step: Step, repeats: int) -> float:
    """Return the seconds of CPU time of one step."""
    begin = time.process_time()
    for _ in range(repeats):
        step()
    return time.process_time() - begin


def time_on_cuda(step: Step, repeats: int) -> float:
    """Return the seconds between two events on the current stream."""
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    begin.record()
    for _ in range(repeats):
        step()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1000


def take_turns(steps: dict[str, Step], device: torch.device, rounds: int, least: float = 0.03) -> Times:
    """Measure steps that have run before, and return the seconds of each in every round.

    Args:
        steps: by name.
        device: where they run.
        rounds: measurements of each.
        least: seconds that a measurement takes at the least; shorter steps are repeated.
    """
    clock = time_on_cuda if device.type == "cuda" else time_on_cpu
    repeats = {name: math.ceil(least / max(clock(step, 1), 1e-6)) for name, step in steps.items()}
    times: Times = {name: [] for name in steps}
    names = list(steps)
    gc.collect()
    gc.freeze()  # what exists by now, the modules of torch above all, is not searched again
    for _ in range(rounds):
        random.shuffle(names)
        for name in names:
            times[name].append(clock(steps[name], repeats[name]) / repeats[name])
    gc.unfreeze()
    return times


def ratio(times: Times, name: str, over: str) -> Ratio:
    """Return the ratio of two steps of the same rounds, two or more."""
    values = [mine / other for mine, other in zip(times[name], times[over], strict=True)]
    q1, median, q3 = statistics.quantiles(values, n=4, method="inclusive")
    return Ratio(median, q1, q3)


def peak_bytes(step: Step, device: torch.device) -> int:
    """Return what a step allocates at its worst moment, beyond what was there before it."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        step()
    events = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
    changes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return max(itertools.accumulate(changes, initial=0))
