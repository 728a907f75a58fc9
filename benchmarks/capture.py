"""Which encodings train inside a captured CUDA graph, and in how many milliseconds a step.

Command   python -m benchmarks.capture [--encodings none rope_axial] [--output FILE.json]
Clock     a step of forward and backward under bf16, replayed (`mode="reduce-overhead"`), batch 128, two layers; on a
          CPU a compiled step without a graph, batch 2

Each is one row: milliseconds, or what went wrong.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch

import visionpos as vp
from benchmarks.report import facts
from visionpos import kernels

OPTIONS = {
    "img_size": 32, "patch_size": 4, "embed_dim": 192, "depth": 2, "num_heads": 6, "num_classes": 10,
    "class_token": False, "global_pool": "avg",
}  # fmt: skip
DEFAULT = ("none", "rope_axial", "alibi2d", "lookhere", "t5", "fire", "string", "liere", "comrope")
STEPS = 50


def milliseconds(encoding: str, device: torch.device) -> float:
    """Return the milliseconds of a training step."""
    gpu = device.type == "cuda"
    torch.compiler.reset()
    model = vp.create_model("vit_tiny_patch16_224", encoding=encoding, **OPTIONS).to(device)
    compiled = torch.compile(model, mode="reduce-overhead" if gpu else "default", dynamic=False)
    x = torch.randn(128 if gpu else 2, 3, 32, 32, device=device)

    def steps(count: int) -> float:
        started = time.perf_counter()
        for _ in range(count):
            if gpu:
                torch.compiler.cudagraph_mark_step_begin()
            with torch.autocast(device.type, torch.bfloat16):
                loss = compiled(x).float().square().mean()
            model.zero_grad()
            loss.backward()
        loss.item()
        return (time.perf_counter() - started) / count * 1000

    steps(5)
    return steps(STEPS if gpu else 1)


def main() -> None:
    """Print and write down a row for each encoding."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encodings", nargs="+")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows = []
    for encoding in args.encodings or (DEFAULT if device.type == "cuda" else DEFAULT[:2]):
        started = time.perf_counter()
        try:
            row = {"encoding": encoding, "ms": milliseconds(encoding, device), "kernels": kernels.report()}
        except Exception as error:  # of any kind: a compiler or a driver may raise what it likes
            row = {"encoding": encoding, "error": f"{type(error).__name__}: {str(error).strip()[:300]}"}
        rows.append(row | {"seconds": round(time.perf_counter() - started, 1)})
        print(rows[-1], flush=True)
        if args.output:  # after every row: what is there stays, whatever comes
            content = {"rows": rows, "facts": facts(device, "python -m benchmarks.capture", STEPS)}
            args.output.write_text(json.dumps(content, indent=1))
    raise SystemExit(any("error" in row for row in rows))


if __name__ == "__main__":
    main()
