import dataclasses
import json
import sys
from functools import partial

import pytest
import torch

from benchmarks import layers, models, operations, speed, windows
from benchmarks.clock import peak_bytes, ratio
from benchmarks.measure import Case, Row, Setting, Unequal, measure
from benchmarks.report import page, progress, write
from benchmarks.targets import TARGETS, goals

FORWARD = Setting("cpu", "float32", "eager", backward=False)
BOTH = Setting("cpu", "float32", "eager", backward=True)
VIT = {"embed_dim": 32, "num_heads": 2, "img_size": (32, 48), "patch_size": 16, "depth": 1}
SWIN = {"name": windows.V1, "embed_dim": 8, "num_heads": (1, 1), "depths": (2, 2), "window_size": (2, 4)}
SWIN |= {"img_size": (32, 64), "batch": (1, 1)}
BUILDS = {
    "layer": partial(layers.layer, dim=32, heads=2, grid=(2, 3), batch=(2, 2)),
    "mae": partial(layers.layer, dim=32, heads=2, grid=(2, 4), batch=(2, 2), visible=0.5),
    "model": partial(models.vit, options=VIT, batch=(1, 1)),
    "rope": partial(models.host, name=models.HOSTS["rope ViT"], options=VIT, batch=(1, 1)),
    "mixed": partial(models.host, name=models.HOSTS["mixed rope ViT"], options=VIT, batch=(1, 1)),
    "beit": partial(models.host, name=models.HOSTS["BEiT"], options=VIT, batch=(1, 1)),
    "encoder": partial(models.masked, options=VIT, batch=(1, 1), visible=0.5),
    "swin": partial(windows.swin, **SWIN),
    "window": partial(windows.attention, stage=0, shifted=True, **SWIN),
    "partition": partial(windows.partition, stage=0, shifted=True, **SWIN),
    "rotation": partial(operations.rotation, heads=2, head_dim=8, grid=(2, 3), batch=(2, 2)),
    "gather": partial(operations.gather, heads=2, grid=(2, 3)),
    "kernel": partial(operations.window_kernel, grid=7, heads=2, shifted=True, batch=(1, 1)),
}


@pytest.fixture(autouse=True)
def restored():
    threads, tf32 = torch.get_num_threads(), torch.backends.cudnn.allow_tf32
    yield
    torch.set_num_threads(threads)
    torch.backends.cudnn.allow_tf32 = tf32


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    """Measurements as short as they come, and no second attempt: what is measured is not looked at here."""
    monkeypatch.setattr("benchmarks.measure.ATTEMPTS", 1)
    monkeypatch.setattr("benchmarks.clock.take_turns.__defaults__", (0.0001,))


@pytest.mark.parametrize("setting", [pytest.param(FORWARD, marks=pytest.mark.slow), BOTH], ids=["forward", "both"])
@pytest.mark.parametrize("name", BUILDS)
def test_rows_equal_their_peers_and_have_ratios(name, setting):
    case = BUILDS[name](setting)
    result = measure(Row("group", name, BUILDS[name]), setting, rounds=3)
    pairs = {(found["variant"], found["over"]) for found in result["ratios"]}
    base = next(iter(case.modules))
    assert result["base"] == base
    assert pairs >= {(other, base) for other in case.modules if other != base} | set(case.peers.items())
    assert all(0 < found["q1"] <= found["median"] <= found["q3"] for found in result["ratios"])
    json.dumps(result)


def scaled(factor: float, setting: Setting) -> Case:
    one, other = torch.nn.Linear(3, 4), torch.nn.Linear(3, 4)
    other.load_state_dict({key: factor * value for key, value in one.state_dict().items()})
    return Case((torch.randn(2, 3, requires_grad=setting.backward),), {"one": one, "other": other}, {"other": "one"})


def test_another_result_than_the_peers_is_not_timed():
    measure(Row("group", "row", partial(scaled, 1.0)), FORWARD, rounds=3)
    measure(Row("group", "row", partial(scaled, 1 + 1e-3)), dataclasses.replace(FORWARD, dtype="bf16"), rounds=3)
    for setting in (FORWARD, BOTH):
        with pytest.raises(Unequal, match="other differs from one by 1.0e-03, more than 1e-05"):
            measure(Row("group", "row", partial(scaled, 1 + 1e-3)), setting, rounds=3)


def test_gradients_of_the_inputs_must_be_equal_too():
    class Detour(torch.nn.Identity):
        def forward(self, x):
            return x + (x - x.detach())  # the same value, twice the gradient

    def build(setting):
        x = torch.randn(2, 3, requires_grad=setting.backward)
        return Case((x,), {"one": torch.nn.Identity(), "other": Detour()}, {"other": "one"})

    measure(Row("group", "row", build), FORWARD, rounds=3)
    with pytest.raises(Unequal, match="by 1.0e"):
        measure(Row("group", "row", build), BOTH, rounds=3)


def test_ratio_is_the_median_of_the_rounds():
    times = {"a": [1.0, 2.0, 30.0, 4.0, 5.0], "b": [1.0, 1.0, 10.0, 1.0, 1.0]}
    assert dataclasses.astuple(ratio(times, "a", "b")) == (3.0, 2.0, 4.0)


@pytest.mark.unhooked
def test_peak_memory_of_a_step_on_a_cpu():
    """Two tensors at a time, of three in all; what was there before does not count."""
    before = torch.ones(1000)

    def step():
        first, second = before + 1, before + 2
        del first
        return (second + 1).sum()

    step()
    assert 8000 <= peak_bytes(step, torch.device("cpu")) < 8200


