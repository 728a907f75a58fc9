"""Reports of runs that are made up: every number known, every mixture refused."""

import csv
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
from visionpos.training.reports.statistics import accuracy_interval, difference_interval
from visionpos.training.reports.summary import options_text

RIGHT = {"none": 0.5, "rope_axial": 0.7}
NOTE = "pictures may be copies"


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


def test_means_and_paired_differences_have_intervals_over_seeds_and_pictures(tmp_path):
    none = [write_run(tmp_path, "none", seed) for seed in (0, 1, 2)]
    rope = [write_run(tmp_path, "rope_axial", seed) for seed in (0, 1, 2)]
    content = report([tmp_path / "runs"], None, [], None)
    stacks = {name: np.stack([right_of(run) for run in runs]) for name, runs in (("none", none), ("rope", rope))}
    row = row_of(content, "rope_axial")
    accuracy, difference = row["accuracy"]["test"], row["difference"]["test"]
    paired = difference_interval(stacks["rope"], stacks["none"])
    for found, expected in ((accuracy, accuracy_interval(stacks["rope"])), (difference, paired)):
        assert (found["mean"], found["low"], found["high"]) == (expected.mean, expected.low, expected.high)
    assert difference["holds"]  # 20 points
    assert list(difference["per_seed"]) == [0, 1, 2]
    assert difference["per_seed"][1] == pytest.approx(stacks["rope"][1].mean() - stacks["none"][1].mean())
    assert row_of(content, "none")["difference"] == {}
    assert [row["encoding"] for row in content["rows"]] == ["rope_axial", "none"]
    assert (row["parameters"], row["encoding_parameters"]) == (1234, 5)
    assert (
        not {"images_per_second", "seconds"} & row.keys()
    )  # the log of a training on a busy machine is no measurement


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
    assert page.count("Fewer than five seeds (2)") == page.count("400 test pictures. **") == 1  # in its table
    assert page.count("Pictures may be copies.") == 1
    assert "2 differences are looked at in each table" in page
    assert "(97.5 % each, Bonferroni)" in page
    assert markdown(json.loads((folder / "report.json").read_text())) == page
    assert (folder / "accuracy.png").read_bytes().startswith(b"\x89PNG")


def test_five_seeds_are_not_few(tmp_path):
    for seed in range(5):
        write_run(tmp_path, "none", seed)
    assert "Fewer than" not in markdown(report([tmp_path / "runs"], None, [], None))


def test_without_predictions_there_is_no_interval(tmp_path):
    for seed in (0, 1, 2):
        write_run(tmp_path, "none", seed)
        write_run(tmp_path, "rope_axial", seed, predictions=seed != 1)
    content = report([tmp_path / "runs"], None, [], None)
    row = row_of(content, "rope_axial")
    for found in (row["accuracy"]["test"], row["difference"]["test"]):
        assert found["mean"] == pytest.approx(np.mean(list(found["per_seed"].values())))
        assert (found["low"], found["high"]) == (None, None)
    assert row_of(content, "none")["accuracy"]["test"]["low"] is not None
    assert "nor where the answers to the pictures were not kept" in markdown(content)


