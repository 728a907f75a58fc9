"""Which version of an operation runs: the plain one, in PyTorch, which defines it, or the fused kernel."""

from __future__ import annotations

import importlib.util
import os
import threading
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from ..materialize import is_plain_eager

Mode = Literal["auto", "plain", "fused"]
MODES = ("auto", "plain", "fused")
VARIABLE = "VISIONPOS_KERNELS"


def _valid(mode: str, source: str) -> str:
    if mode not in MODES:
        raise ValueError(f"{source} must be one of {', '.join(MODES)}, got {mode!r}")
    return mode


_mode = _valid(os.environ.get(VARIABLE, "auto"), f"the environment variable {VARIABLE}")
TOLERANCE = 1e-3  # of float32, relative to the largest value: a few times the plain version's own error
HALF_TOLERANCES = {torch.float16: 5e-3, torch.bfloat16: 3e-2}
one_thread = threading.Lock()  # at a time may change, for a call, what torch has set for the whole process
_kernels: dict[str, Kernel] = {}
_selftests: dict[tuple, str] = {}  # what the first use of a kernel found: "" or what was wrong
_choices: dict[str, str] = {}


class use:
    """Say which kernels run from now on, in the whole process; in a `with` statement, until its end.

    auto: fused kernels for tensors on CUDA where dtypes and shapes fit, the plain versions elsewhere. The first use of
        a kernel on a device with a dtype and shape is tried out against the plain version; if they disagree, a warning
        says so, and the plain version is used.
    plain: never a fused kernel; Triton is not imported.
    fused: fused kernels wherever an operation has one, and a ValueError where it cannot run.

    The environment variable VISIONPOS_KERNELS, read at import, says where to start; without it, "auto".

    Raises:
        ValueError: another word.
    """

    def __init__(self, mode: Mode):
        global _mode
        self.before, _mode = _mode, _valid(mode, "kernels.use(mode)")

    def __enter__(self) -> None:
        """Chosen already."""

    def __exit__(self, *error) -> None:
        global _mode
        _mode = self.before


def mode() -> Mode:
    """Return what `use` said last: "auto", "plain" or "fused"."""
    return _mode


def report() -> dict[str, str]:
    """Return the last choice for every operation that was asked for: "fused", or "plain: " and the reason."""
    return dict(_choices)


@dataclass(frozen=True)
class Kernel:
    """An operation in two versions. All but `example` are functions of the same arguments, the first one a tensor.

    Args:
        name: in `report` and in messages.
        reference: the version that defines it.
        fused: the same as a kernel. Imports Triton when called, not before.
        why_unsupported: in one clause, why the kernel cannot run; "" where it can.
        compile_key: numbers and words that the kernel is compiled for; a selftest holds for one set of them.
        example: (device, dtype, *compile_key) -> small arguments for a selftest.
        compiles: the fused version calls torch.compile, which must not start while another graph is traced: there it is
            trusted without a selftest.
    """

    name: str
    reference: Callable[..., Any]
    fused: Callable[..., Any]
    why_unsupported: Callable[..., str]
    compile_key: Callable[..., tuple]
    example: Callable[..., tuple]
    compiles: bool = False

    def __post_init__(self):
        _kernels[self.name] = self

    def runs(self, *args) -> bool:
        """Return whether a call with these arguments runs the fused kernel.

        Raises:
            ValueError: `use("fused")`, and it cannot.
        """
        x = args[0]
        if not considered(x):
            return choose(self.name, _mode, x.device, x.dtype)
        compiling = torch.compiler.is_compiling()
        reason = self.why_unsupported(*args) if compiling or is_plain_eager() else "functions are traced or transformed"
        return choose(self.name, _mode, x.device, x.dtype, reason, self.compile_key(*args), compiling)

    def __call__(self, *args):
        """Compute the operation, in the version that `runs` says."""
        return self.fused(*args) if self.runs(*args) else self.reference(*args)


def considered(x: Tensor) -> bool:
    """Return whether fused kernels are considered for x at all: on CUDA under "auto", always under "fused"."""
    return _mode == "fused" or (_mode == "auto" and x.device.type == "cuda")