def result_of(row="Swin-T", median=0.7, valid=True, **changes):
    quartiles = {"q1": median - 0.1, "q3": median + 0.1}
    ratios = [{"variant": "visionpos", "over": "timm", "median": median, **quartiles, "memory": 0.5}]
    control = {"median": 1.0 if valid else 1.2, "q1": 0.9, "q3": 1.3}
    result = {
        "row": row,
        "group": "swin",
        **dataclasses.asdict(FORWARD),
        "base": "timm",
        "base_ms": 12.5,
        "base_bytes": 2**21,
    }
    return {**result, "control": control, "valid": valid, "attempts": 1, "ratios": ratios, **changes}


def test_targets_stand_beside_what_was_measured():
    assert [(goal["limit"], goal["met"]) for goal in goals(result_of())] == [(0.74, True)]
    assert [(goal["limit"], goal["met"]) for goal in goals(result_of(backward=True, median=0.83))] == [(0.82, False)]
    assert not list(goals(result_of(dtype="bf16")))
    assert [goal["limit"] for goal in goals(result_of(row="any", mode="compiled"))] == [1.0]  # timm's, compiled
    misses = {0.75: "less than the noise", 0.9: "timm's steps"}
    assert all(text in next(goals(result_of(median=median)))["reason"] for median, text in misses.items())
    assert next(goals(result_of(median=0.9, mode="compiled")))["met"]
    assert next(goals(result_of(median=1.2, mode="compiled")))["reason"] == ""  # known for eager runs alone
    with pytest.raises(ValueError, match="a target names visionpos over timm, but Swin-T has"):
        list(goals(result_of(ratios=[])))


def test_every_target_has_a_row():
    assert {target.row for target in TARGETS} <= {row.name for row in speed.ROWS}
    assert len({row.name for row in speed.ROWS}) == len(speed.ROWS)


def test_page_shows_ratios_targets_and_doubts(tmp_path):
    failed = {"row": "window", "group": "window", **dataclasses.asdict(FORWARD), "error": "not measured: b differs"}
    rows = [result_of(), result_of(backward=True, median=1.0, valid=False), failed]
    facts = {"date": "2026-01-02", "hardware": "a CPU", "capability": "X", "load": [0.5], "versions": {"torch": "2"}}
    measured = {**facts, "command": "python -m benchmarks.speed", "rounds": 5, "rows": rows}
    lines = page(measured).splitlines()
    assert "| Swin-T | visionpos / timm | forward | float32 eager | 0.74 | 0.700 | met |" in lines
    missed = "| Swin-T | visionpos / timm | forward + backward | float32 eager | 0.82 | 1.000 | missed ?: the same"
    assert any(line.startswith(missed) for line in lines)
    assert "| Swin-T | timm | 12.50 ms; 2.0 MiB | 12.50 ms; 2.0 MiB |" in lines
    assert "|  | timm again | 1.00 (0.90-1.30) | 1.20 (0.90-1.30) ? |" in lines
    assert "|  | visionpos / timm | 0.70 (0.60-0.80); memory 0.50 | 1.00 (0.90-1.10); memory 0.50 |" in lines
    assert "| window |  | not measured: b differs |  |" in lines
    assert progress(rows[1]).endswith("timm 12.50 ms; ? (again 1.200) visionpos/timm 1.00")
    write(measured, tmp_path)
    assert json.loads((tmp_path / "speed.json").read_text()) == measured
    assert (tmp_path / "speed.md").read_text() == page(measured)


def run(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["speed.py", *words])
    speed.main()


def test_command_writes_what_it_measured(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(speed, "ROWS", [Row("gather", "gather 2 x 3", BUILDS["gather"], quick=True)])
    run(monkeypatch, "--quick", "--rounds", "3", "--output", str(tmp_path))
    measured = json.loads((tmp_path / "speed.json").read_text())
    assert [(row["row"], row["backward"]) for row in measured["rows"]] == [
        ("gather 2 x 3", False),
        ("gather 2 x 3", True),
    ]
    assert measured["command"].startswith("python -m benchmarks.speed --quick")
    assert f"written to {tmp_path}" in capsys.readouterr().out


def test_a_row_that_is_not_equal_fails_the_command(monkeypatch, tmp_path):
    monkeypatch.setattr(speed, "ROWS", [Row("group", "row", partial(scaled, 2.0), quick=True)])
    with pytest.raises(SystemExit, match="1"):
        run(monkeypatch, "--quick", "--output", str(tmp_path))
    assert "other differs from one" in (tmp_path / "speed.md").read_text()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--rows", "layers"], "error: --rows 'layers' is no row; did you mean 'layer'? Groups: rotation, gather"),
        (["--rows", "long", "--quick"], "error: --rows long: none of these is small enough for --quick"),
        (["--rows", "kernel"], "error: --rows kernel: these need --device cuda"),
        (["--dtype", "float16"], "error: --dtype must be among float32, bf16, got 'float16'"),
        (["--mode", "fast"], "error: --mode must be among eager, compiled, got 'fast'"),
        (["--rounds", "2"], "error: --rounds must be 3 or more, got 2"),
        (["--rounds", "0"], "error: --rounds must be 3 or more, got 0"),
        (["--device", "gpu"], "error: --device must be cpu or cuda (CUDA_VISIBLE_DEVICES says which), got 'gpu'"),
    ],
)
def test_wrong_words_are_one_clear_line(monkeypatch, words, message):
    with pytest.raises(SystemExit) as error:
        run(monkeypatch, *words)
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)
