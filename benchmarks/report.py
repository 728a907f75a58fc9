"""Results as JSON and as a page of Markdown tables: what was measured, where and how."""

from __future__ import annotations

import datetime
import json
import os
import platform
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import timm
import torch

from benchmarks.measure import BAND
from benchmarks.targets import goals

Result = dict[str, Any]
PASSES = {False: "forward", True: "forward + backward"}

NOTES = f"""\
A number is the time of a variant over the time of another, both run in turns, in random order, in one process: the
median of the ratios of all rounds, and its quartiles in brackets. Less than 1 is faster. "Again" is the base over
itself: the noise. A row where it lies outside {BAND[0]} to {BAND[1]} is measured again, and marked `?` if it stays so.
Variants with timm's weights were checked to compute what timm's compute, before they were timed. On a CPU: one thread
and CPU time; the process keeps the memory that it frees, so that fresh pages are not what is measured. On CUDA: time
between events, and inputs larger than the L2 cache. Memory is the ratio of the peaks of one step, beyond weights and
inputs. Forward is in eval mode without gradients; bf16 is autocast."""


def processor() -> str:
    """Return the model name of the CPU."""
    info = Path("/proc/cpuinfo")
    names = info.read_text().splitlines() if info.exists() else []
    named = [line.partition(":")[2].strip() for line in names if line.startswith("model name")]
    return named[0] if named else platform.processor() or platform.machine()


def facts(device: torch.device, command: str, rounds: int) -> Result:
    """Return date, hardware, versions and command of a measurement."""
    cuda = device.type == "cuda"
    return {
        "date": datetime.date.today().isoformat(),
        "hardware": torch.cuda.get_device_name(device) if cuda else f"{processor()}, {os.cpu_count()} cores, one used",
        "capability": "sm_{}{}".format(*torch.cuda.get_device_capability(device))
        if cuda
        else torch.backends.cpu.get_cpu_capability(),
        "load": [round(load, 1) for load in os.getloadavg()],
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "timm": timm.__version__,
            **({"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()} if cuda else {}),
        },
        "command": command,
        "rounds": rounds,
    }


def cell(found: Result) -> str:
    """Return median, quartiles, and memory where it was measured, as text."""
    text = f"{found['median']:.2f} ({found['q1']:.2f}-{found['q3']:.2f})"
    return text if found.get("memory") is None else f"{text}; memory {found['memory']:.2f}"


def progress(result: Result) -> str:
    """Return one line for a row that has just been measured."""
    start = f"{result['row']}, {PASSES[result['backward']]}, {result['dtype']} {result['mode']}: "
    if "error" in result:
        return start + result["error"]
    doubt = "" if result["valid"] else f"? (again {result['control']['median']:.3f}) "
    ratios = ", ".join(f"{found['variant']}/{found['over']} {found['median']:.2f}" for found in result["ratios"])
    return f"{start}{result['base']} {result['base_ms']:.2f} ms; {doubt}{ratios}"


def table(lines: Iterable[Iterable[str]]) -> str:
    """Return lines of cells as a Markdown table; the first line is the head."""
    head, *body = (f"| {' | '.join(line)} |" for line in lines)
    return "\n".join([head, "|" + " --- |" * (head.count("|") - 1), *body])


def target_lines(results: list[Result]) -> Iterator[list[str]]:
    """Yield every goal beside what was measured."""
    yield ["row", "ratio", "pass", "run", "target", "measured", ""]
    for result in results:
        for goal in goals(result) if "error" not in result else ():
            ratio = f"{goal['variant']} / {goal['over']}" + (", memory" if goal["of"] == "memory" else "")
            run = f"{result['dtype']} {result['mode']}"
            verdict = ("met" if goal["met"] else "missed") + ("" if result["valid"] else " ?")
            verdict += f": {goal['reason']}" if goal["reason"] else ""
            numbers = [f"{goal['limit']:.2f}", f"{goal['measured']:.3f}", verdict]
            yield [result["row"], ratio, PASSES[result["backward"]], run, *numbers]


def ratio_lines(results: list[Result]) -> Iterator[list[str]]:
    """Yield all ratios of one dtype and mode, the passes side by side."""
    yield ["row", "ratio", *PASSES.values()]
    for name in dict.fromkeys(result["row"] for result in results):
        both = {result["backward"]: result for result in results if result["row"] == name}
        columns: dict[str, dict[bool, str]] = {}
        for backward, result in both.items():
            if "error" in result:
                columns.setdefault("", {})[backward] = result["error"]
                continue
            base, doubt = result["base"], "" if result["valid"] else " ?"
            size = f"; {result['base_bytes'] / 2**20:.1f} MiB" if result.get("base_bytes") else ""
            columns.setdefault(base, {})[backward] = f"{result['base_ms']:.2f} ms{size}"
            columns.setdefault(f"{base} again", {})[backward] = cell(result["control"]) + doubt
            for found in result["ratios"]:
                columns.setdefault(f"{found['variant']} / {found['over']}", {})[backward] = cell(found)
        for line, (ratio, cells) in enumerate(columns.items()):
            yield [name if line == 0 else "", ratio, *(cells.get(backward, "") for backward in PASSES)]


def page(measured: Result) -> str:
    """Return the Markdown page."""
    versions = ", ".join(f"{name} {version}" for name, version in measured["versions"].items())
    results = measured["rows"]
    parts = [
        "# Speed",
        f"{measured['date']}; {measured['hardware']} ({measured['capability']}); {versions}; "
        f"{measured['rounds']} rounds; load {measured['load'][0]} at the start.",
        f"    {measured['command']}",
        NOTES,
    ]
    targets = list(target_lines(results))
    if len(targets) > 1:
        parts += ["## Targets", table(targets)]
    for run in dict.fromkeys((result["dtype"], result["mode"]) for result in results):
        chosen = [result for result in results if (result["dtype"], result["mode"]) == run]
        parts += [f"## {', '.join(run)}", table(ratio_lines(chosen))]
    return "\n\n".join(parts) + "\n"


def write(measured: Result, folder: Path) -> None:
    """Write speed.json and speed.md."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "speed.json").write_text(json.dumps(measured, indent=1) + "\n")
    (folder / "speed.md").write_text(page(measured))
