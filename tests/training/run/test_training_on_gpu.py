"""Runs on a GPU: every way to compile the step, interrupted and continued, masked pretraining."""

import os

import pytest
import torch

from tests.training.scripts.test_classify import contents, interrupt
from tests.training.scripts.test_pretrain_mae import MAE, SIMMIM, pretrain_config
from tests.training.tiny_run import picture_config
from visionpos import kernels
from visionpos.training.run import pretraining
from visionpos.training.run.classification import train

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.unhooked,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]
MODES = ("off", "on", "graphs")
NOTHING_DROPPED = ("--model.options.drop_path_rate", "0", "--model.options.proj_drop_rate", "0")


@pytest.fixture(autouse=True)
def _as_before(monkeypatch):
    """Take back what `deterministic` sets for the whole process, and let every test compile its own."""
    monkeypatch.setitem(os.environ, "CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.compiler.reset()
    yield
    torch.use_deterministic_algorithms(False)


def run_config(folder, *flags):
    folder.mkdir()
    return picture_config(folder, "--device", "cuda", "--encoding", "rope_axial", *flags)


def test_every_way_to_compile_trains_alike(tmp_path):
    losses = [
        train(run_config(tmp_path / mode, "--compile", mode, "--precision", "fp32", *NOTHING_DROPPED))["loss"]
        for mode in MODES
    ]
    assert losses[1:] == pytest.approx([losses[0]] * 2, rel=1e-3)


@pytest.mark.parametrize("mode", MODES)
def test_an_interrupted_deterministic_run_ends_bit_identical(mode, tmp_path, monkeypatch):
    flags = ("--compile", mode, "--deterministic", "true")
    assert train(run_config(tmp_path / "whole", *flags))["repeats_bits"]
    broken = run_config(tmp_path / "broken", *flags)
    with monkeypatch.context() as patch:
        interrupt(patch, 2)
        with pytest.raises(KeyboardInterrupt):
            train(broken)
    train(broken)
    assert contents(tmp_path / "broken" / "run") == contents(tmp_path / "whole" / "run")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("text", "kernel"), [(MAE, "rotate_qkv"), (SIMMIM, "window_attention")])
def test_masked_pretraining(text, kernel, mode, tmp_path):
    encoding = "rope_axial" if text == MAE else "relative_table"
    flags = ("--device", "cuda", "--compile", mode, "--encoding", encoding)
    kernels.choose._choices.clear()
    result = pretraining.train(pretrain_config(tmp_path / "run", *flags, text=text))
    assert 0 < result["final"]["test"] < 2  # of pixels with variance 1
    assert kernels.report()[kernel] == "fused"
