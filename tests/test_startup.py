"""What a command says without torch or timm is said before they are imported, and nobody who needs them notices."""

from __future__ import annotations

import pkgutil
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import visionpos as vp
from visionpos import public
from visionpos.late import call_after_import
from visionpos.training.config.command_line import parse
from visionpos.training.config.schema import Config, PretrainConfig

ROOT = Path(__file__).parents[1]
SCRIPTS = sorted(path.stem for path in (ROOT / "train").glob("*.py") if path.stem != "__init__")
HEAVY = {"torch", "numpy", "timm", "torchvision", "matplotlib", "accelerate", "tensorboard", "optuna"}
SMALL = ["--config", "configs/run/vit_cifar10_small.yaml"]


def started(*arguments: str) -> tuple[subprocess.CompletedProcess, set[str]]:
    """Run python, and return what came of it and which modules it imported."""
    done = subprocess.run([sys.executable, "-X", "importtime", *arguments], cwd=ROOT, capture_output=True, text=True)
    lines = done.stderr.splitlines()
    done.stderr = "\n".join(line for line in lines if not line.startswith("import time:"))
    return done, {line.rpartition("|")[2].strip() for line in lines if line.startswith("import time:")}


@pytest.mark.parametrize("module", [*(f"train.{script}" for script in SCRIPTS), "visionpos"])
def test_help_is_printed_before_anything_heavy_is_imported(module):
    done, modules = started("-m", module, "--help")
    assert done.returncode == 0, done.stderr
    assert "visionpos" in modules
    assert not modules & HEAVY


@pytest.mark.parametrize("module", [*(f"train.{script}" for script in SCRIPTS), "visionpos"])
def test_help_begins_with_three_examples(module):
    done, _ = started("-m", module, "--help")
    lines = done.stdout.partition("\n\n    python -m ")[2].partition("\n\n")[0].splitlines()
    assert len(lines) == 3
    assert lines[0].split()[0] == module
    assert all(line.split()[:3] == ["python", "-m", module] for line in lines[1:])
    before = done.stdout.partition("    python -m ")[0].strip().split("\n\n")[-1]
    assert before.endswith((".", "?"))
    assert len(before.splitlines()) == 1, before


@pytest.mark.parametrize(("script", "kind"), [("classify", Config), ("pretrain_mae", PretrainConfig)])
def test_the_examples_are_accepted_and_one_has_a_list(script, kind, tmp_path, monkeypatch):
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    (tmp_path / "photos").mkdir()
    monkeypatch.chdir(tmp_path)
    text = (ROOT / "train" / f"{script}.py").read_text()
    examples = [line for line in text.splitlines() if line.startswith("    python -m train.")]
    configs = [parse(shlex.split(example)[3:], kind) for example in examples]
    assert (48, 64) in {config.data.size for config in configs}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["train.classify", *SMALL, "--recipe.lr", "-2"], "recipe.lr: -2"),
        (["train.classify", *SMALL, "--recipe.auto_augment", "rand(2, 31)"], "recipe.auto_augment: 'rand(2, 31)'"),
        (["train.classify", *SMALL, "--data.name", "locat"], "did you mean 'locate'"),
        (["train.pretrain_mae", *SMALL, "--masked.ratio", "1.5"], "masked.ratio: 1.5"),
        (["train.probe", "runs/none", "--l2", "-3"], "--l2: -3.0"),
        (["train.predict", "runs/none", "a.png", "--top", "-1"], "--top: -1"),
        (["train.demo", "--steps", "many"], "steps"),
        (["train.report"], "runs"),
        (["train.evaluate"], "run"),
        (["train.sweep", ""], "sweep: ''"),
    ],
)
def test_a_mistake_on_the_command_line_is_told_before_anything_heavy_is_imported(arguments, said):
    done, modules = started("-m", *arguments)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert said in done.stderr
    assert not modules & HEAVY


