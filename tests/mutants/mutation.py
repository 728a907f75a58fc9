"""Hand-made mutants of the numerics, and the runner that looks whether the fast tests notice them.

A mutant is one wrong line, as someone might write it. The package and its tests are copied, the line is put into the
copy, and the named tests must fail there. Nothing here imports visionpos: a mutant's process must import its own copy.
"""

from __future__ import annotations

import contextlib
import io
import multiprocessing
import os
import shutil
import sys
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
KILLED, SURVIVED = int(pytest.ExitCode.TESTS_FAILED), int(pytest.ExitCode.OK)


@dataclass(frozen=True)
class Mutant:
    """One wrong line.

    Args:
        name: what is wrong.
        file: path inside visionpos/.
        old: text of the file, exactly once in it.
        new: what stands there instead.
        tests: files inside tests/ that should notice.
    """

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.file}: {self.name}"

    def source(self, root: Path = REPOSITORY) -> str:
        """The file with the wrong line in it.

        Raises:
            ValueError: the old text is not there exactly once: the table must follow the code.
        """
        text = (root / "visionpos" / self.file).read_text()
        if text.count(self.old) != 1:
            raise ValueError(f"{self}: {self.old!r} occurs {text.count(self.old)} times, not once")
        return text.replace(self.old, self.new)


def mutants_of(file: str, tests: str, changes: Iterable[tuple[str, str, str]]) -> list[Mutant]:
    """The mutants of one file; `changes` are (name, old, new), `tests` names separated by blanks."""
    return [Mutant(name, file, old, new, tuple(tests.split())) for name, old, new in changes]


@contextlib.contextmanager
def copy_of_package(mutant: Mutant | None) -> Iterator[Path]:
    """A temporary directory with visionpos, its tests, and the mutant's line; None: as they are."""
    with tempfile.TemporaryDirectory(prefix="mutant-") as folder:
        root = Path(folder)
        for name in ("visionpos", "tests"):
            shutil.copytree(REPOSITORY / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(REPOSITORY / "pyproject.toml", root)
        if mutant is not None:
            (root / "visionpos" / mutant.file).write_text(mutant.source(root))
        yield root


def run_tests(mutant: Mutant | None, tests: tuple[str, ...]) -> tuple[int, str]:
    """Exit status and output of pytest on a copy. For a process of its own: changes sys.path and what is imported."""
    assert "visionpos" not in sys.modules
    output = io.StringIO()
    with copy_of_package(mutant) as root, contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        os.chdir(root)
        sys.path[:] = [str(root), *(path for path in sys.path if Path(path).resolve() != REPOSITORY)]
        files = [str(root / "tests" / test) for test in tests]
        options = ["-x", "-q", "-m", "not slow and not unhooked", "-p", "no:cacheprovider", "--rootdir", str(root)]
        status = int(pytest.main([*options, "-c", str(root / "pyproject.toml"), *files]))
        assert Path(sys.modules["visionpos"].__file__).is_relative_to(root), "the tests ran on another copy"
        os.chdir(REPOSITORY)
    return status, output.getvalue()


def run_all(jobs: list[tuple[Mutant | None, tuple[str, ...]]], workers: int | None = None) -> Iterator[tuple[int, str]]:
    """`run_tests` of all jobs, each in a process of its own, forked from one that has imported torch and timm."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["timm", "pytest"])
    with ProcessPoolExecutor(workers or os.cpu_count(), mp_context=context, max_tasks_per_child=1) as pool:
        yield from pool.map(run_tests, *zip(*jobs, strict=True))


def survivors(mutants: list[Mutant], report=lambda line: None) -> list[Mutant]:
    """The mutants that the tests they name do not notice.

    Raises:
        RuntimeError: the tests fail without any mutant, or a mutant cannot even be imported.
    """
    everything = tuple(sorted({test for mutant in mutants for test in mutant.tests}))
    jobs = [(None, everything), *((mutant, mutant.tests) for mutant in mutants)]
    results = run_all(jobs)
    status, output = next(results)
    if status != SURVIVED:
        raise RuntimeError(f"the tests fail without a mutant:\n{output}")
    alive = []
    for mutant, (status, output) in zip(mutants, results, strict=True):
        if status not in (KILLED, SURVIVED):
            raise RuntimeError(f"{mutant}: pytest ended with {status}, neither passed nor failed:\n{output}")
        report(f"{'SURVIVED' if status == SURVIVED else 'killed':9} {mutant}")
        if status == SURVIVED:
            alive.append(mutant)
    return alive
