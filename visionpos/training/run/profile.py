"""A profile: where the time of a training step goes."""

import os
import time
from collections.abc import Iterable
from typing import Any

from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity
from torch.profiler import profile as record

from visionpos import kernels
from visionpos.training.run.engine import Trainer

__all__ = ["profile"]

WARM_UP_STEPS = 3
PHASES = ("batch", "forward", "backward", "update")


def profile(trainer: Trainer, steps: int) -> dict[str, Any]:
    """Train `steps` steps twice after a warm-up, timed and then recorded; print where the time went, and return it.

    A recorded step takes longer, or on a busy machine another time, so its time stands beside its parts. Those are the
    host's: on a GPU it runs ahead of the kernels, whose time is given beside it. What the
    kernels leave of a step's time is its share outside kernels. Nothing is saved.
    """
    gpu, print0 = trainer.device.type == "cuda", trainer.distributed.print0
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it reports the want of a GPU as an error
    trainer.advance(WARM_UP_STEPS)
    started = time.perf_counter()
    trainer.advance(steps)  # ends when the device has
    whole = (time.perf_counter() - started) / steps * 1000
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * gpu
    with record(activities=activities, acc_events=True) as recorded:
        started = time.perf_counter()
        trainer.advance(steps)
        slowed = (time.perf_counter() - started) / steps * 1000
    events = recorded.key_averages()
    parts = {name: milliseconds / steps for name, milliseconds in host_time(events).items()}
    report = {
        "steps": steps,
        "step_ms": whole,
        "images_per_second": trainer.recipe.batch_size / whole * 1000,
        "host_ms": parts,
        "kernels": kernels.report(),
    }
    print0(f"a step: {whole:.2f} ms, {report['images_per_second']:.0f} images per second")
    print0(f"a recorded step: {slowed:.2f} ms, of which on the host:")
    for name in PHASES:
        print0(f"{name:<10}{parts[name]:10.2f} ms  {parts[name] / sum(parts.values()):6.1%}")
    if gpu:
        busy = kernel_time(events) / steps
        report |= {"kernel_ms": busy, "outside_kernels": 1 - busy / whole}
        print0(f"{'kernels':<10}{busy:10.2f} ms; {report['outside_kernels']:.1%} of the step is outside kernels")
    for operation, version in report["kernels"].items():
        print0(f"{operation} ran {version}")
    print0(events.table(sort_by="self_device_time_total" if gpu else "self_cpu_time_total", row_limit=12))
    return report


def host_time(events: Iterable[Any]) -> dict[str, float]:
    """Return the host's milliseconds in each part; on a GPU a second event of its name has none."""
    return {name: sum(event.cpu_time_total for event in events if event.key == name) / 1000 for name in PHASES}


def kernel_time(events: Iterable[Any]) -> float:
    """Return the milliseconds of kernels and copies; operations and parts that started them have them again."""
    kernels_alone = (e for e in events if e.device_type == DeviceType.CUDA and not e.is_user_annotation)
    return sum(event.self_device_time_total for event in kernels_alone) / 1000
