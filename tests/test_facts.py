"""What a model knows and fills in, what it refuses, and which layers share a module."""

import pytest
import timm
import torch

import visionpos as vp
from tests import small
from visionpos import registry
from visionpos.encoding import LayerFacts
from visionpos.hosts.host import find_host, timm_is_from
from visionpos.registry import FACTS, check_agreement, complete_options, get_encoding_class, known_options

FACTS_OF_LAYER = LayerFacts(
    dim=24, dim_in=12, num_heads=3, head_dim=8, feat_shape=(2, 5), num_prefix_tokens=1, layer=1, depth=4
)


@pytest.fixture
def scratch_registry(monkeypatch):
    monkeypatch.setattr(registry, "_REGISTRY", dict(registry._REGISTRY))


class Slope(vp.BiasEncoding):
    """b = -(w + c) |p - p'|, w learned."""

    learnable = translation_invariant = True

    def __init__(self, num_heads: int, layer: int = 7, depth: int = 2, **grid_options):
        super().__init__(num_heads, **grid_options)
        self.layer, self.depth = layer, depth
        self.w = torch.nn.Parameter(torch.ones(num_heads))

    def encode(self, queries, keys):
        delta = queries.coords[..., :, None, :] - keys.coords[..., None, :, :]
        return -(self.w + 0.1 * self.depth)[:, None, None] * delta.norm(dim=-1).unsqueeze(-3)


class LayerSlope(Slope):
    """The same, that knows its layer."""

    from_model = ("layer",)


class Fixed(Slope):
    """Without parameters, and the same in all layers."""

    learnable = False

    def __init__(self, num_heads: int, **grid_options):
        super().__init__(num_heads, **grid_options)
        del self.w
        self.w = torch.ones(num_heads)


class FixedOfLayer(Fixed):
    """Without parameters, and another one in every layer."""

    def __init__(self, num_heads: int, layer: int):
        super().__init__(num_heads)
        self.layer = layer


def vit(**options):
    options = {"img_size": (16, 40), "patch_size": 8, "embed_dim": 48, "depth": 3, "num_heads": 3, **options}
    return timm.create_model("vit_tiny_patch16_224", num_classes=2, **options)


def swin():
    options = {"img_size": (32, 48), "window_size": 4, "embed_dim": 48, "depths": (2, 1), "num_heads": (3, 6)}
    return timm.create_model("swin_tiny_patch4_window7_224", num_classes=2, **options)


def layers_of(cls, model):
    registry._REGISTRY.pop("own", None)
    vp.register_encoding("own")(cls)
    return vp.get_encoding(vp.set_encoding(model, "own"))


@pytest.mark.parametrize(
    ("cls", "layers", "modules"),
    [(Slope, [7, 7, 7], 3), (LayerSlope, [0, 1, 2], 3), (Fixed, [7], 1), (FixedOfLayer, [0, 1, 2], 3)],
)
def test_a_default_stays_unless_the_class_asks_for_the_fact(scratch_registry, cls, layers, modules):
    found = layers_of(cls, vit())
    assert [encoding.layer for encoding in found] == layers
    assert {encoding.depth for encoding in found} == {2}
    assert {encoding.reference_shape for encoding in found} <= {(2, 5), None}
    assert len(found) == modules
    info = vp.encoding_info("own")
    assert info["shared"] == (cls is Fixed)
    assert ("layer" in info["from_model"]) == (cls in (LayerSlope, FixedOfLayer))


def test_layers_that_are_built_alike_share_what_has_no_parameters(scratch_registry):
    assert [encoding.num_heads for encoding in layers_of(Fixed, swin())] == [3, 6]
    assert [encoding.num_heads for encoding in layers_of(Slope, swin())] == [3, 3, 6]


def test_an_object_serves_all_layers_because_the_user_asks(scratch_registry):
    vp.register_encoding("own")(Slope)
    model = vp.set_encoding(vit(), vp.create_encoding("own", num_heads=3))
    assert len(vp.get_encoding(model)) == 1
    assert [name for name in model.state_dict() if name.endswith(".w")] == ["pos_embed_shared.0.w"]


