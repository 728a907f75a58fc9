"""Muon for the matrices of the blocks, NAdamW for the rest."""

import copy
import signal
from pathlib import Path

import pytest
import torch
from timm.optim import NAdamW

from tests.training.run.interrupting import at, config_of, differences, outcome, run, send
from tests.training.run.test_engine import trainer_of
from tests.training.tiny_run import picture_config, task_config
from visionpos.training.run.checkpoint import Checkpoint
from visionpos.training.run.optimizer import cosine_schedule, parameter_groups

SWIN = (
    "{name: swin_tiny_patch4_window7_224, options: {window_size: 2, embed_dim: 16, depths: [2, 1], num_heads: [2, 2]}}"
)


@pytest.mark.parametrize("recipe", [[], ["--recipe.weight_decay", "0"], ["--recipe.layer_decay", "0.5"]])
@pytest.mark.parametrize("host", [[], ["--model", SWIN, "--data.grid", "[4, 4]"]])
def test_it_takes_the_matrices_of_the_blocks_and_leaves_the_rest_to_nadamw(host, recipe, tmp_path):
    encoding = ["--encoding", "relative_table" if host else "learned+rope_mixed"]
    trainer = trainer_of(task_config(tmp_path, "--recipe.optimizer", "muon", *encoding, *host, *recipe))
    names = {id(parameter): name for name, parameter in trainer.model.named_parameters()}
    by_muon, by_nadamw = set(), set()
    for group in trainer.optimizer.param_groups:
        (by_nadamw if group.get("use_fallback") else by_muon).update(names[id(p)] for p in group["params"])
    layers = ("attn.qkv.weight", "attn.proj.weight", "mlp.fc1.weight", "mlp.fc2.weight")
    inside = {name for name in names.values() if name.startswith(("blocks.", "layers.")) and name.endswith(layers)}
    merging = {"layers.1.downsample.reduction.weight"} if host else set()
    assert by_muon == inside | merging
    assert by_nadamw == set(names.values()) - by_muon
    trainer.advance(1)
    state = trainer.optimizer.state
    assert {name for p, name in ((p, names[id(p)]) for p in state) if "momentum_buffer" in state[p]} == by_muon


def test_what_is_left_to_nadamw_follows_the_schedule_of_all(tmp_path):
    flags = "--recipe.clip_grad", "null", "--recipe.warmup", "0.5"
    trainer, rest = (trainer_of(task_config(tmp_path, *flags, "--recipe.optimizer", "muon")) for _ in range(2))
    options = {"lr": rest.recipe.lr, "betas": rest.recipe.betas, "eps": trainer.optimizer.defaults["eps"]}
    rest.optimizer = NAdamW(parameter_groups(rest.model, rest.recipe), **options)
    rest.schedule = cosine_schedule(rest.optimizer, rest.recipe, rest.total)
    for each in (trainer, rest):
        each.advance(1)
    assert trainer.learning_rate == rest.learning_rate < rest.recipe.lr / 2
    for name, parameter in trainer.model.named_parameters():
        same = torch.allclose(parameter, rest.model.get_parameter(name), rtol=1e-5, atol=1e-7)
        assert same != (name.startswith("blocks.") and parameter.ndim == 2), name


def test_a_checkpoint_of_another_timm_goes_on_at_the_rate_of_the_schedule(tmp_path):
    trainer, other = (trainer_of(task_config(tmp_path, "--recipe.optimizer", "muon")) for _ in range(2))
    trainer.advance(4)
    scalars = trainer.scalars()
    for group in scalars["optimizer"]:
        group.pop("fallback_lr_scale", None)  # timm 1.0.26 has none, and the rate of the last step in its place
        assert group["adamw_lr"] < 0.7 * trainer.recipe.lr
    other.restore(Checkpoint(4, copy.deepcopy(trainer.tensors()), scalars))
    for each in (trainer, other):
        each.advance(1)
    for name, parameter in trainer.model.named_parameters():
        assert torch.equal(parameter, other.model.get_parameter(name)), name


def test_it_learns(tmp_path):
    config = picture_config(tmp_path, "--recipe.optimizer", "muon", "--recipe.epochs", "20", "--recipe.flip", "false")
    losses = trainer_of(config).advance(60)
    assert losses[-6:].mean() < 0.7 * losses[:3].mean()


def interrupt(folder: Path) -> list[str]:
    flags = "--recipe.optimizer", "muon"
    assert run(config_of("pictures", folder / "whole", *flags)) == 0
    config = config_of("pictures", folder / "run", *flags)
    for number in (signal.SIGTERM, signal.SIGINT):
        assert run(config, at("after backward", 4, send(number))) == 128 + number
    assert run(config) == 0
    return differences(outcome(folder / "run"), outcome(folder / "whole"))


def test_an_interrupted_run_ends_bit_identical(fresh, tmp_path):
    assert fresh(interrupt, tmp_path) == []
