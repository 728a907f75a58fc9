"""Models that are no hosts: the line says which are, and where this one is from."""

import pytest
import timm
import torchvision
from torch import nn

import visionpos as vp
from tests.small import needs_newer_timm
from visionpos.analysis.zoo import NEWER, ZOO, build
from visionpos.convert import find_host
from visionpos.hosts.host import timm_is_from

OTHERS = {
    "torchvision ViT": lambda: torchvision.models.VisionTransformer(32, 16, 1, 2, 32, 64),
    "torchvision Swin": lambda: torchvision.models.SwinTransformer([4, 4], 16, [1, 1], [1, 2], [4, 4]),
    "ResNet": lambda: torchvision.models.resnet18(),
    "a model of one's own": lambda: type("ViTModel", (nn.Module,), {"__module__": "transformers.models.vit"})(),
}


@pytest.mark.parametrize("name", OTHERS)
def test_a_model_of_another_library_is_refused_by_its_origin(name):
    model = OTHERS[name]()
    kind = type(model)
    for call in (vp.get_encoding, lambda model: vp.set_encoding(model, "rope_axial")):
        with pytest.raises(ValueError, match=f"{kind.__name__} is not a supported host; supported: timm's") as caught:
            call(model)
        assert str(caught.value).endswith(f"this one is from {kind.__module__}")


def test_of_a_timm_model_no_origin_is_told():
    with pytest.raises(ValueError, match="ResNet is not a supported host") as caught:
        vp.set_encoding(timm.create_model("resnet10t"), "learned")
    assert "this one" not in str(caught.value)


def test_a_model_without_layers_is_one_line():
    model = timm.create_model("vit_tiny_patch16_224", depth=0, img_size=(32, 48))
    with pytest.raises(ValueError, match="no attention layers"):
        vp.set_encoding(model, "alibi2d")


@pytest.mark.parametrize(
    ("family", "path"),
    [("Swin", "layers.0.blocks.0"), ("PVT v2", "stages.0.blocks.0.attn"), ("LeViT", "stem"), ("SAM", "blocks.0.attn")],
)
def test_a_part_of_ones_own_is_refused_before_anything_is_changed(family, path):
    model, _ = build(family)
    part = model.get_submodule(path)
    part.__class__ = type("Mine", (type(part),), {})
    before = [(name, type(module)) for name, module in model.named_modules()]
    with pytest.raises(ValueError, match=r"takes encodings with timm's own parts only \(.*\); this one has a Mine$"):
        vp.set_encoding(model, "learned")
    assert [(name, type(module)) for name, module in model.named_modules()] == before


def test_a_family_of_a_newer_timm_is_one_line(monkeypatch):
    model, _ = build("Swin")
    monkeypatch.setattr(type(find_host(model)), "since", "12.0.3")
    with pytest.raises(ValueError, match=r"^a SwinTransformer needs timm 12\.0\.3 or newer; this is timm 1\.\d+\.\d+"):
        vp.set_encoding(model, "rope_axial")
    assert type(model) is timm.models.SwinTransformer


@needs_newer_timm
def test_the_families_left_out_with_an_older_timm_are_those_whose_hosts_ask_for_a_newer_one():
    assert {family for family in ZOO if find_host(build(family)[0]).since == "1.0.31"} == NEWER


@pytest.mark.parametrize(("installed", "is_from"), [("1.0.30", False), ("1.0.31.dev0", True), ("1.1.0rc1", True)])
def test_versions_of_timm_are_compared_as_numbers(installed, is_from, monkeypatch):
    monkeypatch.setattr(timm, "__version__", installed)
    assert timm_is_from("1.0.31") == is_from
    assert timm_is_from("1.0.9")