@pytest.mark.parametrize("name", [name for name in vp.list_encodings() if name != "none"])
def test_every_built_in_encoding_is_built_as_its_layer_says(name):
    """One module in all layers only where it is the same function of the same options."""
    cls = get_encoding_class(name)
    model = vp.set_encoding(swin() if cls.place != "input" else vit(), name)
    found = vp.get_encoding(model)
    assert all(bool(encoding.no_weight_decay()) == cls.learnable for encoding in found)
    if cls.place in ("rotary", "bias") and vp.encoding_info(name)["shared"]:
        assert len(found) == 2  # two stages, with other numbers of heads
    elif cls.place in ("rotary", "bias"):
        assert len(found) == 3
    for encoding in found:
        assert encoding._spec == {"name": name} or encoding._spec["name"] == name


def test_an_encoding_that_reads_the_input_gets_its_width():
    assert known_options(get_encoding_class("pape"), FACTS_OF_LAYER)["dim"] == 12
    assert known_options(get_encoding_class("lepe"), FACTS_OF_LAYER)["dim"] == 24


def test_defaults_facts_and_options_in_that_order():
    cls = get_encoding_class("log_cpb")
    known = {"num_heads": 3, "pretrained_window": (2, 5)}
    assert complete_options(cls, {}, FACTS_OF_LAYER) == {**known, "init_std": 0.02}
    given = {"pretrained_window": None, "init_std": 1.0}
    assert complete_options(cls, given, FACTS_OF_LAYER) == {"num_heads": 3, **given}


CONTRADICTIONS = [
    ("rope_axial", "num_heads", 5, 3),
    ("rope_axial", "head_dim", 12, 16),
    ("lepe", "dim", 13, 48),
    ("sincos2d", "dim", 16, 48),
    ("learned", "num_prefix_tokens", 5, 1),
    ("irpe", "num_prefix_tokens", 2, 1),
    ("lookhere", "layer", 1, 0),
    ("lookhere", "depth", 12, 3),
]


@pytest.mark.parametrize(("name", "key", "given", "known"), CONTRADICTIONS)
def test_an_option_that_contradicts_the_model_is_one_line(name, key, given, known):
    model = vit()
    before = vp.get_encoding(model)
    with pytest.raises(ValueError, match=f"^{name} was built with {key}={given}, but the model has {known}$"):
        vp.set_encoding(model, {"name": name, key: given})
    assert vp.get_encoding(model) == before


def test_an_option_that_agrees_or_that_is_a_choice_is_taken():
    model = vp.set_encoding(
        vit(), [{"name": "learned", "num_prefix_tokens": 0}, {"name": "rope_axial", "num_heads": 3}]
    )
    assert model.pos_embed.shape == (1, 10, 48)
    vp.set_encoding(model, {"name": "rope_axial", "reference_shape": (7, 3)})
    assert vp.get_encoding(model)[0].reference_shape == (7, 3)


def test_an_author_may_use_the_name_of_a_fact_for_something_else(scratch_registry):
    vp.register_encoding("own")(Slope)
    model = vp.set_encoding(vit(), {"name": "own", "depth": 9})
    assert [encoding.depth for encoding in vp.get_encoding(model)] == [9, 9, 9]
    check_agreement(Slope, {"depth": 9, "num_heads": 3}, FACTS_OF_LAYER)


def test_what_no_model_knows_is_asked_for_with_a_list_of_what_it_knows(scratch_registry):
    class NeedsGrid(Fixed):
        def __init__(self, num_heads: int, grid: tuple[int, int]):
            super().__init__(num_heads)

    vp.register_encoding("needs_grid")(NeedsGrid)
    with pytest.raises(ValueError, match="^needs_grid needs grid; a model fills in only dim, feat_shape, .*layer"):
        vp.set_encoding(vit(), "needs_grid")
    with pytest.raises(ValueError, match="^needs_grid needs num_heads, grid; a model"):
        vp.create_encoding("needs_grid")
    vp.set_encoding(vit(), {"name": "needs_grid", "grid": (2, 3)})


def test_a_class_that_asks_for_what_no_model_knows_is_refused(scratch_registry):
    with pytest.raises(ValueError, match="Asks.from_model names 'grid'; a model knows dim, feat_shape"):
        vp.register_encoding("asks")(type("Asks", (Fixed,), {"from_model": ("grid",)}))
    assert "asks" not in vp.list_encodings()


@pytest.mark.parametrize(
    "spec",
    [
        {"name": "relative_table", "feat_shape": (5, 5, 5)},
        {"name": "rope_axial", "reference_shape": (5, 5, 5)},
        {"name": "log_cpb", "pretrained_window": (5,)},
        vp.create_encoding("rope_axial", num_heads=3, head_dim=16, reference_shape=(7,)),
    ],
)
def test_an_encoding_for_another_number_of_axes_is_refused_before_anything_changes(spec):
    model = vp.set_encoding(vit(), "alibi2d")
    x = torch.randn(2, 3, *model.patch_embed.img_size)
    want = model(x)
    with pytest.raises(ValueError, match=r" needs [13] coordinates of a token, .* got 2$"):
        vp.set_encoding(model, spec)
    assert torch.equal(model(x), want)


