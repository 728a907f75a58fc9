"""The kernels compiled for a GPU of compute capability 9.0, which need not be there: nothing spills."""

import re
import subprocess
from pathlib import Path

import pytest

triton = pytest.importorskip("triton")

pytestmark = [pytest.mark.slow, pytest.mark.unhooked]

TOOL = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
HALF = {"QKV", "OUT", "GRAD", "GRAD_QKV", "Q", "K", "V"}
FLOAT = {"BIAS", "GRAD_BIAS", "COS", "SIN"}
UNALIGNED = {"H", "W", "T", "num_windows"}  # numbers that need not be multiples of 16


def resources(kernel, constants, num_warps, path, dtype="bf16"):
    """Registers of a thread, bytes of its stack and of its local memory, and the program."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature, attributes = {}, {}
    for index, name in enumerate(kernel.arg_names):
        pointer = f"*{dtype}" if name in HALF else "*fp32" if name in FLOAT else None
        signature[name] = "constexpr" if name in constants else pointer or ("fp32" if name == "scale" else "i32")
        if name not in constants and name not in UNALIGNED and name != "scale":
            attributes[index,] = [["tt.divisibility", 16]]
    places = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    source = ASTSource(kernel, signature, places, attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": num_warps})
    path.write_bytes(compiled.asm["cubin"])
    usage = subprocess.run([TOOL, "-res-usage", path], capture_output=True, text=True, check=True).stdout
    print(kernel.fn.__name__, constants, dtype, usage.splitlines()[-1])
    return *(int(re.search(rf"{what}:(\d+)", usage)[1]) for what in ("REG", "STACK", "LOCAL")), compiled.asm["ptx"]


@pytest.mark.skipif(not TOOL.exists(), reason="no cuobjdump beside triton")
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("window", [(7, 7), (8, 8), (4, 8)])
def test_window_attention(window, dtype, tmp_path):
    from visionpos.kernels.window_triton import backward_kernel, forward_kernel

    (h, w), size = window, 64 if window[0] > 4 else 32
    constants = {"HEADS": 3, "D": 32, "C": 32, "WH": h, "WW": w, "SY": h // 2, "SX": w // 2, "M": size, "SPLIT": 176}
    for kernel in (forward_kernel, backward_kernel):
        _, stack, local, _ = resources(kernel, constants, 4, tmp_path / "cubin", dtype)
        assert (stack, local) == (0, 0)


@pytest.mark.skipif(not TOOL.exists(), reason="no cuobjdump beside triton")
@pytest.mark.parametrize("layout", ["interleaved", "half"])
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_rotation(dtype, layout, tmp_path):
    from visionpos.kernels.rotation_triton import rotate_pairs

    interleaved = layout == "interleaved"
    constants = {"PARTS": 3, "HEADS": 6, "PAIRS": 32, "INTERLEAVED": interleaved, "SIGN": -1.0, "BLOCK": 1024}
    registers, stack, local, program = resources(rotate_pairs, constants, 4, tmp_path / "cubin", dtype)
    assert (stack, local) == (0, 0)
    assert registers <= 64
    assert set(re.findall(r"(?:ld|st)\.global\S*?\.(v\d\.b\d+|b\d+)", program)) == {"v4.b32"}  # 16 bytes
