"""Other sizes: pictures as defined, models as trained, and the accuracy of the run at its own size."""

import json

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

import visionpos as vp
from tests.training.tiny_run import picture_config, task_config
from train.evaluate import command, table
from visionpos.training.errors import ConfigError, run_command
from visionpos.training.run.classification import train
from visionpos.training.run.evaluation import evaluate, on_canvas, scaled, shifted, with_input_size

IMAGES = torch.randint(0, 256, (3, 3, 8, 12), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
SWIN = """{name: swin_tiny_patch4_window7_224,
  options: {patch_size: 2, window_size: 2, embed_dim: 16, depths: [2, 1], num_heads: [2, 2]}}"""


def test_scaling_is_bicubic_antialiased_and_stays_uint8():
    assert torch.equal(scaled(IMAGES, (8, 12)), IMAGES)
    smaller = scaled(IMAGES, (4, 6))
    assert smaller.dtype == torch.uint8
    exact = F.interpolate(IMAGES.double(), (4, 6), mode="bicubic", antialias=True)
    assert (smaller - exact.clamp(0, 255)).abs().max() <= 0.501
    edges = torch.zeros(1, 3, 8, 8, dtype=torch.uint8)
    edges[..., 4:] = 255
    larger = scaled(edges, (16, 16))  # bicubic overshoots here
    assert larger[..., :4].max() == 0
    assert larger[..., -4:].min() == 255


@pytest.mark.parametrize("size", [(8, 12), (12, 12), (10, 20), (16, 24), (21, 31), (64, 64)])
def test_a_canvas_is_filled_by_reflection_around_the_centred_picture(size):
    result = on_canvas(IMAGES, size)
    assert result.shape == (3, 3, *size)
    top, left = (size[0] - 8) // 2, (size[1] - 12) // 2
    assert torch.equal(result[..., top : top + 8, left : left + 12], IMAGES)
    padding = (left, size[1] - 12 - left, top, size[0] - 8 - top)
    if max(padding[2:]) < 8 and max(padding[:2]) < 12:
        assert torch.equal(result.float(), F.pad(IMAGES.float(), padding, mode="reflect"))
    assert torch.equal(
        result[..., top, :][..., : left + 1], on_canvas(IMAGES[..., :1, :], (1, size[1]))[..., 0, : left + 1]
    )


def test_a_canvas_around_one_pixel():
    assert torch.equal(on_canvas(IMAGES[..., :1, :1], (3, 2)), IMAGES[..., :1, :1].expand(-1, -1, 3, 2))


def test_a_swin_keeps_its_windows():
    two = {"depths": (2, 2), "num_heads": (3, 6)}
    model = vp.create_model(
        "swin_tiny_patch4_window7_224", encoding="relative_table", img_size=32, patch_size=2, window_size=4, **two
    )
    larger = with_input_size(model, (48, 32), extrapolate=False)
    assert [stage.blocks[0].window_size for stage in larger.layers] == [
        stage.blocks[0].window_size for stage in model.layers
    ]
    assert model.patch_embed.grid_size == (16, 16)
    assert larger(torch.randn(1, 3, 48, 32)).shape == (1, 1000)


@pytest.mark.parametrize("model", [[], ["--model", SWIN]], ids=["vit", "swin"])
@pytest.mark.parametrize("encoding", ["learned", "rope_axial", "alibi2d"])
def test_a_picture_run_at_other_sizes(model, encoding, tmp_path):
    result = train(picture_config(tmp_path, *model, "--encoding", encoding))
    report = evaluate(tmp_path / "run", [(8, 12), (16, 12), (12, 8)], [(12, 16)])
    assert [(row["how"], row["size"]) for row in report["rows"]] == [
        ("scale", [8, 12]),
        ("scale", [16, 12]),
        ("scale", [12, 8]),
        ("canvas", [12, 16]),
    ]
    assert report["rows"][0]["accuracy"] == result["final"]["test"]
    assert json.loads((tmp_path / "run" / "evaluate.json").read_text()) == report
    assert report["note"] == ""


@pytest.mark.parametrize(("encoding", "named"), [("relative_table", "10x12, canvas 10x14: Swin's"), ("alibi2d", "")])
def test_the_note_names_the_sizes_at_which_a_swin_sees_across_the_border(encoding, named, tmp_path):
    swin = SWIN.replace("window_size: 2", "window_size: 3").replace("[2, 1]", "[2]").replace("[2, 2]", "[2]")
    train(picture_config(tmp_path, "--model", swin, "--encoding", encoding))
    note = evaluate(tmp_path / "run", [(12, 18), (10, 12)], [(10, 14)])["note"]
    assert named in note
    assert ("opposite borders" in note) == bool(named)


def test_a_task_run_on_other_grids_interpolated_and_extrapolated(tmp_path):
    result = train(task_config(tmp_path, "--encoding", "rope_axial"))
    interpolated = evaluate(tmp_path / "run", [(24, 32)])
    extrapolated = evaluate(tmp_path / "run", [(24, 32)], extrapolate=True)
    assert [row["part"] for row in interpolated["rows"]] == ["inside", "outside", "whole"] * 2
    assert [row["accuracy"] for row in interpolated["rows"][:3]] == [
        result["final"][part] for part in ("inside", "outside", "whole")
    ]
    assert extrapolated["coordinates"] == "extrapolated"
    for name, report in (("evaluate", interpolated), ("evaluate_extrapolated", extrapolated)):
        kept = load_file(tmp_path / "run" / f"{name}.safetensors")
        rows = {f"{r['how']} {r['size'][0]}x{r['size'][1]} {r['part']}": r["accuracy"] for r in report["rows"]}
        assert kept.keys() == {*rows, *(f"right {key}" for key in rows)}
        assert {(kept[key].dtype, kept[key].shape) for key in rows} == {(torch.uint8, (report["test_size"],))}
        assert {key: kept[f"right {key}"].float().mean().item() for key in rows} == rows


def test_extrapolation_changes_angles_at_another_size_and_not_at_its_own():
    model = vp.create_model(
        "vit_tiny_patch16_224", encoding="rope_axial", img_size=32, patch_size=8, num_classes=4
    ).eval()
    for size, same in (((32, 32), True), ((48, 64), False)):
        images = torch.randn(2, 3, *size)
        with torch.no_grad():
            outputs = [with_input_size(model, size, extrapolate)(images) for extrapolate in (False, True)]
        assert torch.allclose(*outputs, atol=1e-6) == same


def test_the_table_and_its_command(tmp_path, capsys):
    train(picture_config(tmp_path))
    capsys.readouterr()
    command([str(tmp_path / "run"), "--sizes", "8", "--aspect", "8x16", "--canvas", "16"])
    printed = capsys.readouterr().out
    report = json.loads((tmp_path / "run" / "evaluate.json").read_text())
    assert printed.strip() == table(report)
    for line in (
        "| pictures | test |",
        "| scale 8x12 |",
        "| scale 8x8 |",
        "| scale 8x16 |",
        "| canvas 16x16 |",
    ):
        assert line in printed
    assert "Note: " not in printed  # of copies, for these pictures are what they are


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (["--sizes", "30"], "scale: 30x30 is not a whole number of patches; accepted: multiples of 4x4"),
        (["--sizes", "0"], "scale: 0x0 is not a whole number of patches"),
        (["--aspect", "16x30"], "scale: 16x30 is not"),
        (["--canvas", "8"], "--canvas: 8x8 is smaller than the pictures, 8x12"),
        (["--sizes", "big"], "--sizes: 'big' given; accepted: pixels"),
        (["--size", "8"], "size: no such field; did you mean 'sizes'?"),
    ],
)
def test_a_mistake_is_one_line(flags, line, tmp_path, capsys):
    train(picture_config(tmp_path))
    capsys.readouterr()
    assert run_command(lambda: command([str(tmp_path / "run"), *flags])) == 2
    error = capsys.readouterr().err
    assert line in error
    assert error.count("\n") == 1


