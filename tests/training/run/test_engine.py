"""The loop: what a step does, what every encoding has in common, and when it refuses to go on."""

import copy
import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from timm.utils import ModelEmaV3

import visionpos as vp
from tests.training.tiny_run import picture_config, task_config
from visionpos.training.errors import CheckpointError, ConfigError, NonFiniteError
from visionpos.training.run.build import build_model
from visionpos.training.run.distributed import Distributed
from visionpos.training.run.engine import Trainer, corresponding, mixed_precision, pick_device, seed_layers
from visionpos.training.run.objective import Classification, correct
from visionpos.training.run.source import open_source

CPU = torch.device("cpu")


def trainer_of(config):
    torch.manual_seed(config.seed)
    source = open_source(config.data, config.recipe, config.seed, Distributed(CPU))
    return Trainer(build_model(config, source.metadata), Classification(source, config), config, Distributed(CPU))


def test_one_step_is_adamw_on_the_clipped_gradient_with_the_averaged_weights_behind(tmp_path):
    trainer = trainer_of(
        picture_config(tmp_path, "--model.options.drop_path_rate", "0", "--model.options.proj_drop_rate", "0")
    )
    model = copy.deepcopy(trainer.model)
    expected = torch.optim.AdamW(
        [
            {"params": [p for n, p in model.named_parameters() if p.ndim > 1 and n not in ("pos_embed", "cls_token")]},
            {
                "params": [p for n, p in model.named_parameters() if p.ndim < 2 or n in ("pos_embed", "cls_token")],
                "weight_decay": 0,
            },
        ],
        lr=trainer.recipe.lr / 2,  # the first of one warm-up step
        betas=(0.9, 0.95),
        weight_decay=0.05,
    )
    images, labels = trainer.source.batch(0)
    loss = F.cross_entropy(model(images), labels)  # smoothed by the source
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    expected.step()
    assert torch.allclose(trainer.advance(1), loss, rtol=1e-6)
    for name, parameter in trainer.model.named_parameters():
        assert torch.allclose(parameter, model.get_parameter(name), rtol=1e-5, atol=1e-7), name
        assert torch.equal(trainer.ema.module.get_parameter(name), parameter), name  # decay 0 in the first step
    before = trainer.ema.module.get_parameter("head.weight").clone()
    trainer.advance(1)
    decay = 1 - 2 ** (-2 / 3)
    blend = before.lerp(trainer.model.head.weight, 1 - decay)
    assert torch.allclose(trainer.ema.module.head.weight, blend, atol=1e-7)


def test_averages_are_those_of_timm_and_whole_numbers_are_copied():
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 2))
    ema = ModelEmaV3(model, decay=0.9)
    expected = copy.deepcopy(ema)
    for step in (1, 2):
        model(torch.randn(5, 3)).square().sum().backward()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= parameter.grad
        expected.update(model, step)
        averaged, copied = corresponding(ema.module, model)
        Trainer._average(SimpleNamespace(averaged=averaged, copied=copied), ema.get_decay(step))
    assert expected.module[1].num_batches_tracked == 2
    for name, tensor in expected.module.state_dict().items():
        assert torch.equal(ema.module.state_dict()[name], tensor), name


def test_learning_rate_rises_and_falls_by_the_step(tmp_path):
    trainer = trainer_of(task_config(tmp_path, "--recipe.steps", "20", "--recipe.warmup", "0.25", "--recipe.lr", "1"))
    rates = []
    for _ in range(20):
        trainer.advance(1)
        rates.append(trainer.learning_rate)
    warm = [(step + 1) / 6 for step in range(5)]
    cosine = [1e-5 + (1 - 1e-5) * (1 + math.cos(math.pi * step / 15)) / 2 for step in range(15)]
    assert rates == pytest.approx(warm + cosine)


def test_a_run_of_one_step_takes_it_at_the_full_rate_and_timm_says_nothing(tmp_path, caplog):
    trainer = trainer_of(task_config(tmp_path, "--recipe.steps", "1", "--recipe.lr", "0.5"))
    trainer.advance(1)
    assert trainer.learning_rate == 0.5
    assert caplog.text == ""


def test_weight_decay_spares_encodings_norms_and_biases(tmp_path):
    trainer = trainer_of(task_config(tmp_path, "--encoding", "learned"))
    names = {id(parameter): name for name, parameter in trainer.model.named_parameters()}
    groups = {
        group["weight_decay"]: {names[id(p)] for p in group["params"]} for group in trainer.optimizer.param_groups
    }
    assert "pos_embed" in groups[0]
    assert all(name.endswith("weight") and "norm" not in name for name in groups[0.05])
    assert sum(map(len, groups.values())) == len(names)


