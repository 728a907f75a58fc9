"""Measurement of one row: modules that do the same work, checked to be equal where they must be, then timed."""

from __future__ import annotations

import copy
import itertools
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.clock import Step, keep_memory, peak_bytes, ratio, take_turns

BAND = 0.97, 1.03  # of the base over itself: a row outside is measured again, then marked
ATTEMPTS = 3
AGAIN = " again"  # name of the base's copy: the name of the base, and this


@dataclass(frozen=True)
class Setting:
    """The way a row is run. bf16 is autocast around float32 weights, as models are trained."""

    device: str
    dtype: str  # "float32" or "bf16"
    mode: str  # "eager" or "compiled"
    backward: bool  # forward and backward in training mode, or forward in eval mode without gradients

    def batch(self, on_cpu: int, on_cuda: int) -> int:
        """Return a batch size that keeps the device busy."""
        return on_cuda if torch.device(self.device).type == "cuda" else on_cpu


@dataclass
class Case:
    """The modules and inputs that a row measures.

    Attributes:
        inputs: of every module.
        modules: by name; the first is the base, which the others are divided by.
        peers: names to the name that they must equal, and are divided by as well.
        depth: layers one after the other, whose roundings add up.
    """

    inputs: tuple[Tensor, ...]
    modules: dict[str, nn.Module]
    peers: dict[str, str] = field(default_factory=dict)
    depth: int = 1

    def tolerance(self, dtype: str) -> float:
        """Return the tolerance of relative differences, in outputs and in gradients of the inputs."""
        return 1e-5 if dtype == "float32" else 1e-2 * self.depth**0.5


@dataclass(frozen=True)
class Row:
    """A row by name; `build` makes its case on the current default device."""

    group: str
    name: str
    build: Callable[[Setting], Case]
    quick: bool = False  # small enough for a few minutes of one core
    cuda: bool = False  # for CUDA devices alone


class Unequal(AssertionError):
    """The error of a module that does not compute what its peer does."""


def input_sets(inputs: tuple[Tensor, ...], device: torch.device) -> list[tuple[Tensor, ...]]:
    """Return the inputs; on CUDA at least three copies in turn, and more than its L2 cache holds."""
    if device.type != "cuda" or not inputs:
        return [inputs]
    size = sum(x.numel() * x.element_size() for x in inputs)
    number = min(max(3, 1 + 2 * torch.cuda.get_device_properties(device).L2_cache_size // size), 32)
    return [tuple(x.detach().clone().requires_grad_(x.requires_grad) for x in inputs) for _ in range(number)]


class Runner:
    """A module and its inputs in a setting: called, it takes one step."""

    def __init__(self, module: nn.Module, sets: list[tuple[Tensor, ...]], setting: Setting):
        self.module, self.setting = module, setting
        self.sets = itertools.cycle(sets)
        self.parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
        self.directions: list[Tensor] = []  # gradients of the outputs

    def forward(self, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Return the outputs, with gradients where the setting wants them."""
        with (
            torch.set_grad_enabled(self.setting.backward),
            torch.autocast(torch.device(self.setting.device).type, torch.bfloat16, self.setting.dtype == "bf16"),
        ):
            out = self.module(*inputs)
        return out if isinstance(out, tuple) else (out,)

    def backward(self, outputs: tuple[Tensor, ...], inputs: tuple[Tensor, ...]) -> list[Tensor]:
        """Return gradients of the inputs; those of all parameters are computed too, and thrown away."""
        wanted = [x for x in inputs if x.requires_grad]
        return list(
            torch.autograd.grad(outputs, [*wanted, *self.parameters], self.directions, allow_unused=True)[: len(wanted)]
        )

    def first(self) -> list[Tensor]:
        """Return the results of the first step, which are looked at."""
        inputs = next(self.sets)
        outputs = self.forward(inputs)
        if not self.setting.backward:
            return list(outputs)
        draw = torch.Generator(outputs[0].device).manual_seed(0)
        self.directions = [torch.randn(x.shape, generator=draw, device=x.device, dtype=x.dtype) for x in outputs]
        return [x.detach() for x in outputs] + self.backward(outputs, inputs)

    def __call__(self) -> None:
        inputs = next(self.sets)
        outputs = self.forward(inputs)
        if self.setting.backward:
            self.backward(outputs, inputs)


def relative_difference(a: Tensor, b: Tensor) -> float:
    """Return |a - b| / |b|, in double precision."""
    a, b = a.double(), b.double()
    return ((a - b).norm() / b.norm()).item()


def check_equal(case: Case, results: dict[str, list[Tensor]], tolerance: float) -> None:
    """Check that every module computes what its peer does.

    Raises:
        Unequal: one does not.
    """
    for name, peer in case.peers.items():
        difference = max(relative_difference(a, b) for a, b in zip(results[name], results[peer], strict=True))
        if not difference <= tolerance:  # NaN is unequal, too
            raise Unequal(f"{name} differs from {peer} by {difference:.1e}, more than {tolerance:.0e}")


def measure(row: Row, setting: Setting, rounds: int) -> dict[str, Any]:
    """Build, check and time a row; the result is ready for JSON.

    Raises:
        Unequal: a module does not compute what its peer does.
    """
    torch.set_num_threads(1)
    keep_memory()
    torch.backends.cudnn.allow_tf32 = False  # of convolutions: equality is asserted in float32
    if setting.mode == "compiled":
        torch._dynamo.config.recompile_limit = 1000  # beyond it rows would run eagerly without a word
    torch.manual_seed(0)
    device = torch.device(setting.device)
    with device:
        case = row.build(setting)
    base = next(iter(case.modules))
    case.modules[base + AGAIN] = copy.deepcopy(case.modules[base])
    sets = input_sets(case.inputs, device)
    steps: dict[str, Step] = {}
    results: dict[str, list[Tensor]] = {}
    for name, module in case.modules.items():
        module.train(setting.backward)
        module = torch.compile(module, dynamic=False) if setting.mode == "compiled" else module
        steps[name] = runner = Runner(module, sets, setting)
        results[name] = runner.first()
    check_equal(case, results, case.tolerance(setting.dtype))
    del results
    attempts, valid = 0, False
    while not valid and attempts < ATTEMPTS:
        times = take_turns(steps, device, rounds)
        control = ratio(times, base + AGAIN, base)
        attempts, valid = attempts + 1, BAND[0] <= control.median <= BAND[1]
    memory = {name: peak_bytes(step, device) for name, step in steps.items()}
    pairs = [(name, base) for name in case.modules if name not in (base, base + AGAIN)]
    pairs += [(name, peer) for name, peer in case.peers.items() if peer != base]
    return {
        "row": row.name,
        "group": row.group,
        **asdict(setting),
        "inputs": [tuple(x.shape) for x in case.inputs],
        "base": base,
        "base_ms": 1000 * statistics.median(times[base]),
        "base_bytes": memory[base],
        "control": asdict(control),
        "valid": valid,
        "attempts": attempts,
        "ratios": [
            {
                "variant": name,
                "over": over,
                **asdict(ratio(times, name, over)),
                "memory": memory[name] / memory[over] if memory[over] else None,
            }
            for name, over in pairs
        ],
    }
