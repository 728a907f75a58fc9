"""The loops of docs/other_loops.md, as they stand, train a converted model as a plain loop does."""

import copy
import re
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
import yaml

import visionpos as vp

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "other_loops.md").read_text()


def section(title):
    return re.search(rf"^## {title}\n(.*?)(?=^## |\Z)", PAGE, re.S | re.M)[1]


def script(title):
    (found,) = re.findall(r"```python\n(.*?)```", section(title), re.S)
    return found


def start():
    """The names of the page's first block, and its model trained by a plain loop."""
    names = {}
    torch.manual_seed(0)
    exec(script("A model and pictures for the loops below"), names)
    names["model"].train()
    plain = copy.deepcopy(names["model"])
    optimizer = names["create_optimizer_v2"](plain, "adamw", lr=1e-3, weight_decay=0.05)
    for _ in range(2):
        for images, labels in names["loader"]:
            loss = F.cross_entropy(plain(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return names, plain


@pytest.mark.parametrize(("title", "module"), [("accelerate", "accelerate"), ("Lightning", "lightning")])
def test_a_loop_ends_with_the_weights_of_a_plain_one(title, module, monkeypatch, tmp_path):
    pytest.importorskip(module, reason="not installed; the loop of the page is tested where it is")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    names, plain = start()
    before = {name: value.clone() for name, value in names["model"].state_dict().items()}
    exec(script(title), names)
    trained = {name: value.cpu() for name, value in names["model"].state_dict().items()}
    assert trained.keys() == before.keys()
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(trained[name], value, rtol=1e-4, atol=1e-6)
        assert not torch.equal(trained[name], before[name]) or name.endswith("qkv.bias"), name
    assert [encoding.name for encoding in vp.get_encoding(names["model"])] == ["learned", "rope_mixed", "rope_mixed"]


@pytest.mark.slow  # its import takes half a minute
def test_stable_pretraining_trains_a_masked_autoencoder(monkeypatch, tmp_path):
    monkeypatch.setenv("SPT_CACHE_DIR", str(tmp_path))
    pytest.importorskip("stable_pretraining", reason="not installed; the loop of the page is tested where it is")
    monkeypatch.chdir(tmp_path)
    names, _ = start()
    names["copy"] = copy
    exec(script("stable-pretraining").replace("\nmodule =", "\nbefore = copy.deepcopy(mae)\nmodule ="), names)
    trained, before = (names[key].encoder.blocks[1].attn.qkv.weight for key in ("mae", "before"))
    assert not torch.equal(trained.cpu(), before)


def test_every_point_of_the_sweep_is_a_model():
    """The file for timm's sweep.py, by what timm's factory does with it; the script itself is not in timm's package."""
    sweep = yaml.safe_load((ROOT / "configs" / "timm" / "sweep_encodings.yaml").read_text())
    assert (ROOT / "configs" / "timm" / sweep["train"]["config"]).exists()
    assert sweep["train"]["device_modules"] == [vp.__name__]
    for kwargs in sweep["search"]["space"]["model_kwargs"]["choice"]:
        model = timm.create_model(sweep["train"]["model"], **kwargs, depth=1, embed_dim=24, num_heads=1)
        assert [encoding.name for encoding in vp.get_encoding(model)] == [kwargs["encoding"]] * (
            kwargs["encoding"] != "none"
        )
