"""Which version of an operation runs, without any kernel."""

import importlib.util
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

from visionpos import kernels
from visionpos.kernels import choose

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _as_before(monkeypatch):
    monkeypatch.setattr(choose, "_selftests", {})
    monkeypatch.setattr(choose, "_choices", {})
    monkeypatch.setattr(choose, "_kernels", dict(choose._kernels))
    with kernels.use("auto"):
        yield


def buffer():
    angles = torch.zeros(1, 5, 4)
    return torch.randn(2, 5, 3, 3, 8), torch.stack([angles.cos(), angles.sin()]), "half"


def doubler(fused, **options):
    """The operation 2 x, of x with a gradient."""
    return choose.Kernel(
        "doubler",
        reference=lambda x: 2 * x,
        fused=fused,
        why_unsupported=lambda x: "",
        compile_key=lambda x: (x.shape[-1],),
        example=lambda device, dtype, size: (torch.ones(3, size, device=device, dtype=dtype).requires_grad_(),),
        **options,
    )


def test_on_a_cpu_the_plain_version_runs():
    q, k, v = kernels.rotate_qkv(*buffer())
    assert q.shape == k.shape == v.shape == (2, 3, 5, 8)
    assert kernels.report() == {"rotate_qkv": "plain: the tensors are on cpu, not on cuda"}
    with kernels.use("plain"):
        assert not kernels.rotate_qkv.runs(*buffer())
        assert kernels.report() == {"rotate_qkv": "plain: kernels.use('plain')"}
    assert kernels.mode() == "auto"


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter runs them")
def test_fused_where_it_cannot_run_is_one_line():
    kernels.use("fused")
    with pytest.raises(ValueError, match=r"^kernels.use\('fused'\): rotate_qkv cannot run fused: .* on cuda, got cpu$"):
        kernels.rotate_qkv(*buffer())


@pytest.mark.unhooked
def test_a_wrong_mode_is_one_line():
    with pytest.raises(ValueError, match=r"^kernels.use\(mode\) must be one of auto, plain, fused, got 'fast'$"):
        kernels.use("fast")
    assert kernels.mode() == "auto"


