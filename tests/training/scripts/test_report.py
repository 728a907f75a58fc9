"""Reports of runs that are made up: every number known, every mixture refused."""

import json
from dataclasses import asdict

import numpy as np
import pytest
import safetensors.numpy

from tests.training.tiny_run import PICTURES, TASK, write_pictures
from train.report import command, report
from train.sweep import command as sweep_command
from visionpos.training.config.command_line import parse
from visionpos.training.config.schema import encoding_label
from visionpos.training.errors import ConfigError, run_command
from visionpos.training.reports.markdown import markdown
from visionpos.training.reports.statistics import two_level_bootstrap
from visionpos.training.reports.summary import options_text

RIGHT = {"none": 0.5, "rope_axial": 0.7}
NOTE = "pictures may be JPEG copies"


def write_run(folder, encoding="none", seed=0, flags=(), predictions=True, base=PICTURES, **changes):
    """A finished run as `train.classify` leaves it, in a directory of its own; returns that."""
    (folder / "base.yaml").write_text(base.replace("FOLDER", str(folder)))
    run = folder / "runs" / f"{len(list((folder / 'runs').glob('*'))):02d}"
    spec = encoding if isinstance(encoding, str) else json.dumps(encoding)
    flags = ["--encoding", spec, "--seed", str(seed), "--output", str(run), *flags]
    config = parse(["--config", str(folder / "base.yaml"), *flags])
    draws = np.random.default_rng([seed, len(encoding_label(config.encoding))])
    right = draws.random(400) < RIGHT.get(encoding_label(config.encoding), 0.6)
    name = encoding if isinstance(encoding, str) else encoding["name"]
    options = {} if isinstance(encoding, str) else {key: encoding[key] for key in encoding if key != "name"}
    built = {"name": name, "place": "rotary", "num_heads": 4, **options, "reference_shape": [2, 3], "modules": 1}
    result = {
        "final": {"weights": "ema", "test": float(right.mean())},
        "chance": 1 / 3,
        "steps": 9,
        "seconds": 10.0 + seed,
        "images_per_second": 100.0 + seed,
        "parameters": 1234,
        "encoding_parameters": 0 if encoding == "none" else 5,
        "encodings": [] if encoding == "none" else [built],
        "seed": seed,
        "data": {"num_classes": 3, "image_size": [8, 12], "test_size": 400, "mean": [0.5], "note": NOTE},
        "device": "CPU (x86_64)",
        "versions": {"python": "3", "torch": "2"},
        "config": asdict(config),
        **changes,
    }
    run.mkdir(parents=True)
    (run / "config.yaml").write_text("the report reads result.json\n")
    (run / "result.json").write_text(json.dumps(result))
    if predictions:
        safetensors.numpy.save_file({"test": right}, run / "predictions.safetensors")
    return run


def right_of(run):
    return safetensors.numpy.load_file(run / "predictions.safetensors")["test"].astype(float)


def row_of(content, encoding):
    return next(row for row in content["rows"] if row["encoding"] == encoding)


def test_means_and_paired_differences_are_those_of_the_bootstrap(tmp_path):
    none = [write_run(tmp_path, "none", seed) for seed in (0, 1, 2)]
    rope = [write_run(tmp_path, "rope_axial", seed) for seed in (0, 1, 2)]
    content = report([tmp_path / "runs"], None, [], None)
    stacks = {name: np.stack([right_of(run) for run in runs]) for name, runs in (("none", none), ("rope", rope))}
    row = row_of(content, "rope_axial")
    accuracy, difference = row["accuracy"]["test"], row["difference"]["test"]
    for found, values in ((accuracy, stacks["rope"]), (difference, stacks["rope"] - stacks["none"])):
        expected = two_level_bootstrap(values)
        assert (found["mean"], found["low"], found["high"]) == (expected.mean, expected.low, expected.high)
        assert found["basis"] == "seeds and pictures"
    assert list(difference["per_seed"]) == [0, 1, 2]
    assert difference["per_seed"][1] == pytest.approx(stacks["rope"][1].mean() - stacks["none"][1].mean())
    assert row_of(content, "none")["difference"] == {}
    assert [row["encoding"] for row in content["rows"]] == ["rope_axial", "none"]
    assert (row["images_per_second"], row["seconds"], row["encoding_parameters"]) == (101, 11, 5)


