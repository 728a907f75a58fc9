"""Scaled frequencies: golden values in float64, an oracle by hand, and that nothing changes on the trained grid."""

from __future__ import annotations

import doctest
import math

import pytest
import torch

import visionpos as vp
from visionpos.analysis import page
from visionpos.rotary.scaling import FrequencyRotary

AXIAL = ["rope_axial", "rope_eva"]
SCALINGS = ["linear", "ntk", "ntk_by_parts", "yarn"]

# Bands 0, 1, 2, 7 and 15 of an axis of 64 channels of a head, on 28 cells after 14; computed elsewhere, in float64.
GOLDEN = {
    (100.0, "ntk"): (1, 0.716030190, 0.512699232, 0.096498227, 0.006667607),
    (100.0, "yarn"): (1, 0.624911841, 0.374894217, 0.066676072, 0.006667607),
    (100.0, "ntk_by_parts"): (1, 0.716030190, 0.512699232, 0.066676072, 0.006667607),
    (1e4, "ntk"): (1, 0.536946893, 0.288311966, 0.012868245, 0.0000889140),
    (1e4, "yarn"): (1, 0.421755994, 0.158113883, 0.008891397, 0.0000889140),
    (1e4, "ntk_by_parts"): (1, 0.536946893, 0.158113883, 0.008891397, 0.0000889140),
}


def grid64(shape, prefix=0):
    return vp.Positions(vp.Positions.grid(shape).coords.double(), shape, prefix, is_grid=True)


def frequencies(name, shape, **options):
    """What multiplies y and x, (2, head_dim / 4) each: the angles of the second row and of the second column."""
    encoding = vp.create_encoding(name, num_heads=1, **{"head_dim": 64, **options})
    angles = encoding.angles(grid64(shape))[0].unflatten(0, shape)
    down, right = angles[1, 0], angles[0, 1]
    count = encoding.head_dim // 4
    return torch.stack([down[count:], right[:count]] if name == "rope_axial" else [down[:count], right[count:]])


@pytest.mark.parametrize("name", AXIAL)
@pytest.mark.parametrize(("temperature", "scaling"), GOLDEN)
def test_golden_values(name, temperature, scaling):
    found = frequencies(name, (28, 28), temperature=temperature, reference_shape=(14, 14), scaling=scaling)
    expected = torch.tensor(GOLDEN[temperature, scaling], dtype=torch.float64)
    assert (found[:, [0, 1, 2, 7, 15]] - expected).abs().max() < 1e-9


def by_hand(kind, n, trained, count, temperature, fast=32.0, slow=1.0):
    """The frequencies of one axis, number by number."""
    s, d, found = max(1.0, n / trained), 2 * count, []

    def share(j, fast, slow):
        low, high = (d * math.log(trained / (2 * math.pi * r)) / (2 * math.log(temperature)) for r in (fast, slow))
        low, high = max(math.floor(low), 0), min(math.ceil(high), d - 1)
        return min(max((j - low) / (high - low if high > low else 0.001), 0.0), 1.0)

    for j in range(count):
        b = temperature ** (-2 * j / d)
        ntk = (temperature * s ** (d / (d - 2))) ** (-2 * j / d)
        if kind == "linear":
            found.append(b / s)
        elif kind == "ntk":
            found.append(ntk)
        elif kind == "yarn":
            m = 1 - share(j, fast, slow)
            found.append(b * (m + (1 - m) / s))
        else:
            m = 1 - share(j, 1.25, 0.75)
            g = m * ntk + (1 - m) * b / s
            m = 1 - share(j, 16.0, 2.0)
            found.append(m * b + (1 - m) * g)
    return found


@pytest.mark.parametrize("kind", SCALINGS)
@pytest.mark.parametrize(("shape", "trained"), [((9, 40), (3, 17)), ((5, 30), (10, 13)), ((64, 48), (64, 20))])
def test_each_axis_is_scaled_by_its_own_cells_and_only_where_there_are_more(kind, shape, trained):
    found = frequencies("rope_axial", shape, head_dim=40, temperature=77.0, reference_shape=trained, scaling=kind)
    for axis, (n, before) in enumerate(zip(shape, trained, strict=True)):
        expected = torch.tensor(by_hand(kind, n, before, 10, 77.0), dtype=torch.float64)
        assert (found[axis] - expected).abs().max() < 1e-12


