"""Where the time of a training step goes."""

import time
from typing import Any

from torch.profiler import ProfilerActivity
from torch.profiler import profile as record

from visionpos import kernels
from visionpos.training.run.engine import Trainer

__all__ = ["profile"]

WARM_UP = 3
PARTS = ("batch", "forward", "backward", "update")


def profile(trainer: Trainer, steps: int) -> dict[str, Any]:
    """Train `steps` steps twice after a warm-up, timed and then recorded; print where the time went, and return it.

    Times of the parts are the host's: on a GPU it runs ahead of the kernels, whose time is given beside it. What the
    kernels leave of a step's time is its share outside kernels. Nothing is saved.
    """
    gpu, say = trainer.device.type == "cuda", trainer.team.say
    trainer.advance(WARM_UP)
    started = time.perf_counter()
    trainer.advance(steps)  # ends when the device has
    whole = (time.perf_counter() - started) / steps * 1000
    with record(activities=[ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * gpu) as recorded:
        trainer.advance(steps)
    events = recorded.key_averages()
    parts = {event.key: event.cpu_time_total / 1000 / steps for event in events if event.key in PARTS}
    report = {
        "steps": steps,
        "step_ms": whole,
        "images_per_second": trainer.recipe.batch_size / whole * 1000,
        "host_ms": {name: parts[name] for name in PARTS},
        "kernels": kernels.report(),
    }
    say(f"a step: {whole:.2f} ms, {report['images_per_second']:.0f} images per second; recorded, on the host:")
    for name in PARTS:
        say(f"{name:<10}{parts[name]:10.2f} ms  {parts[name] / sum(parts.values()):6.1%}")
    if gpu:
        busy = sum(event.self_device_time_total for event in events) / 1000 / steps
        report |= {"kernel_ms": busy, "outside_kernels": 1 - busy / whole}
        say(f"{'kernels':<10}{busy:10.2f} ms; {report['outside_kernels']:.1%} of the step is outside kernels")
    for operation, version in report["kernels"].items():
        say(f"{operation} ran {version}")
    say(events.table(sort_by="self_device_time_total" if gpu else "self_cpu_time_total", row_limit=12))
    return report
