"""Short evaluations, and a process to fork from for the tests that kill runs."""

import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import pytest

from tests.training.run.interrupting import prepare
from visionpos.training.run import source


@pytest.fixture(autouse=True)
def _short_evaluations(monkeypatch):
    """A quarter of a position task's pictures to test on; a command in a process of its own has all of them."""
    monkeypatch.setattr(source, "EVALUATION_TASK_SIZE", source.EVALUATION_BATCH_SIZE)


@pytest.fixture(scope="session")
def fresh() -> Iterator[Callable[..., Any]]:
    """Calls a function of a test module in a process that has imported torch and computed nothing."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), prepare) as pool:
            yield lambda function, *args: pool.submit(function, *args).result()