@torch.compiler.assume_constant_result  # a compiled graph holds what was chosen when it was traced, for its mode
def choose(
    name: str,
    mode: str,
    device: torch.device,
    dtype: torch.dtype,
    reason: str = "",
    compile_key: tuple | None = None,
    compiling: bool = False,
) -> bool:
    """Return whether the fused kernel runs, and note it for `report`. A key is given where it is considered."""
    if compile_key is None:
        reason = "kernels.use('plain')" if mode == "plain" else f"the tensors are on {device.type}, not on cuda"
    else:
        if torch.compiler.is_exporting():
            reason = "an exported program should not need this library"
        reason = reason or missing_triton()
    if reason and mode == "fused":
        raise ValueError(f"kernels.use('fused'): {name} cannot run fused: {reason}")
    if not reason and mode == "auto":
        key, kernel = (name, device, dtype, compile_key), _kernels[name]
        untried = compiling and kernel.compiles  # another graph is being traced
        reason = _selftests.get(key, "") if untried else selftest(kernel, device, dtype, compile_key)
    _choices[name] = f"plain: {reason}" if reason else "fused"
    return not reason


def missing_triton() -> str:
    """Return why there is no Triton, or ""."""
    return "" if importlib.util.find_spec("triton") else "triton is not installed"


def needs_gpu(x: Tensor) -> str:
    """Return why a Triton kernel cannot run on x, or "". Its interpreter runs kernels on CPU tensors, for tests."""
    if x.device.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1":
        return ""
    return f"it needs tensors on cuda, got {x.device.type}"


def selftest(kernel: Kernel, device: torch.device, dtype: torch.dtype, compile_key: tuple) -> str:
    """Return what is wrong with a kernel, or "", after one run on a small example beside the plain version.

    Outputs and gradients are compared, once for a kernel on a device with a dtype and a key.

    Warns:
        UserWarning: once, in one line, where something is.
    """
    key = (kernel.name, device, dtype, compile_key)
    if key not in _selftests:
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            return "it was not tried out before the capture of a CUDA graph"
        try:
            with torch.inference_mode(False), torch.enable_grad(), torch.autocast(device.type, enabled=False):
                error = disagreement(kernel, kernel.example(device, dtype, *compile_key))
            wrong = (
                ""
                if error <= HALF_TOLERANCES.get(dtype, TOLERANCE)
                else f"it differs from the plain version by {error:.1e} of its largest value"
            )
        except Exception as error:  # of any kind: a compiler or a driver may raise what it likes
            wrong = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
        if wrong:
            what = f"{kernel.name} ({device}, {dtype}, {compile_key})"
            warnings.warn(f"the fused kernel {what} is not used, the plain version is: {wrong}", stacklevel=2)
        _selftests[key] = wrong
    return _selftests[key]


def disagreement(kernel: Kernel, args: tuple) -> float:
    """Return the largest difference of the versions, outputs and gradients, relative to the largest value of each."""
    expected, got = (results(version, args) for version in (kernel.reference, kernel.fused))
    errors = [((a - b).abs().max() / a.abs().max()).item() for a, b in zip(expected, got, strict=True)]
    return max(error if error == error else float("inf") for error in errors)  # NaN is a difference


def results(version: Callable[..., Any], args: tuple) -> list[Tensor]:
    """Return outputs in float32, and the gradients of those arguments that require one, of a sum with fixed weights."""
    args = [arg.detach().clone().requires_grad_(arg.requires_grad) if isinstance(arg, Tensor) else arg for arg in args]
    wanted = [arg for arg in args if isinstance(arg, Tensor) and arg.requires_grad]
    outputs = version(*args)
    outputs = (outputs,) if isinstance(outputs, Tensor) else outputs
    weights = [torch.linspace(-1, 1, out.numel(), device=out.device).view(out.shape).to(out.dtype) for out in outputs]
    gradients = torch.autograd.grad(outputs, wanted, weights) if wanted else ()
    return [x.detach().float() for x in (*outputs, *gradients)]
