"""docs/results.md: current, and honest about few seeds; runs packed into results/ and read from there."""

import json
from pathlib import Path

import pytest

from tests.small import needs_newer_torch
from tests.training.scripts.test_report import row_of, write_evaluation, write_run
from train.report import command, report
from visionpos.training.errors import ConfigError, run_command
from visionpos.training.reports.page import page, study_content

ROOT = Path(__file__).parents[3]


@needs_newer_torch
def test_the_page_is_current():
    contents = {folder.name: study_content(folder) for folder in sorted((ROOT / "results").iterdir())}
    text = (ROOT / "docs" / "results.md").read_text()
    assert text == page(contents)
    pictures = [line.split("(")[1].rstrip(")") for line in text.splitlines() if line.startswith("![")]
    assert len(pictures) >= len(contents)
    assert all((ROOT / "docs" / name).read_text().startswith("<?xml") for name in pictures)


def packed(folder, seeds, encodings=("none", "rope_axial"), **changes):
    """A study of these seeds in results/made, packed by the command."""
    for encoding in encodings:
        for seed in seeds:
            write_evaluation(write_run(folder, encoding, seed), [("scale", [16, 24], 240)])
    flags = ["--what", "Made up", "--command", "none", "--commit", "0123abc"]
    command([str(folder / "runs"), "--pack", str(folder / "results" / "made"), *flags])
    study = folder / "results" / "made" / "study.json"
    study.write_text(json.dumps(json.loads(study.read_text()) | changes))
    return folder / "results" / "made"


def test_packed_runs_give_the_report_of_their_directories(tmp_path):
    folder = packed(tmp_path, (0, 1, 2))
    study = json.loads((folder / "study.json").read_text())
    assert (study["what"], study["command"], study["commit"], study["card"]) == (
        "Made up",
        "none",
        "0123abc",
        "CPU (x86_64)",
    )
    assert study["versions"] == [{"python": "3", "torch": "2"}]
    assert len(list(folder.iterdir())) == 7
    direct = report([tmp_path / "runs"], tmp_path / "a", [], None)
    kept = report([folder], tmp_path / "b", [], None)
    assert kept["sizes"] == direct["sizes"]
    assert kept["rows"] == direct["rows"]


def test_packing_again_keeps_what_was_said(tmp_path):
    folder = packed(tmp_path, (0, 1), question="Which?")
    write_run(tmp_path, "sincos2d", 0)
    command([str(tmp_path / "runs"), "--pack", str(folder)])
    study = json.loads((folder / "study.json").read_text())
    assert (study["question"], study["what"]) == ("Which?", "Made up")
    assert len(list(folder.iterdir())) == 6


def test_one_seed_is_not_enough(tmp_path):
    content = study_content(packed(tmp_path, (0,), contrast=[["rope_axial", "none"]]))
    text = page({"made": content})
    assert "Not enough seeds: no difference from none has an interval" in text
    assert "rope_axial minus none is +2" in text
    assert "points, by one seed, which says nothing of the next." in text
    assert "Different from none" not in text


def test_packing_says_which_runs_lack_their_answers(tmp_path, capsys):
    packed(tmp_path, (0, 1))
    assert "without" not in capsys.readouterr().out
    bare = write_run(tmp_path, "shaw", 2, predictions=False)
    command([str(tmp_path / "runs"), "--pack", str(tmp_path / "results" / "made")])
    assert f"without predictions.safetensors, so without intervals: {bare.name}\n" in capsys.readouterr().out


def test_several_seeds_without_their_answers_are_not_called_one_seed(tmp_path):
    for encoding in ("none", "rope_axial"):
        for seed in (3, 4, 7):
            write_run(tmp_path, encoding, seed, predictions=False)
    flags = ["--what", "Made up", "--command", "none", "--commit", "0123abc"]
    command([str(tmp_path / "runs"), "--pack", str(tmp_path / "made"), *flags])
    study = tmp_path / "made" / "study.json"
    study.write_text(json.dumps({**json.loads(study.read_text()), "contrast": [["rope_axial", "none"]]}))
    content = study_content(tmp_path / "made")
    mean = content["contrasts"][0]["difference"]["test"]["mean"]
    text = page({"made": content})
    assert "The answers to the pictures were not kept: no difference from none has an interval." in text
    assert f"rope_axial minus none is {100 * mean:+.1f} points (3 seeds), without an interval." in text
    assert "Not enough seeds" not in text
    assert "by one seed" not in text