def test_what_is_no_run_or_has_no_canvas_is_one_line(tmp_path):
    with pytest.raises(ConfigError, match="is no run directory"):
        evaluate(tmp_path, [])
    train(task_config(tmp_path))
    with pytest.raises(ConfigError, match="--canvas: a position task has no pictures for that; accepted: --sizes"):
        evaluate(tmp_path / "run", [], [(24, 32)])
    (tmp_path / "run" / "checkpoints").rename(tmp_path / "gone")
    with pytest.raises(ConfigError, match="has no checkpoint yet"):
        evaluate(tmp_path / "run", [])


def test_shifted_pictures_come_in_by_reflection():
    images = torch.arange(2 * 3 * 4 * 5, dtype=torch.uint8).view(2, 3, 4, 5)
    moved = shifted(images, (1, 2))
    assert torch.equal(moved[:, :, 1:, 2:], images[:, :, :-1, :-2])
    assert torch.equal(moved[:, :, 0, 2:], images[:, :, 1, :-2])
    assert torch.equal(moved[:, :, 1:, :2], images[:, :, :-1, [2, 1]])


def test_shifts_count_answers_that_stay(tmp_path, capsys):
    train(picture_config(tmp_path, "--encoding", "sincos2d"))
    report = evaluate(tmp_path / "run", [], shifts=[(0, 0), (2, 3)])
    still, moved = report["rows"][1:]
    assert (still["how"], still["size"], still["consistency"]) == ("shift", [0, 0], 1.0)
    assert still["accuracy"] == report["rows"][0]["accuracy"]
    assert 0 <= moved["consistency"] <= 1
    assert "of the answers kept" in table(report)
    with pytest.raises(ConfigError, match="--shifts: 0x12 leaves nothing of the pictures, 8x12"):
        evaluate(tmp_path / "run", [], shifts=[(0, 12)])