def test_one_scale_for_all_axes_is_the_largest():
    options = {"head_dim": 24, "temperature": 50.0, "scaling": {"type": "ntk", "trained": [6, 8], "per_axis": False}}
    found = frequencies("rope_axial", (9, 40), **options)
    expected = torch.tensor(by_hand("ntk", 40, 8, 6, 50.0), dtype=torch.float64)
    assert (found - expected).abs().max() < 1e-12


def test_the_constants_of_yarn_are_options():
    scaling = {"type": "yarn", "trained": (14, 20), "beta_fast": 2.0, "beta_slow": 0.5}
    found = frequencies("rope_eva", (28, 30), temperature=100.0, scaling=scaling)
    for axis, (n, before) in enumerate(((28, 14), (30, 20))):
        expected = torch.tensor(by_hand("yarn", n, before, 16, 100.0, 2.0, 0.5), dtype=torch.float64)
        assert (found[axis] - expected).abs().max() < 1e-12
    assert (found[0] - frequencies("rope_eva", (28, 30), temperature=100.0, reference_shape=(14, 20), scaling="yarn")[0]
            ).abs().max() > 0.05  # fmt: skip


@pytest.mark.parametrize(("shape", "factor"), [((28, 14), 1.069314718), ((14, 56), 1.138629436), ((14, 14), 1.0)])
def test_yarn_lengthens_what_turns_and_leaves_prefix_tokens(shape, factor):
    options = {"num_heads": 2, "head_dim": 8, "reference_shape": (14, 14)}
    q = torch.randn(1, 2, 2 + shape[0] * shape[1], 8, dtype=torch.float64)
    turned, _ = vp.create_encoding("rope_axial", **options, scaling="yarn")(q, q, grid64(shape, 2))
    assert torch.equal(turned[:, :, :2], q[:, :, :2])
    ratio = turned[:, :, 2:].norm(dim=-1) / q[:, :, 2:].norm(dim=-1)
    assert (ratio - factor).abs().max() < 1e-9
    flat = {"type": "yarn", "attention_slope": 0.0}
    turned, _ = vp.create_encoding("rope_axial", **options, scaling=flat)(q, q, grid64(shape, 2))
    assert (turned.norm(dim=-1) / q.norm(dim=-1) - 1).abs().max() < 1e-12


def options_of(name):
    return SCALINGS if name not in ("rope_mixed", "string") else ["linear"]


NAMES = ("rope1d", *AXIAL, "rope_mixed", "string", "rope_dinov3", "rope_golden", "rope_spiral", "harope")
SCALED = [(name, scaling) for name in NAMES for scaling in options_of(name)]


@pytest.mark.parametrize(("name", "scaling"), SCALED)
def test_no_bit_changes_where_the_grid_is_not_larger(name, scaling):
    trained = (5, 7)
    for grid in ((5, 7), (3, 7), (5, 2)):
        found = []
        for option in ("run_on", scaling):
            torch.manual_seed(0)
            encoding = vp.create_encoding(name, num_heads=2, head_dim=16, reference_shape=trained, scaling=option)
            found.append(encoding.prepare(vp.Positions.grid(grid, num_prefix_tokens=1)))
        cosines = [each[0] if isinstance(each, tuple) else each for each in found]
        assert torch.equal(*cosines)


@pytest.mark.parametrize(("name", "scaling"), SCALED)
def test_a_subset_gets_the_angles_of_the_whole_grid(name, scaling):
    torch.manual_seed(0)
    encoding = vp.create_encoding(name, num_heads=2, head_dim=16, reference_shape=(3, 4), scaling=scaling)
    whole = vp.Positions.grid((9, 5), num_prefix_tokens=1)
    index = torch.tensor([[0, 17, 3, 8], [44, 2, 1, 0]])
    kept = encoding.prepare(whole.keep(index))
    taken = encoding.take_tokens(encoding.prepare(whole), index, 1)
    assert all(map(torch.equal, kept, taken)) if isinstance(kept, tuple) else torch.equal(kept, taken)
    on = vp.create_encoding(name, num_heads=2, head_dim=16, reference_shape=(3, 4), scaling="run_on")
    on.load_state_dict(encoding.state_dict())
    assert (encoding.angles(whole) - on.angles(whole)).abs().max() > 0.1


