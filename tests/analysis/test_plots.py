"""Pictures are drawn for every encoding, on the axes they are given."""

from __future__ import annotations

import pytest
import torch
from matplotlib.figure import Figure

import visionpos as vp
from visionpos.analysis import plot_encoding, plots

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
    radii, profile = torch.arange(4.0), torch.arange(8.0).view(2, 4)
    assert plots.plot_decay(radii, profile, ax) is ax
    assert len(ax.lines) == 2
    assert plots.plot_map(torch.eye(3), (1, 1)).images
    assert len(plots.plot_spectrum(torch.eye(4).expand(3, 4, 4)).lines) == 1, "equal heads are one line"
    assert plots.plot_heads(torch.rand(3, 2, 5)).images[0].get_array().shape == (2 * 3, 2 * 6)


def test_picture_file_is_small_and_the_same_every_time(tmp_path):
    for run in "ab":
        plot_encoding("alibi2d", GRID, num_heads=4).savefig(tmp_path / f"{run}.png", metadata={"Software": None})
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert (tmp_path / "a.png").stat().st_size < 60_000