def test_a_study_of_one_encoding_ranks_nothing(tmp_path):
    text = page({"made": study_content(packed(tmp_path, (0, 1), ("shaw",)))})
    answer = text.split("**Answer.** ")[1].split("\n")[0]
    assert answer.startswith("The only encoding is shaw with ")
    assert answer.endswith(" %.")
    assert "highest" not in text


def test_a_difference_that_is_sure_is_said_and_one_that_is_not_is_not(tmp_path):
    pairs = [["rope_axial", "none"], ["sincos2d", "shaw"], ["rope_axial", "peg"]]
    folder = packed(tmp_path, range(5), ("none", "rope_axial", "sincos2d", "shaw"), question="Which?", contrast=pairs)
    content = study_content(folder)
    text = page({"made": content})
    assert (
        "## Made up\n\n**Question.** Which?\n\n**Answer.** Of 4 encodings the highest mean is that of rope_axial"
        in text
    )
    assert "all 3 taken together, are rope_axial" in text
    assert "(5 seeds): 0 is excluded." in text
    difference = next(each for each in content["contrasts"] if each["encodings"][0] == "sincos2d")["difference"]["test"]
    assert "sincos2d minus shaw" in text
    assert ("not different at this scale" in text) == (not difference["holds"])
    assert len(content["contrasts"]) == 2  # a pair that is not there is not spoken of
    assert row_of(content, "none")["difference"] == {}
    assert "![scale](pictures/results-made-scale.svg)" in text


def test_the_largest_size_has_a_column_for_each_way_to_have_coordinates(tmp_path):
    for encoding, ways in (("none", {"interpolated": 100}), ("rope_axial", {"interpolated": 240, "ntk-scaled": 320})):
        run = write_run(tmp_path, encoding, 0)
        for way, right in ways.items():
            write_evaluation(run, [("scale", [16, 24], right), ("scale", [12, 18], 250)], way)
    flags = ["--what", "Made up", "--command", "none", "--commit", "0123abc"]
    command([str(tmp_path / "runs"), "--pack", str(tmp_path / "made"), *flags])
    text = page({"made": study_content(tmp_path / "made")})
    table = text.split("At 16x24, by what happens to coordinates: test;")[1].split("!")[0]
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines() if line.startswith("|")]
    assert lines[0] == ["encoding", "interpolated", "ntk-scaled"]
    assert sorted(lines[2:]) == [["none", "25.0", ""], ["rope_axial", "60.0", "80.0"]]


def test_the_command_writes_the_page_and_its_pictures(tmp_path, capsys):
    folder = packed(tmp_path, (0, 1))
    command([str(folder), "--page", str(tmp_path / "docs" / "results.md")])
    assert "results.md is written" in capsys.readouterr().out
    assert (tmp_path / "docs" / "results.md").read_text() == page({"made": study_content(folder)})
    pictures = tmp_path / "docs" / "pictures"
    assert {path.name for path in pictures.iterdir()} == {"results-made-accuracy.svg", "results-made-scale.svg"}
    before = [path.read_bytes() for path in sorted(pictures.iterdir())]
    command([str(folder), "--page", str(tmp_path / "docs" / "results.md")])
    assert before == [path.read_bytes() for path in sorted(pictures.iterdir())]


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (["--pack", "kept"], "--what: not given, and not in kept/study.json"),
        (["--pack", "kept", "--what", "x", "--command", "y"], "--commit: not given"),
        (["--what", "x"], "--what: given without --pack"),
        (["--pack", "kept", "--output", "x"], "--output: given with --pack, which has no use for it"),
        (["--page", "page.md", "--baseline", "none"], "--baseline: given with --page, which has no use for it"),
        (["--page", "page.md", "--pack", "kept"], "--pack: given with --page, which has no use for it"),
        (["--page", "page.md"], "runs: no folder of results/: it has no study.json"),
    ],
)
def test_a_mistake_is_one_line(flags, line, tmp_path, capsys, monkeypatch):
    write_run(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert run_command(lambda: command(["runs", *flags])) == 2
    error = capsys.readouterr().err
    assert line in error
    assert error.count("\n") == 1
    assert not (tmp_path / "kept").exists()


def test_a_file_that_is_no_run_is_refused(tmp_path):
    folder = packed(tmp_path, (0,))
    (folder / "other.json").write_text("[]")
    with pytest.raises(ConfigError, match=r"other.json is no packed run: it needs result, evaluations and right"):
        study_content(folder)
