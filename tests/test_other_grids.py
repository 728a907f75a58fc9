"""What an encoding does on another grid than the trained one: one way, however it was asked for, and the one shown."""

from __future__ import annotations

import copy

import pytest
import timm
import torch

import visionpos as vp
from tests.small import needs_newer_timm
from visionpos.analysis import measure
from visionpos.analysis.kernel import build

WAYS = {  # of the papers, where they have one
    "run_on": [
        *("rope_axial", "rope_mixed", "rope1d", "string", "lookhere", "alibi", "alibi2d", "sinusoidal"),
        *("harope", "t5", "kerple", "pape", "shaw", "irpe", "peg", "lepe"),
    ],
    "interpolate": ["rope_eva", "sincos2d"],
    "formula": ["rope_dinov3", "rope_golden", "rope_spiral", "comrope", "liere", "fire", "log_cpb", "fourier", "none"],
    "resize": ["learned", "learned2d", "factorized", "abs_win", "relative_table", "decomposed"],
}
FREE = [name for way in ("run_on", "interpolate") for name in WAYS[way] if name not in ("peg", "lepe")]
SIZE, LARGER = (16, 24), (40, 24)  # grids of 4 x 6 and 10 x 6 patches
VIT = {"img_size": SIZE, "patch_size": 4, "embed_dim": 48, "depth": 2, "num_heads": 3, "num_classes": 5}


def pictures(size):
    return torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(0))


def vit(encoding):
    torch.manual_seed(0)
    model = vp.create_model("vit_tiny_patch16_224", encoding=encoding, dynamic_img_size=True, **VIT).eval()
    for weight in model.parameters():
        if weight.ndim > 1:
            torch.nn.init.normal_(weight, std=0.3)
    return model


@pytest.mark.parametrize("way", WAYS)
def test_the_way_is_declared_and_told(way):
    for name in WAYS[way]:
        assert vp.encoding_info(name)["extrapolation"] == way, name


@pytest.mark.parametrize("name", FREE)
def test_by_name_or_with_options_it_is_one_function_at_every_size(name):
    model, spelled = vit(name), vit({"name": name, "extrapolate": None})
    explicit, other = (
        vit({"name": name, "extrapolate": way}) for way in (name in WAYS["run_on"], name not in WAYS["run_on"])
    )
    with torch.no_grad():
        for size in (SIZE, LARGER):
            want = model(pictures(size))
            assert torch.equal(spelled(pictures(size)), want)
            assert torch.equal(explicit(pictures(size)), want)
            assert torch.allclose(other(pictures(size)), want, atol=1e-5) == (size == SIZE)


ROPES = {
    "rope_axial": {"rope_type": "cat", "rope_grid_indexing": "xy", "rope_temperature": 50.0},
    "rope_mixed": {"rope_type": "mixed", "rope_grid_indexing": "xy"},
    "rope_eva": {"rope_type": "cat", "rope_grid_indexing": "ij", "rope_temperature": 10000.0, "ref_feat_shape": (3, 5)},
    "rope_dinov3": {"rope_type": "dinov3", "rope_grid_indexing": "ij"},
}


def rope_vit(options):
    torch.manual_seed(0)
    shape = {"embed_dim": 48, "depth": 2, "num_heads": 3, "num_classes": 5, "dynamic_img_size": True}
    rope = {"use_rot_pos_emb": True, "use_abs_pos_emb": False, **options}
    model = timm.models.Eva(img_size=SIZE, patch_size=4, **shape, **rope).eval()
    for weight in model.parameters():
        if weight.ndim > 1:
            torch.nn.init.normal_(weight, std=0.3)
    return model