ENCODINGS = ["none", "learned", "{name: learned, init_std: 0.5}", "sincos2d", "rope_axial", "alibi2d", "relative_table"]


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_one_seed_gives_every_encoding_the_same_shared_weights(encoding, tmp_path):
    plain = trainer_of(task_config(tmp_path, "--encoding", "none")).model.state_dict()
    with_encoding = trainer_of(task_config(tmp_path, "--encoding", encoding)).model.state_dict()
    assert plain.keys() <= with_encoding.keys()
    assert all(torch.equal(tensor, with_encoding[name]) for name, tensor in plain.items())


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("bad", [0, 3, 5])
@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_what_is_not_finite_is_named_by_its_step_and_changes_nothing(where, bad, optimizer, tmp_path, monkeypatch):
    config = task_config(tmp_path, "--recipe.optimizer", optimizer)
    trainer, good = trainer_of(config), trainer_of(config)
    if bad:
        good.advance(bad)
    loss = trainer.objective.loss

    def poisoned(forward, batch, step, distributed):
        value = loss(forward, batch, step, distributed)
        if step != bad:
            return value
        return value * math.nan if where == "loss" else value + (value - value.detach()) * math.inf

    monkeypatch.setattr(trainer.objective, "loss", poisoned)
    message = rf"not finite at step {bad + 1} of 6 \(pictures of the task made for seed 0, step {bad}\)"
    with pytest.raises(NonFiniteError, match=message):
        trainer.advance(6)
    for name, parameter in trainer.model.named_parameters():
        assert torch.equal(parameter, good.model.get_parameter(name)), name


def test_an_accelerator_that_runs_ahead_changes_nothing_after_the_bad_step(tmp_path, monkeypatch):
    trainer, good = (trainer_of(task_config(tmp_path)) for _ in range(2))
    good.advance(2)
    loss = trainer.objective.loss
    monkeypatch.setattr(
        trainer.objective,
        "loss",
        lambda f, batch, step, distributed: loss(f, batch, step, distributed) * (1 if step != 2 else math.nan),
    )
    for _ in range(5):
        trainer._one_step()
    assert int(trainer.first_bad) == 2
    for name, parameter in trainer.model.named_parameters():
        assert torch.equal(parameter, good.model.get_parameter(name)), name


def test_weights_that_are_not_finite_are_neither_measured_nor_saved(tmp_path):
    trainer = trainer_of(task_config(tmp_path))
    with torch.no_grad():
        trainer.model.head.weight[0] = math.nan
    with pytest.raises(NonFiniteError, match="weights are not finite"):
        trainer.tensors()
    with pytest.raises(NonFiniteError, match="weights are not finite"):
        trainer.evaluate()


def test_right_answers_are_told_picture_by_picture():
    model = torch.nn.Flatten()
    answers = torch.eye(4)
    batches = [(answers[:3], torch.tensor([0, 1, 0])), (answers[3:], torch.tensor([3]))]
    assert correct(model, batches).tolist() == [True, True, False, True]


def test_an_evaluation_leaves_the_mode_alone(tmp_path):
    trainer = trainer_of(task_config(tmp_path))
    trainer.evaluate()
    assert trainer.model.training
    assert not trainer.ema.module.training


def test_devices():
    assert pick_device("cpu") == CPU
    with pytest.raises(ConfigError, match=r"device: 'tpu' given; accepted here: auto, cpu"):
        pick_device("tpu")


def test_precision_is_fp32_on_a_cpu_unless_asked_for(tmp_path):
    assert not mixed_precision(CPU, "auto")._enabled
    trainer = trainer_of(task_config(tmp_path, "--precision", "bf16", "--encoding", "rope_axial"))
    seen = []
    trainer.model.head.register_forward_hook(lambda module, args, output: seen.append(output.dtype))
    assert trainer.advance(1).dtype == torch.float32
    assert seen == [torch.bfloat16]
    assert all(parameter.dtype == torch.float32 for parameter in trainer.model.parameters())


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    from visionpos.training.run.checkpoint import Checkpoint

    trainer, other = (trainer_of(task_config(tmp_path, "--encoding", name)) for name in ("none", "learned"))
    for each in (trainer, other):
        each.advance(1)
    with pytest.raises(CheckpointError, match="step 1 does not fit this run"):
        trainer.restore(Checkpoint(1, other.tensors(), other.scalars()))


@pytest.mark.slow
@pytest.mark.unhooked
def test_compiled_training_is_the_same_training(tmp_path):
    losses = [trainer_of(task_config(tmp_path, "--compile", how)).advance(4) for how in ("off", "on")]
    assert torch.allclose(*losses, rtol=1e-4)


NAMED = ["none", "sinusoidal", "learned", "sincos2d", "rope1d", "rope_axial", "alibi", "alibi2d", "relative_table"]
OTHERS = [pytest.param(name, marks=pytest.mark.slow) for name in vp.list_encodings() if name not in NAMED]


@pytest.mark.parametrize("host", ["vit", "swin"])
@pytest.mark.parametrize("encoding", [*NAMED, *OTHERS])
def test_every_weight_of_a_model_trains(encoding, host, tmp_path):
    options = "patch_size: 4, window_size: 2, embed_dim: 16, depths: [2, 1], num_heads: [2, 2]"
    swin = ["--model", f"{{name: swin_tiny_patch4_window7_224, options: {{{options}}}}}", "--data.grid", "[4, 4]"]
    flags = ["--encoding", encoding, "--recipe.warmup", "0", *(swin if host == "swin" else [])]
    trainer = trainer_of(task_config(tmp_path, *flags))
    before = copy.deepcopy(trainer.model.state_dict())
    trainer.advance(2)
    same = [key for key, tensor in trainer.model.state_dict().items() if torch.equal(tensor, before[key])]
    assert not same


def test_layers_are_seeded_as_torch_seeds_everything():
    seed_layers(torch.device("cpu"), 2**40 + 7)
    got = torch.rand(5)
    torch.manual_seed(2**40 + 7)
    assert torch.equal(got, torch.rand(5))
