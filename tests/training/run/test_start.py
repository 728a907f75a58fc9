"""Pretrained weights that a run starts from: every form that `init` may name, and what comes with them."""

import json
import shutil
import socket
import time
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.models import save_for_hf

import visionpos as vp
from tests.small import needs_newer_timm, randomised
from tests.training.tiny_run import config, picture_config, write_pictures
from visionpos.training.errors import ConfigError, run_command
from visionpos.training.run import start
from visionpos.training.run.build import build_model, check_model, load_encoder
from visionpos.training.run.classification import train
from visionpos.training.run.evaluation import evaluate
from visionpos.training.run.record import open_run
from visionpos.training.run.start import adopt_statistics

SHAPE = {"patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2}
STATISTICS = {"mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6)}


def pretrained(encoding=None, size=(16, 24), classes=7, **options):
    """A model as somebody else has trained it: other classes and another size than those of the run."""
    return randomised(
        vp.create_model(
            "vit_tiny_patch16_224", encoding, img_size=size, num_classes=classes,
            pretrained_cfg_overlay={"input_size": (3, *size), "crop_pct": 0.8, **STATISTICS}, **SHAPE | options,
        )
    )  # fmt: skip


def saved(form, model, folder):
    """The weights of a model in one of the forms, as `init` names it."""
    if form == "file":
        save_file(model.state_dict(), folder / "alone.safetensors")
        return str(folder / "alone.safetensors")
    made = {"img_size": model.patch_embed.img_size, "num_classes": model.num_classes, **SHAPE}
    made |= {"embed_dim": model.embed_dim, "depth": len(model.blocks), **getattr(model, "_model_args", {})}
    save_for_hf(model, folder / "saved", safe_serialization=True, model_args=made)  # timm records them since 1.0.31
    return {
        "directory": str(folder / "saved"),
        "local-dir": f"local-dir:{folder / 'saved'}",
        "file of a directory": str(folder / "saved" / "model.safetensors"),
    }[form]


def flags(init, encoding="learned"):
    return "--init", init, "--encoding", encoding, "--model.options.drop_path_rate", "0"


@pytest.mark.parametrize("form", ["file", "directory", "local-dir", "file of a directory"])
@pytest.mark.parametrize("encoding", ["learned", "rope_axial", "learned+rope_mixed"])
def test_every_form_gives_its_weights_to_another_head_size_and_encoding(form, encoding, tmp_path):
    size = (16, 16) if form == "file" else (16, 24)  # a file alone does not say which
    source = pretrained(size=size)
    init = saved(form, source, tmp_path)
    run = adopt_statistics(picture_config(tmp_path, *flags(init, encoding), "--data.size", "[8, 12]"))
    model = build_model(run, {"num_classes": 3, "image_size": (8, 12), "channels": 3})
    fresh = {name: value.clone() for name, value in model.state_dict().items()}
    load_encoder(model, run.start)
    found, given = model.state_dict(), source.state_dict()
    for name in found:
        if name.startswith("head") or name not in given:
            assert torch.equal(found[name], fresh[name]), name
        elif name == "pos_embed":
            assert torch.equal(
                found[name], vp.resize_position_table(given[name], (2, 3), (size[0] // 4, size[1] // 4), 1)
            )
        else:
            assert torch.equal(found[name], given[name]), name


@pytest.mark.parametrize(("form", "known"), [("file", False), ("directory", True), ("file of a directory", True)])
def test_mean_std_size_and_crop_are_those_of_the_weights_unless_said_otherwise(form, known, tmp_path):
    init = saved(form, pretrained(), tmp_path)
    data = adopt_statistics(picture_config(tmp_path, *flags(init))).data
    assert (data.size, data.crop_pct) == (((16, 24), 0.8) if known else (None, None))
    assert {"mean": data.mean, "std": data.std} == (STATISTICS if known else {"mean": None, "std": None})
    said = "--data.mean", "[0.5, 0.6, 0.7]", "--data.size", "[8, 16]", "--data.crop_pct", "1"
    data = adopt_statistics(picture_config(tmp_path, *flags(init), *said)).data
    assert (data.mean, data.size, data.crop_pct) == ((0.5, 0.6, 0.7), (8, 16), 1.0)
    assert data.std == (STATISTICS["std"] if known else None)


def test_a_run_from_a_directory_is_trained_evaluated_and_repeated(tmp_path, capsys):
    init = saved("directory", pretrained("rope_axial"), tmp_path)
    run = picture_config(tmp_path, *flags(init, "rope_axial"), "--recipe.epochs", "1")
    result = train(run)
    assert result["data"]["image_size"] == [16, 24]
    assert (result["data"]["mean"], result["data"]["std"]) == tuple(map(list, STATISTICS.values()))
    again = open_run(tmp_path / "run")[0]
    assert (again.data.size, again.data.mean) == ((16, 24), STATISTICS["mean"])
    (tmp_path / "saved" / "model.safetensors").unlink()  # nothing later needs it
    assert evaluate(tmp_path / "run", [])["rows"][0]["accuracy"] == result["final"]["test"]
    capsys.readouterr()


def test_a_finished_run_is_found_again_by_the_same_command(tmp_path, capsys):
    init = saved("directory", pretrained(), tmp_path)
    for _ in range(2):
        train(picture_config(tmp_path, *flags(init), "--recipe.epochs", "1"))
    assert "is finished" in capsys.readouterr().out


@pytest.mark.parametrize("key", [pytest.param("pretrained_cfg_overlay", marks=needs_newer_timm), "checkpoint_path"])
def test_weights_that_the_models_own_options_name_are_loaded_as_the_run_builds_it(key, tmp_path):
    """The check knows neither the classes nor the size of the data; that must not refuse a file that fits the run."""
    model = pretrained(size=(8, 12), classes=3)
    file = str(tmp_path / "fits.pth")
    torch.save(model.state_dict(), file)
    given = {"checkpoint_path": file}
    if key != "checkpoint_path":
        given = {"pretrained": True, key: {"file": file, "num_classes": 3, "input_size": [3, 8, 12], **STATISTICS}}
    options = ["--model.options", json.dumps({**SHAPE, **given}), "--encoding", "learned", "--recipe.epochs", "1"]
    run = picture_config(tmp_path, *options)
    check_model(run)
    built = build_model(adopt_statistics(run), {"num_classes": 3, "image_size": (8, 12), "channels": 3})
    assert torch.equal(built.head.weight, model.head.weight)
    result = train(run)
    assert (tuple(result["data"]["mean"]) == STATISTICS["mean"]) == (key != "checkpoint_path")
    assert result["encoding_parameters"] == 7 * 16


@pytest.mark.parametrize(
    ("options", "init", "line"),
    [
        ({"embed_dim": 24}, "directory", "do not fit the model .*model.options.*'embed_dim': 16"),
        ({"depth": 3}, "file", r"do not fit the model .*no config.json.*: .*missing in the weights: blocks.2"),
        ({}, "other", "do not fit the model .*"),
        ({}, "broken", "broken.safetensors"),
        ({}, "pickle", "a pickle can run code when it is read"),
        ({}, "empty", "init: '.*empty' given; accepted: the directory of a train.pretrain_mae run"),
        ({}, "local-dir:nowhere", "init: the configuration of local-dir:nowhere cannot be read"),
        ({}, "vit_tiny_patch16_224.nobody", "init: 'vit_tiny_patch16_224.nobody' given; did you mean '.*'\\? accepted"),
        ({}, "vit_tiny_patch32_224", "init: 'vit_tiny_patch32_224' given; .*accepted"),
        ({}, "someone/model", "init: 'someone/model' given; accepted"),
    ],
)
def test_a_start_that_cannot_be_is_one_line_before_any_picture_is_read(options, init, line, tmp_path, monkeypatch):
    run = picture_config(tmp_path, "--init", init)
    monkeypatch.setattr("visionpos.training.run.source.load_pictures", lambda *_, **__: pytest.fail("read"))
    if init in ("file", "directory"):
        init = saved(init, pretrained(), tmp_path)
    elif init == "other":
        save_file({"encoder.layer.0.weight": torch.ones(3, 5)}, tmp_path / "other.safetensors")
        init = str(tmp_path / "other.safetensors")
    elif init in ("broken", "pickle"):
        file = tmp_path / {"broken": "broken.safetensors", "pickle": "weights.pth"}[init]
        file.write_bytes(b"no weights")
        init = str(file)
    elif init == "empty":
        (tmp_path / "empty").mkdir()
        init = str(tmp_path / "empty")
    run.init, run.model.options = init, {**run.model.options, **options}
    with pytest.raises(ConfigError, match=line):
        train(run)
    assert not (tmp_path / "run").exists()


def test_a_pooled_model_starts_from_one_with_a_class_token_and_keeps_its_new_norm(tmp_path):
    init = saved("file", pretrained("rope_axial", class_token=True), tmp_path)
    run = picture_config(tmp_path, *flags(init, "rope_axial"), "--model.options.global_pool", "avg")
    model = build_model(run, {"num_classes": 3, "image_size": (8, 12), "channels": 3})
    load_encoder(model, init)
    assert torch.equal(model.fc_norm.weight, torch.ones(16))


HUB = [
    ["--init", "hf-hub:someone/model"],
    ["--init", "vit_tiny_patch16_224.augreg_in21k_ft_in1k"],
    ["--model.options.pretrained", "true"],
    ["--model.name", "hf-hub:someone/model"],
]


@pytest.mark.parametrize("flags", HUB, ids=lambda flags: flags[1])
@pytest.mark.parametrize("network", ["no answer", "no name"])
def test_without_a_network_a_name_is_one_line_and_nothing_is_tried_twice(flags, network, tmp_path, monkeypatch, capsys):
    """A host that does not answer is given up in time; the clock here is the wait that is asked for."""
    waited = []

    def connect(address, timeout):
        waited.append(timeout)
        if network == "no answer":
            time.sleep(60)
        raise OSError("no route")

    monkeypatch.setattr(start, "ANSWER_SECONDS", 0.2)
    monkeypatch.setattr(socket, "create_connection", connect)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    start._answers.cache_clear()
    start.configuration_of.cache_clear()
    write_pictures(tmp_path / "pictures", 32, 48)
    text = "model: {name: vit_tiny_patch16_224}\ndata: {name: FOLDER}\nrecipe: {epochs: 1, batch_size: 2}\ndevice: cpu"
    run = config(tmp_path, text.replace("FOLDER", str(tmp_path / "pictures")), "--encoding", "learned", *flags)
    assert run_command(lambda: train(run)) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert error.startswith(
        {"--init": "error: init: ", "--model.name": "error: model.name: hf-hub:someone/model: "}.get(
            flags[0], "error: model.options: "
        )
    )
    assert waited == [0.2]
    start._answers.cache_clear()


def test_a_cached_name_needs_no_network(monkeypatch):
    """What timm finds in the cache is loaded; here timm itself stands for the cache."""
    monkeypatch.setattr(start.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(start, "_answers", lambda address: False)
    seen = []

    def create(name, pretrained):
        seen.append((name, pretrained, start.constants.HF_HUB_OFFLINE))
        return timm.models.vit_tiny_patch16_224(depth=1)

    monkeypatch.setattr(timm, "create_model", create)
    assert not start.constants.HF_HUB_OFFLINE
    weights = start.start_weights("vit_tiny_patch16_224.augreg_in21k")
    assert seen == [("vit_tiny_patch16_224.augreg_in21k", True, True)]
    assert "blocks.0.attn.qkv.weight" in weights
    assert not start.constants.HF_HUB_OFFLINE


FIXTURES = Path(__file__).parents[2] / "weights" / "fixtures"
SHAPE_OF_FIXTURES = {"patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2, "mlp_ratio": 2}


@pytest.mark.parametrize(
    ("fixture", "name", "size", "encoding"),
    [
        ("hf_vit", "vit_tiny_patch16_224", (32, 48), "learned"),
        ("hf_dinov3", "vit_small_patch16_dinov3_qkvb", (32, 32), "rope_dinov3"),
    ],
)
@pytest.mark.parametrize("form", ["directory", "file"])
def test_a_directory_of_transformers_gives_its_weights_size_and_statistics(
    fixture, name, size, encoding, form, tmp_path
):
    """Every tensor but the classifier is that of the model which is held to the library's own output."""
    folder = tmp_path / "downloaded"
    shutil.copytree(FIXTURES / fixture, folder)
    seen = {"image_mean": STATISTICS["mean"], "image_std": STATISTICS["std"], "do_resize": True}
    (folder / "preprocessor_config.json").write_text(json.dumps(seen))
    init = str(folder if form == "directory" else folder / "model.safetensors")
    options = ["--model.name", name, "--model.options", json.dumps(SHAPE_OF_FIXTURES)]
    run = adopt_statistics(picture_config(tmp_path, "--init", init, "--encoding", encoding, *options))
    assert run.data.shape == size
    assert {"mean": run.data.mean, "std": run.data.std} == STATISTICS
    check_model(run)
    model = build_model(run, {"num_classes": 3, "image_size": size, "channels": 3})
    head = model.head.weight.clone()
    load_encoder(model, run.start)
    options = {**SHAPE_OF_FIXTURES, "num_classes": 3, "img_size": size}
    want = vp.create_model(name, encoding, weights=FIXTURES / fixture, **options).state_dict()
    found = model.state_dict()
    assert torch.equal(found["head.weight"], head)
    assert found.keys() == want.keys()
    assert [key for key in found if not key.startswith("head") and not torch.equal(found[key], want[key])] == []


def test_weights_of_transformers_that_do_not_fit_say_what_they_are(tmp_path):
    options = ["--model.options", json.dumps({**SHAPE_OF_FIXTURES, "embed_dim": 24})]
    run = picture_config(tmp_path, "--init", str(FIXTURES / "hf_vit"), "--encoding", "learned", *options)
    with pytest.raises(ConfigError, match=r"do not fit the model \(theirs is a vit of transformers; docs/weights.md"):
        check_model(run)


def test_a_damaged_configuration_of_transformers_is_one_line(tmp_path):
    shutil.copytree(FIXTURES / "hf_vit", tmp_path / "downloaded")
    run = picture_config(tmp_path, "--init", str(tmp_path / "downloaded"), "--encoding", "learned")
    for file in ("preprocessor_config.json", "config.json"):
        start.configuration_of.cache_clear()
        (tmp_path / "downloaded" / file).write_text("{")
        with pytest.raises(ConfigError, match=r"init: the configuration of .*downloaded cannot be read"):
            adopt_statistics(run)
