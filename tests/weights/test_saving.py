"""A model saved by timm and loaded again keeps its encoding and its weights."""

import json
from importlib.util import find_spec

import pytest
import timm
import torch
from timm.models import save_for_hf

import visionpos as vp
from tests.small import pictures, randomised
from tests.tiny_timm_models import SMALL, SMALL_SWIN, SWIN, VIT, small
from visionpos.analysis.zoo import ZOO

# timm records the arguments of a model since 1.0.31
recorded = pytest.mark.skipif(not find_spec("timm.models._input"), reason="this timm records no arguments")


def reload(model, folder, **options):
    save_for_hf(model, folder)
    return timm.create_model(f"local-dir:{folder}", pretrained=True, **options).eval()


def test_saved_with_the_arguments_given_by_hand(tmp_path):
    """As every supported timm can."""
    model = randomised(small(encoding="learned+rope_mixed"))
    save_for_hf(model, tmp_path, model_args={**SMALL, "encoding": "learned+rope_mixed"})
    loaded = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert torch.equal(loaded(pictures()), model(pictures()))


SPECS = [
    *("rope_axial", "learned+rope_mixed", {"name": "rope_axial", "temperature": 10.0}, "relative_table+peg", "none"),
    {"name": "rope_axial", "preset": "mrope", "sections": (1, 2, 1)},
    {"name": "rope_axial", "preset": "pixtral", "learn_frequencies": "per_head"},
]


@recorded
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_saved_and_loaded_again(spec, tmp_path):
    model = randomised(small(encoding=spec))
    loaded = reload(model, tmp_path)
    assert [repr(e) for e in vp.get_encoding(loaded)] == [repr(e) for e in vp.get_encoding(model)]
    assert list(loaded.state_dict()) == list(model.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), model.parameters(), strict=True))
    assert torch.equal(loaded(pictures()), model(pictures()))


@recorded
@pytest.mark.parametrize("spec", ["rope_mixed+relative_table", "learned+lookhere"])
def test_swin_saved_and_loaded_again(spec, tmp_path):
    model = randomised(small(SWIN, encoding=spec))
    loaded = reload(model, tmp_path)
    assert torch.equal(loaded(pictures()), model(pictures()))


HOSTS = [
    "vit_tiny_patch16_224",
    "deit_tiny_distilled_patch16_224",
    "vit_small_patch16_rope_mixed_224",
    "beit_base_patch16_224",
    "vit_relpos_small_patch16_224",
    "samvit_base_patch16_224",
]


@recorded
@pytest.mark.parametrize("host", HOSTS)
def test_a_converted_timm_model_keeps_its_encoding(host, tmp_path):
    options = {"img_size": (32, 48), "patch_size": 8, "num_classes": 5}
    options |= {} if "distilled" in host else {"embed_dim": 48, "depth": 2, "num_heads": 3}
    model = randomised(vp.create_model(host, encoding="learned+rope_axial", **options)).eval()
    loaded = reload(model, tmp_path)
    assert type(loaded) is type(model)
    assert torch.equal(loaded(pictures()), model(pictures()))
    assert json.loads((tmp_path / "config.json").read_text())["architecture"] == "visionpos"


@recorded
def test_a_second_conversion_is_the_one_that_is_saved(tmp_path):
    model = small(encoding={"name": "rope_axial", "temperature": 10.0})
    vp.set_encoding(model, "sincos2d+rope_axial")  # this rope_axial stays, with its temperature
    assert torch.equal(reload(model, tmp_path / "a")(pictures()), model(pictures()))
    vp.set_encoding(model, "none")
    vp.set_encoding(model, "rope_axial")  # and this one is new
    loaded = reload(model, tmp_path / "b")
    assert [e.temperature for e in vp.get_encoding(loaded)] == [100.0]
    assert torch.equal(loaded(pictures()), model(pictures()))


@recorded
def test_a_table_of_ones_own_where_the_host_had_another_is_built_as_it_was_saved(tmp_path):
    name, options, size = ZOO["SAM"]
    model = randomised(vp.create_model(name, encoding="none", **options))
    vp.set_encoding(model, "learned2d")
    loaded = reload(model.eval(), tmp_path)
    x = torch.randn(2, 3, *size)
    with torch.no_grad():
        assert torch.equal(loaded(x), model(x))


@recorded
def test_an_encoding_that_is_new_does_not_come_back_as_the_hosts_own(tmp_path):
    """BEiT's own relative_table has three rows for the class token; the default of that name has not."""
    options = {"img_size": (32, 48), "patch_size": 8, "embed_dim": 48, "depth": 1, "num_heads": 3}
    model = vp.create_model("beit_base_patch16_224", encoding="none", **options)
    model = randomised(vp.set_encoding(model, "relative_table")).eval()
    assert [e.preset for e in vp.get_encoding(model)] == ["swin"]
    loaded = reload(model, tmp_path)
    assert [e.preset for e in vp.get_encoding(loaded)] == ["swin"]
    assert torch.equal(loaded(pictures()), model(pictures()))


