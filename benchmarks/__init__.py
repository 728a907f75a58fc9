"""Ratios of times and of memory, measured in one run: `python -m benchmarks.speed` and the scripts beside it."""

import os

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # torch's profiler, which sees the memory, is silent
