"""Speed and memory, each as a ratio to something measured in the same run."""

import os

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # torch's profiler, which sees the memory, is silent
