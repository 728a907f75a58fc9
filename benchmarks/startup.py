"""Measure the CPU seconds until a command has said something: help, a list, or that there is a mistake.

Command   python -m benchmarks.startup [--rounds 5]
Clock     user and system time of a fresh process with one thread; the median and the extremes of the rounds
Measured  on a busy 2-core CPU, 3 rounds: import torch 2.3, import timm 5.0, the first public name of visionpos 6.0;
          visionpos list 2.8, every --help and a mistake 0.1 to 0.3, sweep --dry-run 6.3
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import subprocess
import sys

MISTAKE = ["--config", "configs/run/vit_cifar10_small.yaml", "--recipe.lr", "-1"]
SCRIPTS = ("classify", "pretrain_mae", "evaluate", "probe", "predict", "sweep", "report", "demo")
COMMANDS = {
    "import torch": ["-c", "import torch"],
    "import timm": ["-c", "import timm"],
    "import visionpos": ["-c", "import visionpos"],
    "its first public name": ["-c", "import visionpos; visionpos.Positions"],
    "visionpos --help": ["-m", "visionpos", "--help"],
    "visionpos list": ["-m", "visionpos", "list"],
    **{f"{script} --help": ["-m", f"train.{script}", "--help"] for script in SCRIPTS},
    "classify with a mistake": ["-m", "train.classify", *MISTAKE],
    "sweep --dry-run": ["-m", "train.sweep", "configs/sweep/direction_small.yaml", "--dry-run"],
}


def seconds(arguments: list[str]) -> float:
    """Return the CPU seconds of one process."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, check=False)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    print("| command | CPU seconds | lowest | highest |\n|---|---|---|---|")
    for name, arguments in COMMANDS.items():
        each = [seconds(arguments) for _ in range(rounds)]
        print(f"| {name} | {statistics.median(each):.1f} | {min(each):.1f} | {max(each):.1f} |")


if __name__ == "__main__":
    main()