def test_only_some_layers():
    model = vp.set_encoding(vit(), {"name": "alibi2d", "layers": [0, 2]})
    assert [len(block.attn.encodings) for block in model.blocks] == [1, 0, 1]
    for layers in ([3], [-1], [1, 1]):
        with pytest.raises(ValueError, match=r"alibi2d: layers must be different indices from 0 to 2, got \["):
            vp.set_encoding(model, {"name": "alibi2d", "layers": layers})
    with pytest.raises(ValueError, match="alibi2d: layers must be different indices from 0 to 2, got none"):
        vp.set_encoding(model, {"name": "alibi2d", "layers": []})
    with pytest.raises(ValueError, match=r"learned acts in no layer, and takes no layers; got \[0\]"):
        vp.set_encoding(model, {"name": "learned", "layers": [0]})
    line = r"alibi2d: layers must be a list of integers or a slice such as '3::4', got "
    for layers in ("0", "", "1:2:0", "a:b", "1:2:3:4", 2, [0.0], [True], {0: 1}):
        with pytest.raises(ValueError, match=line):
            vp.set_encoding(model, {"name": "alibi2d", "layers": layers})
    with pytest.raises(ValueError, match="alibi2d: layers '7:' are none of the 3 layers of the model"):
        vp.set_encoding(model, {"name": "alibi2d", "layers": "7:"})
    assert [len(block.attn.encodings) for block in model.blocks] == [1, 0, 1]


@pytest.mark.parametrize(
    ("layers", "chosen"),
    [("3::4", [3]), ("::2", [0, 2, 4]), ("-4:", [2, 3, 4, 5]), (":-1", [0, 1, 2, 3, 4]), (" 4 : 1 : -2", [2, 4])],
)
@pytest.mark.parametrize("build", [small.vit, small.swin], ids=["ViT", "Swin"])
def test_a_slice_of_the_layers(build, layers, chosen, tmp_path):
    """As a list of the same layers, in a round trip, and saved."""
    options = {"depths": (2, 4)} if build is small.swin else {"depth": 6}
    model = build(["rope_mixed", {"name": "alibi2d", "layers": layers}], **options)
    listed = build(["rope_mixed", {"name": "alibi2d", "layers": chosen}], **options)
    listed.load_state_dict(model.state_dict())
    x = small.pictures((64, 96) if build is small.swin else small.SIZE)
    inside = find_host(model).encodings(model)[1]
    assert [i for i, layer in enumerate(inside) if any(each.name == "alibi2d" for each in layer)] == chosen
    expected = model(x)
    assert torch.equal(listed(x), expected)
    assert torch.equal(vp.set_encoding(model, vp.get_encoding(model))(x), expected)
    if timm_is_from("1.0.31"):  # which records arguments
        timm.models.save_for_hf(model, tmp_path)
        loaded = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
        assert torch.equal(loaded(x), expected)


def test_the_fields_are_the_only_list():
    assert set(FACTS) == set(LayerFacts.__dataclass_fields__)
    for name in vp.list_encodings():
        info = vp.encoding_info(name)
        assert set(info["from_model"]) <= set(FACTS) & {*info["required"], *info["options"]}
        assert set(info["required"]) <= {*info["from_model"], *(() if name == "none" else info["required"])}


@pytest.mark.parametrize(("build", "sizes"), [(swin, ((4, 4), (8, 8))), (vit, ((2, 5), (6, 7)))])
def test_log_cpb_keeps_its_offsets_on_a_larger_window(build, sizes):
    """The window that it was built for is the one that it was trained on."""
    model = vp.set_encoding(build(), "log_cpb")
    encoding = vp.get_encoding(model)[0]
    with torch.no_grad():
        encoding.cpb_mlp[2].weight.normal_()
    before = encoding.bias(vp.Positions.grid(sizes[0]))[:, 0, 1]
    model.set_input_size(**{"img_size": (64, 96), "window_size": 8} if build is swin else {"img_size": (48, 56)})
    assert encoding.pretrained_window == sizes[0]
    assert (encoding.bias(vp.Positions.grid(sizes[1]))[:, 0, 1] - before).abs().max() < 1e-5