def test_the_index_is_one_axis_of_all_tokens():
    encoding = vp.create_encoding("rope1d", num_heads=1, head_dim=12, reference_shape=(3, 4), scaling="ntk")
    found = encoding.angles(grid64((6, 5)))[0, 1]  # 30 tokens after 12
    assert (found - torch.tensor(by_hand("ntk", 30, 12, 6, 1e4), dtype=torch.float64)).abs().max() < 1e-12


@pytest.mark.parametrize("name", ["rope_mixed", "string"])
def test_learned_frequencies_shrink_along_each_axis(name):
    torch.manual_seed(0)
    encoding = vp.create_encoding(name, num_heads=2, head_dim=8, reference_shape=(3, 4), scaling="linear")
    coords = grid64((6, 10)).coords
    shrunk = vp.Positions(coords / torch.tensor([2.0, 2.5], dtype=torch.float64), (3, 4))
    assert (encoding.angles(grid64((6, 10))) - encoding.angles(shrunk)).abs().max() < 1e-12


def test_linear_is_what_eva_does_by_itself():
    options = {"num_heads": 1, "head_dim": 16, "reference_shape": (4, 6)}
    own, linear, ends = (
        vp.create_encoding("rope_eva", **options, scaling=way).angles(grid64((9, 8)))
        for way in (None, "linear", "interpolate")
    )
    assert (own - linear).abs().max() < 1e-12
    assert torch.equal(own, ends)


@pytest.mark.parametrize("name", ["rope_axial", "rope_eva", "rope_mixed"])
def test_extrapolate_is_short_for_two_of_the_scalings(name):
    for short, scaling in ((True, "run_on"), (False, "interpolate")):
        torch.manual_seed(0)
        one = vp.create_encoding(name, num_heads=2, head_dim=8, reference_shape=(3, 4), extrapolate=short)
        torch.manual_seed(0)
        other = vp.create_encoding(name, num_heads=2, head_dim=8, reference_shape=(3, 4), scaling=scaling)
        assert one.scaling == other.scaling == scaling
        assert one.extrapolate is other.extrapolate is short
        assert torch.equal(one.angles(vp.Positions.grid((5, 9))), other.angles(vp.Positions.grid((5, 9))))


BAD = [
    ("rope_axial", {"scaling": "ntk"}, r"rope_axial: scaling='ntk' needs the grid that was trained on: give reference"),
    ("rope_axial", {"scaling": "run_on", "extrapolate": False}, "scaling='run_on' and extrapolate=False contradict"),
    ("rope_eva", {"scaling": "yarn", "extrapolate": True, "reference_shape": (3, 4)}, "contradict each other"),
    ("rope_axial", {"scaling": "dynamic"}, "scaling must be 'interpolate', 'run_on', 'linear'.* got 'dynamic'"),
    ("rope_axial", {"scaling": {"type": "ntk", "factor": 2}}, "scaling must be .* got {'factor': 2, 'type': 'ntk'}"),
    ("rope_axial", {"scaling": {"type": "ntk", "beta_fast": 2.0}}, "scaling must be .* of yarn also .*beta_fast"),
    ("rope_axial", {"scaling": {"type": "yarn", "beta_fast": 1.0, "beta_slow": 2.0}}, "scaling must be"),
    ("rope_axial", {"scaling": {"trained": (3, 4)}}, "scaling must be"),
    ("rope_axial", {"scaling": {"type": "linear", "trained": (0, 4)}}, "scaling must be"),
    ("rope_axial", {"scaling": True}, "scaling must be .* got True"),
    (
        "rope_mixed",
        {"scaling": "ntk"},
        "rope_mixed: scaling must be one of 'interpolate', 'run_on', 'linear' or",
    ),
    ("string", {"scaling": {"type": "linear"}}, "string: scaling must be one of 'interpolate'"),
    ("liere", {"scaling": "linear"}, "liere has no option 'scaling'"),
    ("comrope", {"scaling": "linear"}, "comrope has no option 'scaling'"),
]


@pytest.mark.parametrize(("name", "options", "message"), BAD)
def test_what_cannot_be_is_one_line(name, options, message):
    with pytest.raises(ValueError, match=message) as error:
        vp.create_encoding(name, **{"num_heads": 2, "head_dim": 8, **options})
    assert "\n" not in str(error.value)


