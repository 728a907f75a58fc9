"""Trackers of accelerate: told of the configuration, of every number that TensorBoard is told, and of the end."""

import pytest
from accelerate import tracking

from tests.training.tiny_run import task_config
from visionpos.training.errors import ConfigError
from visionpos.training.run.classification import train


@pytest.fixture
def seen(monkeypatch):
    calls = {"log": [], "config": [], "name": [], "finished": 0}

    class Fake(tracking.GeneralTracker):
        name, requires_logging_directory = "wandb", False

        def __init__(self, run_name, **kwargs):
            super().__init__()
            calls["name"].append(run_name)

        @property
        def tracker(self):
            return None

        def store_init_configuration(self, values):
            calls["config"].append(values)

        def log(self, values, step=None, **kwargs):
            calls["log"].append((step, values))

        def finish(self):
            calls["finished"] += 1

    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, "wandb", Fake)
    monkeypatch.setattr("visionpos.training.run.record.get_available_trackers", lambda: ["tensorboard", "wandb"])
    return calls


def test_a_tracker_is_told_of_everything(seen, tmp_path):
    result = train(task_config(tmp_path, "--tracker", "wandb", "--log_every", "1"))
    (config,) = seen["config"]
    assert (config["recipe.steps"], config["encoding"]) == (6, "none")
    losses = {step: values["train/loss"] for step, values in seen["log"] if "train/loss" in values}
    assert sorted(losses) == [1, 2, 3, 4, 5, 6]
    last = {name: value for step, values in seen["log"] if step == 6 for name, value in values.items()}
    assert last["accuracy/whole/ema"] == result["final"]["whole"]
    assert seen["finished"] == 1


def test_a_run_goes_on_with_another_tracker_or_none(seen, tmp_path):
    train(task_config(tmp_path))
    train(task_config(tmp_path, "--tracker", "wandb"))  # finished: the same run


@pytest.mark.parametrize("name", ["mlflow", "wandbb"])
def test_a_tracker_that_is_not_there_is_one_line(name, seen, tmp_path):
    with pytest.raises(ConfigError, match=f"tracker: '{name}' given; accepted here: null, wandb"):
        train(task_config(tmp_path, "--tracker", name))