def test_every_accuracy_is_in_the_csv_file(tmp_path):
    for encoding, better in (("none", 0), ("rope_axial", 40)):
        for seed in (0, 1):
            write_evaluation(write_run(tmp_path, encoding, seed), [("scale", [16, 24], 200 + better)])
    content = report([tmp_path / "runs"], None, [], None)
    with (tmp_path / "runs" / "report" / "report.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert [(line["encoding"], line["how"], line["height"], line["seeds"]) for line in lines] == [
        ("rope_axial", "final", "", "2"),
        ("none", "final", "", "2"),
        *(("rope_axial", "scale", "8", "2"), ("rope_axial", "scale", "16", "2")),
        *(("none", "scale", "8", "2"), ("none", "scale", "16", "2")),
    ]
    assert float(lines[0]["low"]) == row_of(content, "rope_axial")["accuracy"]["test"]["low"]
    assert float(lines[3]["difference_mean"]) == pytest.approx(0.1)
    assert lines[4]["difference_mean"] == ""


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
    everything = [row, *content["sizes"]]
    assert all(each["accuracy"].get("test", each["accuracy"])["low"] is not None for each in everything)
    assert row["difference"]["test"]["low"] is not None
    assert (row["encoding_parameters"], row["seeds"]) == ((2 * 3 + 1) * 16, [0, 1])
    assert {row["how"] for row in content["sizes"]} == {"scale", "shift", "answers kept after a shift"}
    assert {row["coordinates"] for row in content["sizes"]} == {"interpolated", "extrapolated"}
    assert not any(row["own"] for row in content["sizes"])  # learned tables are resized, whatever is asked for
    assert "JPEG" not in markdown(content)


def test_no_interval_reaches_beyond_what_is_possible(tmp_path):
    shares = {"none": (3, 397), "rope_axial": (400, 399)}
    for encoding, counts in shares.items():
        for seed, count in enumerate(counts):
            run = write_run(tmp_path, encoding, seed, final={"weights": "ema", "test": count / 400})
            right = np.arange(400) < count
            safetensors.numpy.save_file({"test": right}, run / "predictions.safetensors")
    rows = report([tmp_path / "runs"], None, [], None)["rows"]
    assert (rows[1]["accuracy"]["test"]["low"], rows[1]["accuracy"]["test"]["high"]) == (0, 1)
    assert 0.9 < rows[0]["accuracy"]["test"]["low"] < rows[0]["accuracy"]["test"]["high"] == 1
    assert (rows[0]["difference"]["test"]["low"], rows[0]["difference"]["test"]["high"]) == (-1, 1)


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
    """An evaluation with its answers, of (how, size, how many of the 400 are right); a shift keeps 360 answers."""
    way = coordinates.removesuffix("-scaled")
    name = "evaluate" if way == "interpolated" else f"evaluate_{way}"
    listed, kept = [], {}
    for how, size, count in [("scale", [8, 12], 200), *rows]:
        key, right = f"{how} {size[0]}x{size[1]} test", np.arange(400) < count
        row = {"how": how, "size": size, "part": "test", "accuracy": count / 400}
        listed.append(row | ({"consistency": 0.9} if how == "shift" else {}))
        answers = np.where(np.arange(400) < 40 * (how == "shift"), 1, 0).astype(np.uint8)
        kept |= {key: answers, f"right {key}": right}
    content = {"coordinates": coordinates, "own_coordinates": own, "rows": listed}
    (run / f"{name}.json").write_text(json.dumps(content))
    safetensors.numpy.save_file(kept, run / f"{name}.safetensors")