def test_turns_need_falling_frequencies():
    options = {"num_heads": 1, "head_dim": 16, "reference_shape": (3, 4), "temperature": 1.0}
    with pytest.raises(ValueError, match="temperature must be more than 1"):
        vp.create_encoding("rope_axial", **options, scaling="yarn").angles(vp.Positions.grid((5, 6)))


@pytest.mark.parametrize("scaling", [None, "run_on", *SCALINGS, {"type": "yarn", "trained": (2, 3), "beta_slow": 0.5}])
def test_in_a_model_it_is_taken_saved_and_of_effect_on_a_larger_picture_alone(scaling):
    shape = {"img_size": (16, 24), "patch_size": 4, "embed_dim": 48, "depth": 2, "num_heads": 3, "num_classes": 5}

    def build(option):
        torch.manual_seed(0)
        spec = {"name": "rope_axial", "scaling": option}
        return vp.create_model("vit_tiny_patch16_224", encoding=spec, dynamic_img_size=True, **shape).eval()

    model, plain = build(scaling), build("run_on")
    (encoding,) = vp.get_encoding(model)
    assert isinstance(encoding, FrequencyRotary)
    assert encoding.reference_shape == (4, 6)
    vp.set_encoding(model, vp.get_encoding(model))
    assert model._model_args["encoding"][0]["scaling"] == scaling
    x = torch.randn(1, 3, 40, 24)
    with torch.no_grad():
        if not isinstance(scaling, dict):
            assert torch.equal(model(x[:, :, :16]), plain(x[:, :, :16]))
        assert torch.equal(model(x), plain(x)) == (scaling in (None, "run_on"))


@pytest.mark.parametrize("layout", ["interleaved", "half"])
def test_the_gradient_of_a_lengthened_table(layout):
    from visionpos.rotary.split import split_qkv

    angles = torch.randn(1, 3, 2, dtype=torch.float64, requires_grad=True)
    qkv = torch.randn(2, 3, 3, 2, 4, dtype=torch.float64, requires_grad=True)

    def turned(qkv, angles):
        return split_qkv(qkv, 1.3 * torch.stack([angles.cos(), angles.sin()]), layout)

    assert torch.autograd.gradcheck(turned, (qkv, angles))
    assert torch.autograd.gradgradcheck(turned, (qkv, angles))


BOXES = {
    "rope_dinov3": [{}, {"min_period": 0.3, "max_period": 9.0}, {"normalize": "max"}],
    "rope_golden": [{}, {"zero_fraction": 0.25}, {"num_directions": 4}],
    "rope_spiral": [{}, {"num_directions": 8, "reference_side": 6}],
}


@pytest.mark.parametrize(("name", "options"), [(name, options) for name in BOXES for options in BOXES[name]])
def test_a_box_stays_by_itself_and_otherwise_grows_with_the_grid(name, options):
    def build(**more):
        return vp.create_encoding(name, num_heads=2, head_dim=32, reference_shape=(4, 6), **options, **more)

    trained, larger, smaller = (grid64(shape) for shape in ((4, 6), (8, 12), (3, 5)))
    own, box, on = build(), build(extrapolate=False), build(scaling="run_on")
    for grid in (trained, larger):
        assert torch.equal(own.angles(grid), box.angles(grid))
    for scaling in ("run_on", *SCALINGS):
        assert torch.equal(build(scaling=scaling).angles(trained), own.angles(trained))
        assert torch.equal(build(scaling=scaling).angles(smaller), on.angles(smaller))

    def steps(encoding, grid):
        """The angles of one step down and of one step right, (2, heads, pairs)."""
        angles = encoding.angles(grid).unflatten(1, grid.feat_shape)
        return torch.stack([angles[:, 1, 0] - angles[:, 0, 0], angles[:, 0, 1] - angles[:, 0, 0]])

    before = steps(own, trained)
    assert (steps(on, larger) - before).abs().max() < 1e-12  # a step is what it was
    assert (steps(build(scaling="linear"), larger) - before / 2).abs().max() < 1e-12
    turns = before.abs() > 1e-12
    kept = {kind: (steps(build(scaling=kind), larger) / before)[turns] for kind in ("ntk", "ntk_by_parts", "yarn")}
    for kind, shares in kept.items():
        assert shares.min() == pytest.approx(0.5), kind  # the slowest
        assert shares.max() <= 1 + 1e-12, kind
    assert kept["ntk"].max() == pytest.approx(1.0)
    every = build(scaling={"type": "yarn", "beta_fast": 1e-7, "beta_slow": 1e-8})
    assert (steps(every, larger) - before).abs().max() < 1e-12  # all make more turns than that


