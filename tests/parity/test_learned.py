import pytest
import torch
from timm.layers import resample_abs_pos_embed

import visionpos as vp


@pytest.mark.parametrize("prefix", [0, 1, 2])
@pytest.mark.parametrize("grid", [(3, 5), (4, 2)])
def test_is_a_table_added_to_the_tokens(grid, prefix):
    encoding = vp.create_encoding("learned", dim=6, feat_shape=grid, num_prefix_tokens=prefix, init_std=1.0)
    count = prefix + grid[0] * grid[1]
    assert encoding.pos_embed.shape == (1, count, 6)
    x = torch.randn(2, count, 6)
    assert torch.equal(encoding(x, vp.Positions.grid(grid, prefix)), x + encoding.pos_embed)


@pytest.mark.parametrize(("old", "new"), [((3, 5), (6, 4)), ((4, 4), (8, 2)), ((7, 7), (5, 9))])
def test_another_grid_is_resized_as_in_timm(old, new):
    encoding = vp.create_encoding("learned", dim=6, feat_shape=old, num_prefix_tokens=1, init_std=1.0)
    want = resample_abs_pos_embed(encoding.pos_embed, new, old, num_prefix_tokens=1)
    x = torch.zeros(1, 1 + new[0] * new[1], 6)
    assert (encoding(x, vp.Positions.grid(new, 1)) - want).abs().max() < 5e-6


@pytest.mark.parametrize("antialias", [True, False])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_options_of_resizing(interpolation, antialias):
    options = {"interpolation": interpolation, "antialias": antialias}
    encoding = vp.create_encoding("learned", dim=6, feat_shape=(7, 8), init_std=1.0, **options)
    table = encoding.pos_embed.unflatten(1, (7, 8)).movedim(-1, 1)
    want = torch.nn.functional.interpolate(table, (5, 4), mode=interpolation, antialias=antialias)
    assert (encoding.embed(vp.Positions.grid((5, 4))) - want[0].flatten(1).T).abs().max() < 5e-6


@pytest.mark.parametrize("init_std", [0.02, 0.5])
def test_init_std(init_std):
    torch.manual_seed(0)
    encoding = vp.create_encoding("learned", dim=64, feat_shape=(16, 12), init_std=init_std)
    assert encoding.pos_embed.std().item() == pytest.approx(init_std, rel=0.03)
    assert vp.encoding_info("learned")["options"]["init_std"] == 0.02
    assert vp.create_encoding("relative_table", num_heads=2, feat_shape=(3, 5)).init_std == 0.02


def test_real_coordinates_are_read_bilinearly():
    encoding = vp.create_encoding("learned", dim=4, feat_shape=(2, 3), init_std=1.0)
    table = encoding.embed(vp.Positions(torch.tensor([[0.5, 1.0]]), (2, 3)))
    assert (table[0] - encoding.pos_embed[0, [1, 4]].mean(0)).abs().max() < 1e-6


def test_wrong_number_of_prefix_tokens():
    encoding = vp.create_encoding("learned", dim=4, feat_shape=(2, 3), num_prefix_tokens=1)
    with pytest.raises(ValueError, match="learned has num_prefix_tokens=1, got 2"):
        encoding(torch.zeros(1, 8, 4), vp.Positions.grid((2, 3), 2))
    with pytest.raises(ValueError, match="x has 5 channels, but learned was built with dim=4"):
        encoding(torch.zeros(1, 7, 5), vp.Positions.grid((2, 3), 1))
