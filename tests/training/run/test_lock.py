"""The lock of a directory, between processes."""

import multiprocessing
import os
import signal
import socket
import time
from pathlib import Path

import pytest

from visionpos.training.errors import ConfigError
from visionpos.training.run.lock import hold, holder

fork = multiprocessing.get_context("fork")


def hold_for_long(folder, ready, with_child):
    with hold(folder) as ours:
        child = os.fork() if with_child else None
        if child != 0:
            ready.send((ours, child))
        time.sleep(60)


def start(folder, with_child=False):
    """A process that has locked the folder, and its child's number."""
    ready, theirs = fork.Pipe()
    process = fork.Process(target=hold_for_long, args=(folder, theirs, with_child))
    process.start()
    ours, child = ready.recv()
    assert ours
    return process, child


def kill(process):
    os.kill(process.pid, signal.SIGKILL)
    process.join()


def test_one_process_at_a_time_and_none_after_it_is_killed(tmp_path):
    process, _ = start(tmp_path / "run")
    with hold(tmp_path / "run") as ours:
        assert not ours
    assert holder(tmp_path / "run").startswith(f"pid {process.pid} on ")
    kill(process)
    assert holder(tmp_path / "run") is None
    with hold(tmp_path / "run") as ours:
        assert ours


def test_a_child_that_outlives_the_holder_has_no_lock(tmp_path):
    process, child = start(tmp_path, with_child=True)
    assert holder(tmp_path) is not None
    kill(process)
    os.kill(child, 0)  # it is alive
    assert holder(tmp_path) is None
    os.kill(child, signal.SIGKILL)


def test_a_process_does_not_lose_its_lock_by_asking_again(tmp_path):
    with hold(tmp_path) as outer:
        assert outer
        with hold(tmp_path) as inner:
            assert inner
        assert holder(tmp_path).startswith(f"pid {os.getpid()} on ")
        ready, theirs = fork.Pipe()
        other = fork.Process(target=ask, args=(tmp_path, theirs))
        other.start()
        assert ready.recv()
        other.join()
    assert holder(tmp_path) is None


def ask(folder, ready):
    from visionpos.training.run import lock

    lock._ours.clear()  # a fork knows what its parent holds, another program does not
    with hold(folder) as ours:
        ready.send(not ours and holder(folder) == f"pid {os.getppid()} on {socket.gethostname()}")


def test_asking_makes_nothing(tmp_path):
    assert holder(tmp_path / "run") is None
    assert not (tmp_path / "run").exists()


def test_where_nothing_can_be_written_there_is_one_line():
    with pytest.raises(ConfigError, match="output: cannot write to /proc/nowhere"), hold(Path("/proc/nowhere")):
        pass