def test_the_page_says_what_it_is_based_on(tmp_path, capsys):
    for encoding in ("none", "rope_axial", {"name": "learned", "init_std": 0.5}):
        for seed in (0, 1):
            write_run(tmp_path, encoding, seed)
    command([str(tmp_path / "runs")])
    printed, folder = capsys.readouterr().out, tmp_path / "runs" / "report"
    page = (folder / "report.md").read_text()
    assert printed.startswith(page)
    for text in (
        "6 runs, 2 seeds for each encoding",
        "averaged weights (EMA) of the last step only, never the best",
        "Hardware: CPU (x86_64). Versions: python 3, torch 2.",
        "| learned(init_std=0.5) | learned(init_std=0.5) |",
    ):
        assert text in page
    assert page.count("Fewer than five seeds (2)") == page.count(f"400 test pictures; {NOTE}.") == 2  # one a table
    assert markdown(json.loads((folder / "report.json").read_text())) == page
    assert (folder / "accuracy.png").read_bytes().startswith(b"\x89PNG")


def test_five_seeds_are_not_few(tmp_path):
    for seed in range(5):
        write_run(tmp_path, "none", seed)
    assert "Fewer than" not in markdown(report([tmp_path / "runs"], None, [], None))


def test_without_predictions_intervals_are_of_seeds_only_and_the_table_says_so(tmp_path):
    for seed in (0, 1, 2):
        write_run(tmp_path, "none", seed)
        write_run(tmp_path, "rope_axial", seed, predictions=seed != 1)
    content = report([tmp_path / "runs"], None, [], None)
    accuracy = row_of(content, "rope_axial")["accuracy"]["test"]
    values = np.array(list(accuracy["per_seed"].values()))
    assert accuracy["basis"] == row_of(content, "rope_axial")["difference"]["test"]["basis"] == "seeds only"
    assert row_of(content, "none")["accuracy"]["test"]["basis"] == "seeds and pictures"
    assert accuracy["high"] - values.mean() == pytest.approx(4.3027 * values.std(ddof=1) / 3**0.5, rel=1e-4)
    assert "| seeds only |" in markdown(content)


def test_differences_use_the_seeds_that_both_have(tmp_path):
    for seed in (0, 1):
        write_run(tmp_path, "none", seed)
    for seed in (1, 2):
        write_run(tmp_path, "rope_axial", seed)
    write_run(tmp_path, "sincos2d", 7)
    content = report([tmp_path / "runs"], None, [], None)
    assert list(row_of(content, "rope_axial")["difference"]["test"]["per_seed"]) == [1]
    assert row_of(content, "sincos2d")["difference"]["test"] is None
    page = markdown(content)
    assert "1 to 2 seeds for each encoding" in page
    assert "Fewer than five seeds (1)" in page


def test_a_real_sweep_from_end_to_end(tmp_path):
    write_pictures(tmp_path / "pictures")
    (tmp_path / "base.yaml").write_text(PICTURES.replace("FOLDER", str(tmp_path / "pictures")))
    sweep = "run: base.yaml\nencodings: [none, {name: learned, init_std: 0.5}]\nseeds: [0, 1]\n"
    (tmp_path / "tiny.yaml").write_text(f"{sweep}evaluate: {{sizes: [16x24], shifts: [2]}}\n")
    assert sweep_command([str(tmp_path / "tiny.yaml"), "--output", str(tmp_path / "runs")]) == []
    content = report([tmp_path / "runs"], None, [], None)
    row = row_of(content, "learned(init_std=0.5)")
    assert row["accuracy"]["test"]["basis"] == row["difference"]["test"]["basis"] == "seeds and pictures"
    assert (row["encoding_parameters"], row["seeds"]) == ((2 * 3 + 1) * 16, [0, 1])
    assert {row["how"] for row in content["sizes"]} == {"scale", "shift", "answers kept after a shift"}
    assert {row["coordinates"] for row in content["sizes"]} == {"interpolated", "extrapolated"}
    assert not any(row["own"] for row in content["sizes"])  # learned tables are resized, whatever is asked for
    assert "JPEG" in markdown(content)


def test_no_interval_reaches_beyond_what_is_possible(tmp_path):
    for seed, share in enumerate((0.99, 0.2)):
        write_run(tmp_path, "none", seed, predictions=False, final={"weights": "ema", "test": share})
    accuracy = report([tmp_path / "runs"], None, [], None)["rows"][0]["accuracy"]["test"]
    assert (accuracy["low"], accuracy["high"]) == (0, 1)


def test_the_baseline_can_be_another_or_none_at_all(tmp_path):
    for encoding in ("rope_axial", "sincos2d"):
        write_run(tmp_path, encoding)
    alone = report([tmp_path / "runs"], None, [], None)
    assert alone["baseline"] is None
    assert "there are no differences" in markdown(alone)
    assert row_of(report([tmp_path / "runs"], None, [], "sincos2d"), "rope_axial")["difference"]["test"]
    with pytest.raises(ConfigError, match="--baseline: 'none' given; accepted: rope_axial, sincos2d"):
        report([tmp_path / "runs"], None, [], "none")