@pytest.mark.parametrize(  # timm's own rope of DINOv3 is another function at another size before
    "name", [pytest.param(name, marks=needs_newer_timm) if name == "rope_dinov3" else name for name in ROPES]
)
def test_a_host_s_own_rope_kept_and_one_built_anew_are_one_function_at_every_size(name):
    plain = rope_vit(ROPES[name])
    kept = vp.set_encoding(copy.deepcopy(plain), name)
    (own, *_) = vp.get_encoding(kept)
    anew = vp.set_encoding(copy.deepcopy(plain), {"name": name, "temperature": own.temperature, "layout": own.layout})
    for old, new in zip(vp.get_encoding(kept), vp.get_encoding(anew), strict=True):
        assert old is not new
        assert getattr(old, "reference_shape", None) == getattr(new, "reference_shape", None)
        if name == "rope_mixed":
            with torch.no_grad():
                new.freqs.copy_(old.freqs)
    with torch.no_grad():
        for size in (SIZE, LARGER):
            want = plain(pictures(size))
            assert (kept(pictures(size)) - want).abs().max() < 2e-5 * want.abs().max()
            assert torch.equal(anew(pictures(size)), kept(pictures(size)))


def test_a_host_s_rope_that_runs_on_against_its_paper_says_so():
    plain = rope_vit({**ROPES["rope_eva"], "ref_feat_shape": None})
    (own,) = vp.get_encoding(copy.deepcopy(plain))
    assert (own.name, own.extrapolate, own.reference_shape) == ("rope_eva", True, (4, 6))
    assert "scaling='run_on'" in repr(own)


def test_fields_of_view_on_a_larger_grid_are_those_of_the_paper_s_code():
    """Raw grid steps: a key in the same column is right below or above at every size."""
    bias = vp.get_encoding(vit({"name": "lookhere", "preset": "lh180"}))[0].bias(vp.Positions.grid((10, 6)))
    rows = torch.arange(60) // 6
    assert torch.equal(bias[0] < -9e3, rows[None, :] > rows[:, None])


@pytest.mark.parametrize("name", ["rope_axial", "sincos2d", "alibi2d", "log_cpb", "relative_table"])
def test_what_is_measured_is_what_a_model_has(name):
    grid, larger = (4, 6), vp.Positions.grid((9, 7))
    shape = {"embed_dim": 192, "num_heads": 3, "depth": 12, "img_size": (16, 24), "patch_size": 4, "num_classes": 0}
    model = vp.create_model("vit_tiny_patch16_224", encoding=name, class_token=False, global_pool="avg", **shape)
    own, shown = vp.get_encoding(model)[0], build(name, grid)
    shown.load_state_dict(own.state_dict())
    compute = {"input": "embed", "rotary": "angles", "bias": "bias"}[own.place]
    assert torch.equal(getattr(own, compute)(larger), getattr(shown, compute)(larger))


def test_running_on_and_interpolating_are_measured_apart():
    found = [
        measure("alibi2d", (3, 5), (6, 10), ["sup_norm", "growth_exponent"], extrapolate=way)
        for way in (None, True, False)
    ]
    assert found[0] == found[1]
    assert found[0]["sup_norm"] == pytest.approx((5**2 + 9**2) ** 0.5 / 4)
    assert found[2]["sup_norm"] == pytest.approx((2**2 + 4**2) ** 0.5 / 4)
    assert found[0]["growth_exponent"] == found[2]["growth_exponent"]


def test_offsets_that_were_trained_are_those_that_the_encoding_gets():
    keys = ["support_pairs", "support_offsets"]
    assert measure("rope_axial", (14, 14), (28, 28), keys) == pytest.approx(
        {"support_pairs": 0.536, "support_offsets": 0.241}, abs=5e-4
    )
    assert measure("rope_axial", (14, 14), (28, 21), keys, extrapolate=False) == dict.fromkeys(keys, 1.0)
    for name in ("rope_dinov3", "rope_spiral"):
        assert "a frame of its own" in str(measure(name, (3, 5), (6, 10), keys)["support_pairs"])
        raw = measure("rope_axial", (3, 5), (6, 10), keys)
        assert measure(name, (3, 5), (6, 10), keys, extrapolate=True) == raw
