import os

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # torch's profiler, which sees the memory, is silent