def write_evaluation(run, rows, coordinates="interpolated", own="extrapolated"):
    name = {"interpolated": "evaluate.json", "extrapolated": "evaluate_extrapolated.json"}.get(coordinates)
    name = name or f"evaluate_{coordinates.removesuffix('-scaled')}.json"
    listed = [{"how": how, "size": size, "part": "test", "accuracy": share} for how, size, share in rows]
    for row in listed:
        row.update({"consistency": 0.9} if row["how"] == "shift" else {})
    (run / name).write_text(json.dumps({"coordinates": coordinates, "own_coordinates": own, "rows": listed}))


def test_sizes_shapes_canvases_and_shifts_have_tables_and_figures(tmp_path):
    for encoding, better in (("none", 0.0), ("rope_axial", 0.1)):
        for seed in (0, 1):
            run = write_run(tmp_path, encoding, seed)
            rows = [("scale", [8, 12], 0.5 + better), ("scale", [16, 24], 0.4 + better), ("scale", [8, 8], 0.3)]
            rows += [("canvas", [12, 16], 0.4 + seed / 10), ("shift", [0, 2], 0.2 + better)]
            write_evaluation(run, rows)
            write_evaluation(run, [("scale", [16, 24], 0.2)], "extrapolated")
            write_evaluation(run, [("scale", [16, 24], 0.3)], "yarn-scaled")
    content = report([tmp_path / "runs"], None, [], None)
    found = {
        (row["encoding"], row["coordinates"], row["how"], *row["size"]): (row["mean"], row["above_baseline"])
        for row in content["sizes"]
    }
    assert found["rope_axial", "interpolated", "scale", 16, 24] == pytest.approx((0.5, 0.1))
    assert found["rope_axial", "extrapolated", "scale", 16, 24] == pytest.approx((0.2, 0.0))
    assert found["rope_axial", "interpolated", "aspect ratio", 8, 8] == pytest.approx((0.3, 0.0))
    assert found["none", "interpolated", "canvas", 12, 16] == pytest.approx((0.45, 0.0))
    page = markdown(content)
    assert {row["coordinates"] for row in content["sizes"] if row["own"]} == {"extrapolated"}
    for text in (
        "## Scale, yarn-scaled coordinates: test",
        "| rope_axial, as the model does it | 20.0",
        "## Scale, interpolated coordinates: test",
        "## Scale, extrapolated coordinates: test",
        "## Aspect ratio, interpolated coordinates: test",
        "## Canvas, interpolated",
        "## Shift, interpolated",
        "| encoding | 8x12 | 16x24 | mean above none |",
        "| encoding | 0x2 | mean above none |",
        "## Answers kept after a shift, interpolated",
        "| rope_axial | 90.0 (90.0 to 90.0) | +0.00 |",
        "| rope_axial | 60.0 (60.0 to 60.0) | 50.0 (50.0 to 50.0) | +10.00 |",
    ):
        assert text in page
    figures = {"accuracy.png", "scale.png", "aspect-ratio.png", "canvas.png", "shift.png"}
    figures |= {"answers-kept-after-a-shift.png"}
    assert set(content["figures"]) == figures
    assert all((tmp_path / "runs" / "report" / name).stat().st_size > 5000 for name in figures)


def test_a_size_that_not_every_seed_was_evaluated_at_is_left_out(tmp_path):
    write_evaluation(write_run(tmp_path, "none", 0), [("scale", [16, 24], 0.5)])
    write_run(tmp_path, "none", 1)
    assert report([tmp_path / "runs"], None, [], None)["sizes"] == []


def test_declared_fields_may_vary_and_are_drawn(tmp_path):
    for epochs in (1, 5):
        for encoding in ("none", "rope_axial"):
            write_run(tmp_path, encoding, flags=["--recipe.epochs", str(epochs)])
    with pytest.raises(ConfigError, match=r"recipe.epochs: 1 in .*, 5 in .*accepted: runs that differ in encoding"):
        report([tmp_path / "runs"], None, [], None)
    content = report([tmp_path / "runs"], None, ["recipe.epochs"], None)
    assert [row["setting"] for row in content["rows"]] == [{"recipe.epochs": epochs} for epochs in (1, 1, 5, 5)]
    assert "recipe-epochs.png" in content["figures"]
    assert "| recipe.epochs | encoding | as built |" in markdown(content)
    (tmp_path / "runs" / "sweep.json").write_text(json.dumps({"vary": ["recipe.epochs"], "tune": []}))
    assert report([tmp_path / "runs"], None, [], None)["rows"] == content["rows"]
    with pytest.raises(ConfigError, match="--vary: the runs have no field 'recipe.length'"):
        report([tmp_path / "runs"], None, ["recipe.length"], None)


