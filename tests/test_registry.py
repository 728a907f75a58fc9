"""Specs, and errors that say what would have been right."""

import json

import pytest

import visionpos as vp
from visionpos.registry import parse_spec

FIRST = ["learned", "sincos2d", "sinusoidal", "rope1d", "rope_axial", "alibi", "alibi2d", "relative_table", "none"]


def test_list_encodings():
    assert set(FIRST) <= set(vp.list_encodings())
    assert {"rope1d", "rope_axial"} <= set(vp.list_encodings("rope*")) < set(vp.list_encodings())
    assert set(vp.list_encodings(place="input")) >= {"learned", "sincos2d", "sinusoidal"}
    assert vp.list_encodings("rope*", place="bias") == []
    with pytest.raises(ValueError, match="place must be one of input, rotary, bias, conditional, none, got 'biass'"):
        vp.list_encodings(place="biass")


@pytest.mark.parametrize("name", vp.list_encodings())
def test_info_is_complete_and_plain_data(name):
    info = vp.encoding_info(name)
    assert info["name"] == name
    assert info["summary"]
    assert info["paper"] or name == "none"
    assert set(info["required"]).isdisjoint(info["options"])
    json.dumps(info)


def test_info_of_an_encoding():
    info = vp.encoding_info("rope_axial")
    assert info["place"] == "rotary"
    assert info["required"] == ["num_heads", "head_dim"]
    assert info["options"]["preset"] == "rope_vit"
    assert info["options"]["temperature"] is info["options"]["layout"] is None  # the preset's
    assert "reference_shape" in info["options"]
    assert (info["learnable"], info["shared"], info["translation_invariant"]) == (False, True, True)


def test_specs():
    assert parse_spec("learned + rope_axial") == [("learned", {}), ("rope_axial", {})]
    spec = ["learned", {"name": "rope_axial", "temperature": 10}]
    assert parse_spec(spec) == [("learned", {}), ("rope_axial", {"temperature": 10})]
    assert parse_spec(["learned+alibi", ["none"]]) == [("learned", {}), ("alibi", {}), ("none", {})]
    instance = vp.create_encoding("alibi", num_heads=2)
    assert parse_spec(["learned", instance])[1] is instance


def test_a_dict_builds_an_encoding_and_options_can_be_added():
    encoding = vp.create_encoding({"name": "sincos2d", "preset": "timm"}, dim=8)
    assert (encoding.preset, encoding.dim) == ("timm", 8)


BAD = [
    ("ropee_axial", {}, r"unknown encoding 'ropee_axial'; did you mean 'rope_axial'\? Valid: .*alibi2d"),
    ("sincos2d", {"dim": 8, "temprature": 3}, r"no option 'temprature'; did you mean 'temperature'\? Valid: dim, "),
    ("sincos2d", {}, "sincos2d needs dim"),
    ("rope_axial", {"head_dim": 8}, "rope_axial needs num_heads"),
    ("sincos2d", {"dim": 10}, "dim must be a positive multiple of 4"),
    ("sinusoidal", {"dim": 7}, "dim must be a positive multiple of 2"),
    ("rope_axial", {"num_heads": 2, "head_dim": 6}, "head_dim must be a positive multiple of 4"),
    ("rope1d", {"num_heads": 2, "head_dim": 5}, "head_dim must be a positive multiple of 2"),
    ("rope1d", {"num_heads": 2, "head_dim": 4, "layout": "halves"}, "layout must be one of 'interleaved', 'half', got"),
    ("sincos2d", {"dim": 8, "preset": "MAE"}, "preset must be one of 'mae', 'mocov3', 'big_vision', 'timm', got 'MAE'"),
    ("sincos2d", {"dim": 8, "temperature": "hot"}, "sincos2d: temperature must be a positive, finite number, got"),
    ("sincos2d", {"dim": 8.5}, "sincos2d: dim must be a positive integer, got 8.5"),
    ("alibi", {"num_heads": 0}, "alibi: num_heads must be a positive integer, got 0"),
    ("learned", {"dim": 8, "feat_shape": 14}, "learned: feat_shape must be two positive integers, got 14"),
    ({"preset": "mae"}, {}, r"needs a 'name', got keys: \['preset'\]"),
]


@pytest.mark.parametrize(("name", "options", "words"), BAD)
def test_bad_input_is_one_clear_line(name, options, words):
    with pytest.raises(ValueError, match=words) as caught:
        vp.create_encoding(name, **options)
    assert "\n" not in str(caught.value)


@pytest.mark.unhooked
@pytest.mark.parametrize("spec", [3, None, [None]])
def test_a_spec_of_another_type(spec):
    with pytest.raises(ValueError, match="an encoding is a name, a dict, an encoding or a list"):
        parse_spec(spec)


def test_bad_temperature_is_one_clear_line():
    with pytest.raises(ValueError, match="^sincos2d: temperature must be a positive, finite number, got -1.0$"):
        vp.create_encoding("sincos2d", dim=8, temperature=-1.0)


def test_registering_a_taken_name():
    with pytest.raises(ValueError, match="'alibi' is taken by visionpos.bias.alibi.Alibi"):

        @vp.register_encoding("alibi")
        class Mine(vp.BiasEncoding):
            """Mine."""