@pytest.mark.parametrize("arguments", [["list", "rope*"], ["show", "relative_table"]])
def test_encodings_are_told_of_without_timm_and_without_the_compiler(arguments):
    done, modules = started("-m", "visionpos", *arguments)
    assert done.returncode == 0, done.stderr
    assert "torch" in modules
    assert not modules & ((HEAVY | {"torch._dynamo", "torch._inductor"}) - {"torch", "numpy"})


@pytest.mark.parametrize(
    "imports",
    [
        "import timm, visionpos",
        "import visionpos, importlib.util; importlib.util.find_spec('timm'); import timm.layers, timm",
        pytest.param("from visionpos.masked.decoder import MaskedDecoder; import timm", marks=pytest.mark.slow),
        pytest.param("import visionpos.timm_models, timm", marks=pytest.mark.slow),
    ],
)
def test_timm_knows_the_models_in_every_order_of_imports(imports):
    leaves = "leaves = timm.models.get_notrace_modules()"  # asked for before any family is imported
    own = "visionpos.set_encoding(timm.create_model('convit_tiny', depth=1, embed_dim=4), 'GPSA')"  # a family's name
    build = "timm.create_model('visionpos_vit_xs_patch4_32', encoding='rope_mixed', depth=1)"
    shown = f"print(len(timm.list_models('visionpos*')), *{build}.blocks[0].attn.encodings)"
    kinds = f"{build}.blocks[0].attn.encodings[0], {build}.blocks[0].attn"
    traced = f"print('whole:', *(isinstance(each, tuple(leaves)) for each in ({kinds})))"
    code = f"{imports}\nimport visionpos, timm\n{leaves}\n{own}\n{shown}\n{traced}"
    done, _ = started("-c", code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("7 RopeMixed(")
    assert "whole: True True" in done.stdout


def test_the_registry_fills_itself_when_it_is_first_asked():
    code = """
from visionpos.bias.alibi2d import Alibi2D
import visionpos
encoding_info, list_encodings = visionpos.registry.encoding_info, visionpos.registry.list_encodings
try:
    @visionpos.registry.register_encoding("rope_mixed")
    class Mine(Alibi2D): pass
except ValueError as error:
    print(error)
print(encoding_info("peg")["place"], *list_encodings(place="none"))
"""
    done, modules = started("-c", code)
    taken, found = done.stdout.splitlines()
    assert "'rope_mixed' is taken by visionpos.rotary.rope_mixed" in taken
    assert found == "conditional none"
    assert "timm" not in modules


def test_the_public_names_are_listed_where_they_are_imported():
    assert vp.__all__ == public.__all__
    assert dir(vp) == sorted([*vp.__all__, "__version__"])
    with pytest.raises(AttributeError, match="'visionpos' has no attribute 'create_modle'"):
        _ = vp.create_modle
    with pytest.raises(ImportError, match="cannot import name 'Position'"):
        exec("from visionpos import Position")


def test_no_module_hides_a_public_name():
    modules = {module.name for module in pkgutil.iter_modules(vp.__path__)}
    assert modules & set(vp.__all__) == {"layers"}  # itself the public name


def test_a_call_waits_for_an_import(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "awaited.py").write_text("import neighbour\nready = True\n")
    (tmp_path / "neighbour.py").write_text("")
    (tmp_path / "faulty.py").write_text("1 / 0\n")
    calls = []
    call_after_import("awaited", lambda: calls.append(sys.modules["awaited"].ready))
    call_after_import("faulty", lambda: calls.append("faulty"))
    import neighbour  # noqa: F401

    assert calls == []
    import awaited  # noqa: F401

    assert calls == [True]
    with pytest.raises(ZeroDivisionError):
        import faulty  # noqa: F401
    assert calls == [True]
    call_after_import("awaited", lambda: calls.append("at once"))
    assert calls == [True, "at once"]
    for name in ("awaited", "neighbour"):
        monkeypatch.delitem(sys.modules, name)
