"""kill -9 at any moment: the run, started again, ends as if nothing had been."""

import random
import signal
from pathlib import Path

import pytest

from tests.training.run.interrupting import (
    KILL,
    KINDS,
    POINTS,
    at,
    config_of,
    count_hits,
    differences,
    outcome,
    run,
    send,
)

KILLS_OF_A_RUN = 4


def kill_and_continue(kind: str, folder: Path, points: list[str], rounds: int, seed: int) -> int:
    """Kill runs at each of the points, `rounds` times, and let them end; returns the number of kills."""
    draw, hits = random.Random(seed), count_hits(config_of(kind, folder / "whole"))
    assert all(hits.values()), hits
    whole = outcome(folder / "whole")
    plan = [point for _ in range(rounds) for point in draw.sample(points, len(points))]
    kills = runs = 0
    while kills < len(plan):
        runs += 1
        config = config_of(kind, folder / f"run {runs}")
        for _ in range(KILLS_OF_A_RUN):
            if kills == len(plan):
                break
            point = plan[kills]
            code = run(config, at(point, draw.randint(1, 1 + hits[point] // 2), KILL))
            if code == 0:  # the point is behind it
                break
            assert code == -signal.SIGKILL
            kills += 1
        assert run(config) == 0
        assert not differences(outcome(folder / f"run {runs}"), whole), plan[:kills]
    return kills


@pytest.mark.parametrize("turn", range(len(KINDS)))
def test_a_killed_run_ends_bit_identical(turn, fresh, tmp_path):
    """Killed once at every point, a third of which falls to each kind of run."""
    points = list(POINTS)[turn :: len(KINDS)]
    assert fresh(kill_and_continue, list(KINDS)[turn], tmp_path, points, 1, 0) == len(points) >= 4


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_run_killed_again_and_again_ends_bit_identical(kind, fresh, tmp_path):
    assert fresh(kill_and_continue, kind, tmp_path, list(POINTS), 5, 1) == 5 * len(POINTS) >= 70


TRAINING = list(POINTS)[:9]  # the first three in a step; a signal that comes after the last save lets the run end


def stop_and_continue(kind: str, folder: Path, stops: int, seed: int) -> int:
    """Stop runs by signals during training, until there are `stops`; returns how many came between evaluations."""
    draw, hits = random.Random(seed), count_hits(config_of(kind, folder / "whole"))
    whole = outcome(folder / "whole")
    done = runs = between = 0
    while done < stops:
        runs += 1
        name, text = folder / f"run {runs}", folder / f"run {runs}.txt"
        code = 1
        while code:
            point, number = draw.choice(TRAINING[: 9 if done % 3 else 3]), draw.choice([signal.SIGTERM, signal.SIGINT])
            code = run(config_of(kind, name), at(point, draw.randint(1, hits[point] // 2), send(number)), text=text)
            if code:
                done += 1
                newest = max((name / "checkpoints").iterdir()).name
                step = int(newest.removeprefix("step-"))
                between += step % (2 if kind == "task" else 3) > 0
                assert code == 128 + number
                line = f"stopped by {number.name} after step {step}, which is saved"
                assert text.read_text().splitlines()[-1] == line
        assert not differences(outcome(name), whole), seed
    return between


@pytest.mark.parametrize("kind", KINDS)
def test_a_stopped_run_saves_its_step_and_ends_bit_identical(kind, fresh, tmp_path):
    assert fresh(stop_and_continue, kind, tmp_path, 6, 0) >= 2


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_run_stopped_again_and_again_ends_bit_identical(kind, fresh, tmp_path):
    assert fresh(stop_and_continue, kind, tmp_path, 40, 1) >= 10


def stop_twice(folder: Path, *signals: int) -> tuple[int, bool]:
    """The exit code of a run that gets two signals in a step, and whether it has saved."""
    code = run(config_of("task", folder / "run"), at("after backward", 1, send(*signals)))
    return code, (folder / "run" / "checkpoints").exists()


@pytest.mark.parametrize("signals", [(15, 15), (2, 2), (15, 2), (2, 15)])
def test_a_second_signal_ends_a_run_at_once(signals, fresh, tmp_path):
    assert fresh(stop_twice, tmp_path, *signals) == (128 + signals[1], False)