@recorded
@pytest.mark.parametrize("spec", ["rope_axial", "learned+alibi2d"])
def test_a_resized_model_keeps_the_coordinates_it_was_made_for(spec, tmp_path):
    model = randomised(small(encoding=spec))
    model.set_input_size((48, 40))
    loaded = reload(model, tmp_path)
    assert [e.reference_shape for e in vp.get_encoding(loaded)] == [e.reference_shape for e in vp.get_encoding(model)]
    assert torch.equal(loaded(pictures((48, 40))), model(pictures((48, 40))))
    larger = reload(model, tmp_path, img_size=(64, 80))
    model.set_input_size((64, 80))
    assert (larger(pictures((64, 80))) - model(pictures((64, 80)))).abs().max() < 2e-5


@recorded
@pytest.mark.parametrize("name", [VIT, SWIN])
def test_loaded_at_another_size_equals_a_model_that_was_resized(name, tmp_path):
    """The same number of tokens: only the names of the sides say that the table is to be resized."""
    model = randomised(small(name, encoding="learned+relative_table", num_classes=4))
    loaded = reload(model, tmp_path, img_size=(48, 32), num_classes=4)
    table = "pos_embed" if name == VIT else "pos_embed_input.0.pos_embed"
    assert not torch.equal(loaded.state_dict()[table], model.state_dict()[table])
    model.set_input_size((48, 32), **({"window_size": 4} if name == SWIN else {}))  # which the entry point asks for
    assert (loaded(pictures((48, 32))) - model(pictures((48, 32)))).abs().max() < 2e-5


@recorded
def test_loaded_with_another_encoding_says_what_changed(tmp_path, caplog):
    model = randomised(small(encoding="learned"))
    loaded = reload(model, tmp_path, encoding="rope_mixed")
    assert "new in this encoding: blocks.0.attn.encodings.0.freqs" in caplog.text
    assert "positions left out: pos_embed" in caplog.text
    assert torch.equal(loaded.blocks[1].attn.qkv.weight, model.blocks[1].attn.qkv.weight)
    wrong = {**torch.load(tmp_path / "pytorch_model.bin", weights_only=True), "blocks.7.norm1.weight": torch.ones(48)}
    torch.save(wrong, tmp_path / "pytorch_model.bin")
    with pytest.raises(RuntimeError, match=r"blocks\.7\.norm1\.weight"):
        timm.create_model(f"local-dir:{tmp_path}", pretrained=True)


@recorded
@pytest.mark.parametrize("later", [None, "alibi", "alibi+learned"])
def test_an_instance_cannot_be_written_down(later, tmp_path):
    model = vp.set_encoding(small(), vp.create_encoding("alibi", num_heads=3))
    if later is not None:
        vp.set_encoding(model, later)  # the instance stays
    with pytest.raises(ValueError, match="'encoding' is not serializable"):
        save_for_hf(model, tmp_path)


OLD = [  # as the first edition wrote it: without what the model knows
    (VIT, [{"name": "learned"}, {"name": "rope_axial", "temperature": 10.0, "layout": "half", "extrapolate": False}]),
    (VIT, [{"name": "irpe", "method": "cross", "mode": "contextual", "ratio": 1.9, "values": False, "init_std": 0.3}]),
    (SWIN, [{"name": "log_cpb", "pretrained_window": None, "init_std": 0.02}, {"name": "peg", "kernel_size": 3}]),
]


@recorded
@pytest.mark.parametrize(("name", "encoding"), OLD)
def test_what_was_saved_without_facts_still_loads(name, encoding, tmp_path):
    model = randomised(small(name, encoding=encoding))
    save_for_hf(model, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["model_args"] |= {"encoding": encoding, "encoded_size": [32, 48]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    loaded = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert torch.equal(loaded(pictures()), model(pictures()))


@recorded
@pytest.mark.parametrize("name", [VIT, SWIN])
def test_what_was_built_at_another_size_comes_back_beside_what_stayed(name, tmp_path):
    """The formula interpolates into the grid that it was built on, not into that of the table that was there."""
    model = small(name, encoding="learned")
    model.set_input_size((64, 40))
    vp.set_encoding(model, "learned+sinusoidal+relative_table+lookhere")
    frames = [encoding.reference_shape for encoding in vp.get_encoding(model) if encoding.name == "sinusoidal"]
    assert frames == [tuple(model.patch_embed.grid_size)]
    model.set_input_size((48, 64))
    loaded = reload(randomised(model), tmp_path)
    assert [repr(e) for e in vp.get_encoding(loaded)] == [repr(e) for e in vp.get_encoding(model)]
    assert torch.equal(loaded(pictures((48, 64))), model(pictures((48, 64))))


@recorded
def test_every_option_is_written_down(tmp_path):
    model = vp.set_encoding(vp.create_model("swin_tiny_patch4_window7_224", **SMALL_SWIN, window_size=4), "lookhere")
    save_for_hf(model, tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())["model_args"]["encoding"]
    info = vp.encoding_info("lookhere")
    assert all(set(item) == {"name", "layers", *info["required"], *info["options"]} for item in written)
    found = [(item["layers"], item["layer"], item["num_heads"]) for item in written]
    assert found == [([0], 0, 2), ([1], 1, 4), ([2], 2, 4)]