def test_the_ramp_of_a_box_is_by_turns_on_the_trained_grid():
    """Periods 1, 100^(1/4) ... of a box of length 2: 2, 0.63, 0.2 and 0.063 turns on any trained grid."""
    scaling = {"type": "yarn", "beta_fast": 2.0, "beta_slow": 0.2, "attention_slope": 0.0}
    for trained in ((4, 6), (14, 20)):
        options = {"num_heads": 1, "head_dim": 16, "reference_shape": trained}
        doubled = tuple(2 * n for n in trained)
        kept, on = (
            vp.create_encoding("rope_dinov3", **options, scaling=way).angles(grid64(doubled))[0, -1, :4]
            for way in (scaling, "run_on")
        )
        assert (kept / on).tolist() == pytest.approx([1.0, 0.75, 0.5, 0.5])


def of_axes(angles, preset):
    """The angles of pairs by axis, (y, x), of one token of rope_axial."""
    count = len(angles) // 2
    halves = {
        "rope_vit": (angles[count:], angles[:count]),
        "gemma4": (angles[count:], angles[:count]),
        "moonvit": (angles[1::2], angles[::2]),
    }
    return halves.get(preset, (angles[:count], angles[count:]))


@pytest.mark.parametrize("kind", SCALINGS)
@pytest.mark.parametrize("preset", ["rope_vit", "moonvit", "pixtral", "qwen_vit", "gemma4"])
def test_dialects_are_scaled_axis_by_axis(preset, kind):
    """One down and one to the right of the first cell the angles are the frequencies; pixtral's x starts slower."""
    shape, trained, temperature = (30, 26), (10, 20), 200.0
    options = {"num_heads": 1, "head_dim": 24, "preset": preset, "temperature": temperature}
    encoding = vp.create_encoding("rope_axial", **options, reference_shape=trained, scaling=kind)
    found = of_axes(encoding.angles(grid64(shape))[0].unflatten(0, shape)[1, 1], preset)
    for axis in (0, 1):
        shift = temperature ** (-1 / 12) if preset == "pixtral" and axis == 1 else 1.0
        # a series that starts at `shift` is, in units of `shift`, one that starts at 1 on a shorter axis
        n, before = shape[axis], trained[axis]
        expected = shift * torch.tensor(by_hand(kind, n * shift, before * shift, 6, temperature), dtype=torch.float64)
        assert (found[axis] - expected).abs().max() < 1e-12, axis


def test_frequencies_that_are_no_series_are_only_divided():
    options = {"num_heads": 2, "head_dim": 16, "reference_shape": (3, 4)}
    for more in ({"learn_frequencies": "per_head"}, {"preset": "mrope"}):
        with pytest.raises(
            ValueError, match="scaling must be 'interpolate', 'run_on' or 'linear' with learned .* 'ntk'"
        ):
            vp.create_encoding("rope_axial", **options, **more, scaling="ntk")
        linear, on = (vp.create_encoding("rope_axial", **options, **more, scaling=way) for way in ("linear", "run_on"))
        found, raw = linear.angles(grid64((6, 8))), on.angles(grid64((6, 8)))
        assert (2 * found - raw).abs().max() < 1e-12


def test_folded_encodings_keep_their_scaling():
    for name, scaling in (("harope", "yarn"), ("string", "linear")):
        encoding = vp.create_encoding(name, num_heads=2, head_dim=16, reference_shape=(3, 4), scaling=scaling)
        grid = grid64((6, 9))
        assert encoding.folded().scaling == scaling
        assert (encoding.folded().angles(grid) - encoding.angles(grid)).abs().max() < 1e-6


def test_the_example_runs_and_the_page_shows_the_formulas():
    names = {"vp": vp, "torch": torch}
    example = doctest.DocTestParser().get_doctest(FrequencyRotary.__doc__, names, "FrequencyRotary", None, None)
    assert example.examples
    assert doctest.DocTestRunner(verbose=False).run(example).failed == 0
    for word in ("ntk_by_parts", "On a grid of 14", "beta_fast"):
        assert word in page.larger_grids()
