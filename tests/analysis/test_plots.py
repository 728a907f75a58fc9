"""Pictures are drawn for every encoding, on the axes they are given."""

from __future__ import annotations

import pytest
import timm
import torch
from matplotlib.figure import Figure

import visionpos as vp
from visionpos.analysis import classics, plot_encoding, plots

GRID = (3, 5)


@pytest.mark.parametrize("name", vp.list_encodings())
def test_every_encoding_has_a_picture(name):
    figure = plot_encoding(name, GRID)
    small, large = figure.axes[:2]
    if name == "none":
        assert any("encodes nothing" in text.get_text() for text in figure.texts)
        return
    assert small.images[0].get_array().shape == GRID
    assert name in figure.get_suptitle()
    if vp.encoding_info(name)["extrapolation"] != "error":
        assert large.images[0].get_array().shape == (6, 10)
        told = {"run_on": "running on", "interpolate": "interpolated", "formula": "own frame", "resize": "resized"}
        assert told[vp.encoding_info(name)["extrapolation"]] in large.get_title()
        assert large.images[0].get_clim() == small.images[0].get_clim(), "one colour scale"


def test_an_encoding_that_interpolates_is_also_drawn_running_on():
    panels = {name: plot_encoding(name, GRID).axes for name in ("sincos2d", "rope_axial")}
    assert panels["sincos2d"][2].get_title() == "twice, running on: 6 x 10"
    drawn = [ax.images[0].get_array() for ax in panels["sincos2d"][1:3]]
    assert abs(drawn[0] - drawn[1]).max() > 1
    assert not any("6 x 10" in ax.get_title() for ax in panels["rope_axial"][2:])


def test_axes_are_used_and_returned():
    ax = Figure().subplots()
    assert plots.plot_map(torch.eye(3), (1, 1), ax) is ax
    assert len(plots.plot_spectrum(torch.eye(4).expand(3, 4, 4)).lines) == 1, "equal heads are one line"
    assert plots.plot_heads(torch.rand(3, 2, 5)).images[0].get_array().shape == (2 * 3, 2 * 6)


def test_the_course_from_the_centre_averages_no_directions():
    y, x = torch.meshgrid(torch.arange(4.0), torch.arange(6.0), indexing="ij")
    ax = plots.plot_decay(10 * y + x, (2, 3))
    courses = {line.get_label(): [tuple(point) for point in line.get_xydata().tolist()] for line in ax.lines}
    root = 2**0.5
    assert courses["row"] == [(step, 23 + step) for step in range(-3, 3)]
    assert courses["column"] == [(step, 23 + 10 * step) for step in range(-2, 2)]
    assert courses["diagonal"] == [(step * root, 23 + 11 * step) for step in range(-2, 2)]


def test_heads_have_one_scale():
    rows = torch.stack([torch.full((2, 3), 1.0), torch.full((2, 3), 5.0)])
    image = plots.plot_heads(rows).images[0]
    assert image.get_clim() == (1, 5)


@pytest.mark.parametrize("place", [None, "input", "rotary"])
def test_a_model_is_drawn_with_its_own_weights(place):
    spec = ["learned", {"name": "rope_axial", "layers": "1::2"}]
    spec = [each for each, at in zip(spec, ("input", "rotary"), strict=True) if place in (None, at)]
    model = vp.create_model("vit_tiny_patch16_224", spec, img_size=(32, 48), patch_size=8, depth=3)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    if place != "rotary":
        with torch.no_grad():
            model.pos_embed.zero_()[:, 1 + 2 * 6 + 3] = 7 / model.embed_dim**0.5  # of the centre (2, 3) alone
    figure = vp.plot_encoding(model)
    titles = [row.get_suptitle() for row in figure.subfigs]
    wanted = ["stem: learned: inner product", "layers 1, here the first: rope_axial: mean cosine"]
    assert len(titles) == len(spec)
    assert all(any(title.startswith(want) for want in wanted) for title in titles)
    for row in figure.subfigs:
        assert row.axes[0].get_title() == "trained: 4 x 6"
    if place != "rotary":
        drawn = torch.as_tensor(figure.subfigs[0].axes[0].images[0].get_array().data)
        assert drawn[2, 3].item() == pytest.approx(49, rel=1e-6)
        assert drawn.sum().item() == pytest.approx(49, rel=1e-6)
        assert not torch.equal(model.pos_embed, before["pos_embed"])
    assert model.state_dict().keys() == before.keys()