def test_environment_variable_and_what_is_imported():
    code = (
        "import sys, torch; import visionpos.kernels as kernels; print(kernels.mode())\n"
        "kernels.rotate_qkv(torch.ones(1, 2, 3, 1, 4), torch.ones(2, 1, 2, 2), 'half')\n"
        "assert not any(name.startswith('visionpos') and name.endswith(('_triton', '_flex')) for name in sys.modules)"
    )
    environment = {**os.environ, choose.VARIABLE: "plain", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert (done.stdout, done.returncode) == ("plain\n", 0), done.stderr


def test_a_wrong_environment_variable_is_one_line(monkeypatch):
    monkeypatch.setenv(choose.VARIABLE, "fast")
    spec = importlib.util.spec_from_file_location("visionpos.kernels.choose_again", choose.__file__)
    with pytest.raises(
        ValueError, match="^the environment variable VISIONPOS_KERNELS must be one of auto, plain, fused"
    ):
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


def test_a_kernel_that_agrees_is_used():
    kernel = doubler(lambda x: x + x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert choose.selftest(kernel, CPU, torch.float32, (4,)) == ""


def wrong_gradient(x):
    return 2 * x.detach() + 0 * x


def broken(x):
    raise RuntimeError("no image for this device\nand a long story")


@pytest.mark.parametrize(
    ("fused", "message"),
    [
        (lambda x: 2 * x + 1, "it differs from the plain version by 5.0e-01 of its largest value"),
        (lambda x: x * float("nan"), "it differs from the plain version by inf"),
        (wrong_gradient, "it differs from the plain version by 1.0e[+]00"),
        (broken, "RuntimeError: no image for this device$"),
    ],
)
def test_a_kernel_that_is_wrong_warns_once_and_is_not_used(fused, message):
    calls = []
    kernel = doubler(lambda x: calls.append(x) or fused(x))
    with torch.inference_mode(), pytest.warns(UserWarning, match=message) as caught:
        assert choose.selftest(kernel, CPU, torch.float32, (4,))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert choose.selftest(kernel, CPU, torch.float32, (4,))
    assert (len(caught), len(calls)) == (1, 1)
    assert "the fused kernel doubler (cpu, torch.float32, (4,)) is not used" in str(caught[0].message)
    assert "\n" not in str(caught[0].message)


def test_auto_goes_by_the_selftest(monkeypatch):
    """With the CPU in place of a GPU."""
    monkeypatch.setattr(choose, "considered", lambda x: True)
    state = torch.get_rng_state()
    good, x = doubler(lambda x: x + x), torch.ones(2, 4)
    assert good.runs(x)
    bad = doubler(wrong_gradient)
    assert good.runs(x)  # one selftest for a name and its compile_key
    with pytest.warns(UserWarning, match="doubler"):
        assert not bad.runs(torch.ones(2, 5))
    assert torch.equal(bad(torch.ones(2, 5)), torch.full((2, 5), 2.0))
    assert kernels.report()["doubler"].startswith("plain: it differs")
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.unhooked
def test_a_selftest_while_a_graph_is_traced(monkeypatch):
    monkeypatch.setattr(choose, "considered", lambda x: True)
    kernel = doubler(lambda x: x + x + 1)
    compiled = torch.compile(lambda x: kernel(x), fullgraph=True, backend="eager")
    with pytest.warns(UserWarning, match="doubler"):
        assert torch.equal(compiled(torch.ones(2, 4)), torch.full((2, 4), 2.0))


@pytest.mark.unhooked
def test_a_kernel_that_compiles_is_not_tried_while_a_graph_is_traced(monkeypatch):
    """A backward pass compiled inside it would write into the metrics of the outer one, which torch 2.11 refuses."""
    monkeypatch.setattr(choose, "considered", lambda x: True)
    tried = []
    inner = torch.compile(lambda x: x + x, backend="eager")
    kernel = doubler(lambda x: (x + x) if torch.compiler.is_compiling() else tried.append(1) or inner(x), compiles=True)
    x = torch.randn(2, 4, requires_grad=True)
    compiled = torch.compile(lambda x: kernel(x), fullgraph=True, backend="eager")
    assert torch.equal(compiled(x), 2 * x)
    assert tried == []
    assert kernels.report()["doubler"] == "fused"
    assert kernel.runs(x)  # outside of a trace it is
    assert tried == [1]


@pytest.mark.unhooked
def test_what_a_selftest_found_holds_in_a_trace(monkeypatch):
    monkeypatch.setattr(choose, "considered", lambda x: True)
    kernel, x = doubler(lambda x: x + x + 1, compiles=True), torch.ones(2, 4)
    with pytest.warns(UserWarning, match="doubler"):
        assert torch.equal(kernel(x), 2 * x)
    assert torch.equal(torch.compile(lambda x: kernel(x), fullgraph=True, backend="eager")(x), 2 * x)


def test_flex_attention_compiles():
    assert choose._kernels["coordinate_attention"].compiles
    assert not choose._kernels["rotate_qkv"].compiles  # kernels of Triton are tried wherever they are used first
    assert not choose._kernels["window_attention"].compiles


@pytest.mark.parametrize(
    ("dtype", "error", "used"),
    [(torch.float32, 5e-4, True), (torch.float64, 3e-3, False), (torch.float16, 3e-3, True),
     (torch.float16, 2e-2, False), (torch.bfloat16, 2e-2, True), (torch.bfloat16, 5e-2, False)],
)  # fmt: skip
def test_how_far_a_kernel_may_be_off(dtype, error, used):
    kernel = doubler(lambda x: (2 + 2 * error) * x)
    with warnings.catch_warnings():
        warnings.simplefilter("error" if used else "ignore")
        assert (choose.selftest(kernel, CPU, dtype, (4,)) == "") is used


@pytest.mark.unhooked
def test_a_change_of_mode_reaches_compiled_graphs(monkeypatch):
    monkeypatch.setattr(choose, "missing_triton", lambda: "")
    kernel = doubler(lambda x: x + x + 1)
    compiled = torch.compile(lambda x: kernel(x), fullgraph=True, backend="eager")
    for mode, expected in (("plain", 2.0), ("fused", 3.0), ("plain", 2.0)):
        with kernels.use(mode):
            assert torch.equal(compiled(torch.ones(2, 4)), torch.full((2, 4), expected))


def test_transformed_functions_stay_plain(monkeypatch):
    monkeypatch.setattr(choose, "considered", lambda x: True)
    kernel = doubler(lambda x: x + x + 1)
    assert torch.equal(torch.func.vmap(kernel)(torch.ones(2, 4)), torch.full((2, 4), 2.0))
    assert kernels.report()["doubler"] == "plain: functions are traced or transformed"


@pytest.mark.unhooked
def test_exported_programs_stay_plain(monkeypatch):
    monkeypatch.setattr(choose, "considered", lambda x: True)

    class Doubled(torch.nn.Module):
        def forward(self, x):
            return kernel(x)

    kernel = doubler(lambda x: x + x + 1)
    exported = torch.export.export(Doubled(), (torch.ones(2, 4),)).module()
    assert torch.equal(exported(torch.ones(2, 4)), torch.full((2, 4), 2.0))
    assert kernels.report()["doubler"] == "plain: an exported program should not need this library"