def test_tuned_fields_may_differ_between_encodings_only(tmp_path):
    write_run(tmp_path, "none", 0, ["--recipe.lr", "1e-3"])
    write_run(tmp_path, "rope_axial", 0, ["--recipe.lr", "2e-3"])
    (tmp_path / "runs" / "sweep.json").write_text(json.dumps({"vary": [], "tune": ["recipe.lr"]}))
    content = report([tmp_path / "runs"], None, [], None)
    assert row_of(content, "rope_axial")["tuned"] == {"recipe.lr": 2e-3}
    page = markdown(content)
    assert "| encoding | as built | recipe.lr |" in page
    assert "Chosen for each encoding on training pictures held out: recipe.lr." in page
    write_run(tmp_path, "rope_axial", 1, ["--recipe.lr", "4e-3"])
    with pytest.raises(ConfigError, match="recipe.lr: differs between the seeds of rope_axial"):
        report([tmp_path / "runs"], None, [], None)


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"flags": ["--recipe.batch_size", "4"]}, "recipe.batch_size: 8 in .*, 4 in "),
        ({"flags": ["--model.options.depth", "3"]}, "model.options.depth: 2 in "),
        ({"flags": ["--data.per_class", "5"]}, "data.per_class: None in "),
        ({"flags": ["--data.validation", "5"]}, "data.validation: 0 in "),
        ({"flags": ["--precision", "bf16"]}, "precision: auto in "),
        ({"final": {"weights": "raw", "test": 0.6}, "predictions": False}, "final weights: ema in .*, raw in "),
        ({"device": "NVIDIA H200"}, "device: CPU in .*, GPU in "),
        ({"data": {"test_size": 10_000, "note": ""}}, r"data \(num_classes\): 3 in "),
        ({"seed": 0, "encoding": "none"}, "seed: 0 of none is there twice"),
        ({"final": {"weights": "ema", "test": 0.9}}, "predictions.safetensors: test is not what result.json says"),
    ],
)
def test_mixtures_are_refused(changes, line, tmp_path):
    write_run(tmp_path, "none", 0)
    write_run(tmp_path, **{"encoding": "rope_axial", "seed": 1, **changes})
    with pytest.raises(ConfigError, match=line):
        report([tmp_path / "runs"], None, [], None)


def test_what_changes_no_result_may_differ(tmp_path):
    write_run(tmp_path, "none", 0, ["--log_every", "3"])
    write_run(tmp_path, "none", 1, ["--data.root", "elsewhere"], versions={"python": "3", "torch": "3"})
    page = markdown(report([tmp_path / "runs"], None, [], None))
    assert "Versions: python 3, torch 2; python 3, torch 3." in page


def test_unfinished_runs_are_named_and_single_runs_can_be_given(tmp_path):
    runs = [write_run(tmp_path, "none", seed) for seed in (0, 1, 2)]
    (runs[2] / "result.json").unlink()
    content = report(runs, tmp_path / "here", [], None)
    assert content["unfinished"] == [str(runs[2])]
    assert f"Not finished, and left out: {runs[2]}." in markdown(content)
    assert content["runs"] == 2
    assert (tmp_path / "here" / "report.md").exists()


def test_position_tasks_have_a_table_for_each_part(tmp_path):
    parts = {"inside": 1.0, "outside": 0.5, "whole": 0.75}
    for encoding in ("none", "rope_axial"):
        write_run(tmp_path, encoding, base=TASK, predictions=False, final={"weights": "raw", **parts})
    page = markdown(report([tmp_path / "runs"], None, [], None))
    assert all(f"## Accuracy: {part}" in page for part in parts)
    assert "raw weights of the last step only" in page


def test_options_that_follow_from_the_model_are_not_shown():
    layers = [{"name": "lookhere", "place": "bias", "layer": n, "depth": 2, "global_slope": 2.0} for n in range(2)]
    table = {"name": "learned", "dim": 16, "init_std": 0.02, "reference_shape": None, "modules": 1}
    assert options_text([*layers, table]) == "lookhere(global_slope=2.0) + learned(init_std=0.02)"
    assert options_text([]) == "none"


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (["nowhere"], "nowhere is neither a run directory nor a directory of them"),
        (["runs", "--bsaeline", "none"], "bsaeline: no such field; did you mean 'baseline'?"),
        ([], "runs"),
        (["runs/00"], "--output: not given; accepted: a directory"),
        (["runs", "--output", "base.yaml/x"], "--output: cannot write to base.yaml/x"),
    ],
)
def test_a_mistake_is_one_line(flags, line, tmp_path, capsys, monkeypatch):
    write_run(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert run_command(lambda: command(flags)) == 2
    error = capsys.readouterr().err
    assert line in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("content", ["{", json.dumps({"final": {"reconstruction": 1}})])
def test_a_result_that_is_none_is_one_line(content, tmp_path):
    (write_run(tmp_path) / "result.json").write_text(content)
    with pytest.raises(ConfigError, match=r"result.json|is no run of train.classify"):
        report([tmp_path / "runs"], None, [], None)