def test_a_model_that_was_never_converted_stays_what_it_is():
    model = timm.create_model(
        "swin_tiny_patch4_window7_224", img_size=56, depths=(1, 1), embed_dim=24, num_heads=(2, 3)
    )
    figure = vp.plot_encoding(model)
    assert type(model).__module__.startswith("timm.")
    assert [row.get_suptitle().split(", ")[0] for row in figure.subfigs] == ["layers 0 - 1"]
    with pytest.raises(ValueError, match="not a supported host"):
        vp.plot_encoding(torch.nn.Linear(2, 3))
    with pytest.raises(ValueError, match=r"options are for a name.*temperature"):
        vp.plot_encoding(model, temperature=3)


def test_a_notebook_shows_the_picture_itself():
    png = vp.plot_encoding("alibi2d", GRID)._repr_png_()
    width, height = (int.from_bytes(png[start : start + 4], "big") for start in (16, 20))
    assert (png[:4], width, height) == (b"\x89PNG", round(4 * 2.75 * 144), int(2.9 * 144))


def test_the_mosaic_has_the_cosines_of_each_patch_in_its_tile():
    encoding = vp.create_encoding("sincos2d", dim=32)
    mosaic = classics.plot_similarity(encoding, GRID).axes[0].images[0].get_array()
    table = torch.nn.functional.normalize(encoding.embed(vp.Positions.grid(GRID)), dim=-1)
    for y, x in ((0, 0), (2, 1), (1, 4)):
        tile = torch.as_tensor(mosaic.data[y * 4 : y * 4 + 3, x * 6 : x * 6 + 5])
        torch.testing.assert_close(tile.flatten().float(), table @ table[y * 5 + x])


def test_classics_of_the_other_places():
    stripes = classics.plot_stripes("sinusoidal", GRID).axes[0].images[0].get_array()
    table = vp.create_encoding("sinusoidal", dim=192).embed(vp.Positions.grid(GRID))
    torch.testing.assert_close(torch.as_tensor(stripes.data).float(), table)
    index = classics.plot_relative_index((2, 3)).axes[0].images[0].get_array()
    assert index.tolist() == vp.relative_position_index((2, 3)).view(6, 6).tolist()
    points = torch.as_tensor(classics.plot_frequencies("rope_axial", GRID).axes[0].collections[0].get_offsets().data)
    assert points.abs().min(1).values.max() < 1e-9, "axial frequencies lie on the axes"
    mixed = torch.as_tensor(classics.plot_frequencies("rope_golden", GRID).axes[0].collections[0].get_offsets().data)
    assert mixed.abs().min(1).values.max() > 1e-3
    model = vp.create_model("vit_tiny_patch16_224", "learned", img_size=(32, 48), patch_size=8, depth=1)
    assert classics.plot_similarity(model).axes[0].images[0].get_array().shape == (4 * 5, 6 * 7)
    for draw, wrong in ((classics.plot_similarity, "alibi"), (classics.plot_frequencies, model)):
        with pytest.raises(ValueError, match="place"):
            draw(wrong)


def test_picture_file_is_small_and_the_same_every_time(tmp_path):
    for run in "ab":
        plot_encoding("alibi2d", GRID, num_heads=4).savefig(tmp_path / f"{run}.png", metadata={"Software": None})
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert (tmp_path / "a.png").stat().st_size < 60_000