def test_sizes_shapes_canvases_and_shifts_have_tables_and_figures(tmp_path):
    for encoding, better in (("none", 0), ("rope_axial", 40)):
        for seed in (0, 1):
            run = write_run(tmp_path, encoding, seed)
            rows = [("scale", [16, 24], 160 + better), ("scale", [8, 8], 120)]
            rows += [("canvas", [12, 16], 160 + 40 * seed), ("shift", [0, 2], 80 + better)]
            write_evaluation(run, rows)
            write_evaluation(run, [("scale", [16, 24], 80)], "extrapolated")
            write_evaluation(run, [("scale", [16, 24], 120)], "yarn-scaled")
    content = report([tmp_path / "runs"], None, [], None)
    found = {(row["encoding"], row["coordinates"], row["how"], *row["size"]): row for row in content["sizes"]}
    for key, mean, above in (
        (("rope_axial", "interpolated", "scale", 16, 24), 0.5, 0.1),
        (("rope_axial", "extrapolated", "scale", 16, 24), 0.2, 0.0),
        (("rope_axial", "interpolated", "aspect ratio", 8, 8), 0.3, 0.0),
        (("rope_axial", "interpolated", "answers kept after a shift", 0, 2), 0.9, 0.0),
    ):
        accuracy, difference = found[key]["accuracy"], found[key]["difference"]
        assert (accuracy["mean"], difference["mean"]) == pytest.approx((mean, above))
        assert accuracy["high"] - accuracy["low"] > 0.05  # seeds that agree are no certainty
        assert difference["low"] < above < difference["high"]
    assert found["none", "interpolated", "canvas", 12, 16]["accuracy"]["mean"] == pytest.approx(0.45)
    assert found["none", "interpolated", "canvas", 12, 16]["difference"] is None
    page = markdown(content)
    assert {row["coordinates"] for row in content["sizes"] if row["own"]} == {"extrapolated"}
    for text in (
        "## Scale, interpolated coordinates: test\n",
        "## Scale, extrapolated coordinates: test\n",
        "## Scale, interpolated coordinates: test, above none\n",
        "## Scale, yarn-scaled coordinates: test\n",
        "| rope_axial, as the model does it | 50.0",
        "## Aspect ratio, interpolated coordinates: test",
        "## Canvas, interpolated",
        "## Shift, interpolated",
        "| encoding | 8x12 | 16x24 |",
        "| encoding | 0x2 |",
        "## Answers kept after a shift, interpolated",
        "| rope_axial | 90.0 (86.6 to 92.6) |",
        "| rope_axial | +0.0 (-0.7 to +0.7) | +10.0* (",
    ):
        assert text in page
    figures = {"accuracy.png", "scale.png", "aspect-ratio.png", "canvas.png", "shift.png"}
    figures |= {"answers-kept-after-a-shift.png"}
    assert set(content["figures"]) == figures
    assert all((tmp_path / "runs" / "report" / name).stat().st_size > 5000 for name in figures)


def test_an_evaluation_whose_answers_were_not_kept_has_no_interval(tmp_path):
    for seed in (0, 1):
        write_evaluation(write_run(tmp_path, "none", seed), [("scale", [16, 24], 160)])
    (tmp_path / "runs" / "00" / "evaluate.safetensors").unlink()
    (row, _) = report([tmp_path / "runs"], None, [], None)["sizes"]
    assert (row["accuracy"]["mean"], row["accuracy"]["low"]) == (0.5, None)


def test_a_size_that_not_every_seed_was_evaluated_at_is_left_out(tmp_path):
    write_evaluation(write_run(tmp_path, "none", 0), [("scale", [16, 24], 160)])
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
    assert "| recipe.epochs | encoding | accuracy, % |" in markdown(content)
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
    assert "| encoding | recipe.lr | accuracy, % |" in page
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
        ({"final": {"weights": "ema", "test": 0.9}}, "'final test' has .* right, reported are 0.9"),
    ],
)
def test_mixtures_are_refused(changes, line, tmp_path):
    write_run(tmp_path, "none", 0)
    write_run(tmp_path, **{"encoding": "rope_axial", "seed": 1, **changes})
    with pytest.raises(ConfigError, match=line):
        report([tmp_path / "runs"], None, [], None)


def test_a_field_that_an_earlier_version_did_not_have_counts_as_its_default(tmp_path):
    write_run(tmp_path, "none", 0)
    earlier = write_run(tmp_path, "none", 1) / "result.json"
    result = json.loads(earlier.read_text())
    for part, name in (("data", "test_fraction"), ("recipe", "betas"), ("data", "splits")):
        del result["config"][part][name]
    earlier.write_text(json.dumps(result))
    assert row_of(report([tmp_path / "runs"], None, [], None), "none")["seeds"] == [0, 1]
    write_run(tmp_path, "none", 2, ["--recipe.betas", "[0.8, 0.9]"])
    with pytest.raises(ConfigError, match=r"recipe.betas: \[0.9, 0.95\] in .*, \[0.8, 0.9\] in "):
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
