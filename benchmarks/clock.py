"""Ratios of times, never times: every variant of a row runs in one process, in random order, round after round."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Ratio:
    """Time of a variant over the time of the base, from the ratios of all rounds."""

    median: float
    q1: float
    q3: float


def _timer(device: torch.device) -> Callable[[Callable[[], object], int], float]:
    def on_cpu(step: Callable[[], object], repeats: int) -> float:
        begin = time.process_time()
        for _ in range(repeats):
            step()
        return time.process_time() - begin

    def on_cuda(step: Callable[[], object], repeats: int) -> float:
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        for _ in range(repeats):
            step()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1000

    return on_cuda if device.type == "cuda" else on_cpu


def ratios(
    variants: dict[str, Callable[[], object]], base: str, device: torch.device, rounds: int = 11, least: float = 0.03
) -> tuple[dict[str, Ratio], float]:
    """The time of each variant over that of `base`.

    Args:
        variants: name to a step without arguments.
        base: the name that the others are divided by.
        device: its clock is used: CPU time of this process, or CUDA events.
        rounds: in each round every variant runs once, in random order.
        least: seconds that one measurement should take at the least; short steps are repeated.

    Returns:
        The ratios by name, and the base's median seconds for one step.
    """
    clock, order = _timer(device), random.Random(0)
    for step in variants.values():
        step()
    repeats = max(1, round(least / max(clock(variants[base], 1), 1e-6)))
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(rounds):
        names = list(variants)
        order.shuffle(names)
        for name in names:
            seconds[name].append(clock(variants[name], repeats) / repeats)
    found = {}
    for name, times in seconds.items():
        values = [mine / other for mine, other in zip(times, seconds[base], strict=True)]
        q1, median, q3 = statistics.quantiles(values, n=4) if rounds > 1 else [values[0]] * 3
        found[name] = Ratio(median, q1, q3)
    return found, statistics.median(seconds[base])