def test_a_run_evaluated_with_scaled_frequencies(tmp_path, capsys):
    train(task_config(tmp_path, "--encoding", "[learned, {name: rope_eva}]"))
    run, sizes = tmp_path / "run", [(24, 40)]
    command([str(run), "--sizes", "24x40", "--scaling", "ntk_by_parts"])
    report = json.loads((run / "evaluate_ntk_by_parts.json").read_text())
    assert (report["coordinates"], report["own_coordinates"]) == ("ntk_by_parts-scaled", "interpolated")
    assert "ntk_by_parts-scaled coordinates, where the model has interpolated ones;" in capsys.readouterr().out
    own = evaluate(run, sizes)
    assert own["own_coordinates"] == own["coordinates"]
    assert ", interpolated coordinates, as the model does it;" in table(own)
    answers = {name: load_file(run / f"{name}.safetensors") for name in ("evaluate", "evaluate_ntk_by_parts")}
    trained = [key for key in answers["evaluate"] if "24x40" not in key]
    assert trained
    assert all(torch.equal(*(each[key] for each in answers.values())) for key in trained)


@pytest.mark.parametrize(
    ("encoding", "flags", "said"),
    [
        (
            "rope_mixed",
            ["--scaling", "ntk"],
            "'ntk' given, which the encodings of the run do not take: rope_mixed",
        ),
        ("alibi2d", ["--scaling", "linear"], "do not take: alibi2d"),
        ("rope_axial", ["--scaling", "dynamic"], "'dynamic' given; accepted: one of linear, ntk, ntk_by_parts, yarn"),
        ("rope_axial", ["--scaling", "ntk", "--extrapolate"], "'ntk' given beside --extrapolate; accepted: one of"),
    ],
)
def test_a_scaling_that_cannot_be_is_one_line(encoding, flags, said, tmp_path, capsys):
    train(task_config(tmp_path, "--encoding", encoding))
    with pytest.raises(ConfigError, match=said):
        command([str(tmp_path / "run"), "--sizes", "24", *flags])


@pytest.mark.parametrize("scaling", ["linear", "ntk", "ntk_by_parts", "yarn"])
def test_a_scaling_changes_a_model_at_another_size_and_not_at_its_own(scaling):
    model = vp.create_model("vit_tiny_patch16_224", encoding="rope_axial", img_size=32, patch_size=8, num_classes=4)
    for size, same in (((32, 32), True), ((48, 64), False)):
        images = torch.randn(2, 3, *size)
        with torch.no_grad():
            outputs = [with_input_size(model.eval(), size, True, option)(images) for option in (None, scaling)]
        assert torch.equal(*outputs) == same
