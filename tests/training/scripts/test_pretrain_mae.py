"""Masked pretraining, fine-tuning of what it made, and probes of it, as whole runs."""

import json

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

import visionpos as vp
from tests.training.scripts.test_classify import contents, interrupt
from tests.training.tiny_run import picture_config, task_config, write_pictures
from train.probe import command
from visionpos.training.config.command_line import parse
from visionpos.training.config.schema import PretrainConfig
from visionpos.training.errors import ConfigError, run_command
from visionpos.training.run import checkpoint, classification
from visionpos.training.run.build import build_model, pretrained_encoder
from visionpos.training.run.pretraining import train
from visionpos.training.run.probing import fit_linear, nearest_neighbours, probe

MAE = """
model:
  name: vit_tiny_patch16_224
  options: {patch_size: 4, embed_dim: 16, depth: 2, num_heads: 2, drop_path_rate: 0.3, proj_drop_rate: 0.2}
data: {name: FOLDER}
recipe: {epochs: 3, batch_size: 8, ema_decay: null, crop_padding: 2, flip: true, lr: 5e-3}
masked: {ratio: 0.5, decoder_dim: 16, decoder_depth: 1, decoder_num_heads: 2}
device: cpu
"""
SIMMIM = """
model:
  name: swin_tiny_patch4_window7_224
  options: {patch_size: 1, window_size: [2, 3], embed_dim: 8, depths: [1, 2], num_heads: [1, 2]}
data: {name: FOLDER}
recipe: {epochs: 3, batch_size: 8, ema_decay: 0.9}
masked: {method: simmim, ratio: 0.6, norm_pix_loss: false}
encoding: relative_table
device: cpu
"""


def pretrain_config(folder, *flags, text=MAE):
    folder.mkdir(exist_ok=True)
    if not (folder / "pictures").exists():
        write_pictures(folder / "pictures")
    (folder / "mae.yaml").write_text(text.replace("FOLDER", str(folder / "pictures")))
    return parse(["--config", str(folder / "mae.yaml"), "--output", str(folder / "mae"), *flags], PretrainConfig)


@pytest.mark.parametrize(("text", "kind"), [(MAE, "raw"), (SIMMIM, "ema")])
def test_a_run_leaves_its_record_and_pictures(text, kind, tmp_path):
    result = train(pretrain_config(tmp_path, "--encoding", "rope_axial", text=text))
    run = tmp_path / "mae"
    assert json.loads((run / "result.json").read_text()) == json.loads(json.dumps(result))
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert [line["reconstruction"]["raw"]["test"] for line in lines][-1] == result["reconstruction"]["raw"]["test"]
    assert result["final"] == {"weights": kind, "test": result["reconstruction"][kind]["test"]}
    assert len(list((run / "reconstruction").glob("step-*.png"))) == len(lines)
    assert result["encoder_parameters"] < result["parameters"]
    assert result["encodings"]


@pytest.mark.parametrize("text", [MAE, SIMMIM])
def test_an_interrupted_run_ends_bit_identical(text, tmp_path, monkeypatch):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    train(pretrain_config(whole, "--encoding", "rope_axial", text=text))
    for _ in range(2):
        with monkeypatch.context() as patch:
            interrupt(patch, 2)
            with pytest.raises(KeyboardInterrupt):
                train(pretrain_config(broken, "--encoding", "rope_axial", text=text))
    train(pretrain_config(broken, "--encoding", "rope_axial", text=text))
    assert contents(broken / "mae") == contents(whole / "mae")


def test_it_learns_to_reconstruct(tmp_path):
    flags = ("--recipe.epochs", "30", "--recipe.eval_every", "15", "--masked.norm_pix_loss", "false")
    train(pretrain_config(tmp_path, *flags, "--encoding", "sincos2d"))
    losses = [json.loads(line)["reconstruction"]["raw"]["test"] for line in (tmp_path / "mae" / "log.jsonl").open()]
    assert losses[-1] < 0.3  # the pictures differ by brightness alone, and their pixels have variance 1


def test_evaluation_hides_the_same_patches_whatever_the_seed(tmp_path):
    results = []
    for seed in ("0", "1"):
        flags = ("--seed", seed, "--recipe.lr", "1e-30", "--recipe.min_lr", "0", "--recipe.epochs", "1")
        folder = tmp_path / seed
        results.append(train(pretrain_config(folder, *flags))["reconstruction"])
    again = train(
        pretrain_config(tmp_path / "again", "--recipe.lr", "1e-30", "--recipe.min_lr", "0", "--recipe.epochs", "1")
    )
    assert results[0] == again["reconstruction"]
    assert results[0] != results[1]


def fine_tune(folder, *flags):
    options = "{patch_size: 4, embed_dim: 16, depth: 2, num_heads: 2}"
    return picture_config(folder, "--model.options", options, "--encoding", "rope_axial", *flags)


def test_fine_tuning_starts_from_the_encoder(tmp_path, monkeypatch):
    train(pretrain_config(tmp_path, "--encoding", "rope_axial"))
    config = fine_tune(tmp_path, "--init", str(tmp_path / "mae"), "--recipe.layer_decay", "0.5")
    starts = []
    monkeypatch.setattr(classification, "Classification", lambda source, config: 1 / 0)
    monkeypatch.setattr(classification, "load_encoder", lambda model, path: starts.append((model, path)))
    with pytest.raises(ZeroDivisionError):
        classification.train(config)
    monkeypatch.undo()
    model = starts[0][0]
    classification.load_encoder(model, config.init)
    weights = pretrained_encoder(config.init)
    state = model.state_dict()
    assert {key for key in state if key not in weights} == {"head.weight", "head.bias"}
    assert all(torch.equal(state[key], value) for key, value in weights.items())
    result = classification.train(config)
    assert result["config"]["init"] == str(tmp_path / "mae")


def test_layer_decay_slows_lower_layers(tmp_path):
    from visionpos.training.run.distributed import Distributed
    from visionpos.training.run.engine import Trainer
    from visionpos.training.run.objective import Classification
    from visionpos.training.run.optimizer import parameter_groups
    from visionpos.training.run.source import open_source

    config = fine_tune(tmp_path, "--recipe.layer_decay", "0.5")
    source = open_source(config.data, config.recipe, 0, Distributed(torch.device("cpu")))
    model = build_model(config, source.metadata)
    scales = {id(p): group["lr_scale"] for group in parameter_groups(model, config.recipe) for p in group["params"]}
    by_name = {name: scales[id(parameter)] for name, parameter in model.named_parameters()}
    assert by_name["head.weight"] == 1
    assert by_name["blocks.1.attn.qkv.weight"] == by_name["blocks.0.attn.qkv.weight"] * 2
    assert by_name["patch_embed.proj.weight"] == by_name["blocks.0.attn.qkv.weight"] / 2
    trainer = Trainer(model, Classification(source, config), config, Distributed(torch.device("cpu")))
    trainer.advance(2)
    rates = {group["lr"] / group["lr_scale"] for group in trainer.optimizer.param_groups}
    assert max(rates) - min(rates) < 1e-12
    assert trainer.learning_rate == pytest.approx(max(rates))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--init", "nowhere"], "init: 'nowhere' given; accepted: the directory of a train.pretrain_mae run"),
        (["--recipe.layer_decay", "1.5"], "recipe.layer_decay: 1.5 given; accepted: a number above 0, at most 1"),
    ],
)
def test_a_wrong_start_is_one_line(flags, message, tmp_path, capsys):
    assert run_command(lambda: classification.train(fine_tune(tmp_path, *flags))) == 2
    assert message in capsys.readouterr().err


def test_an_encoder_of_another_encoding_or_size_is_refused(tmp_path):
    train(pretrain_config(tmp_path, "--encoding", "learned", "--recipe.epochs", "1"))
    with pytest.raises(ConfigError, match=r"init: the encoder of .*mae does not fit the model: .*pos_embed"):
        classification.train(fine_tune(tmp_path, "--init", str(tmp_path / "mae")))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--masked.ratio", "0.97"], "masked.ratio: 0.97 given; accepted: a number above 0, at most 0.95"),
        (["--masked.method", "simmim"], "masked.decoder_dim: 16 given, but simmim has no decoder"),
        (["--masked.decoder_num_heads", "3"], "masked: "),
        (["--masked.decoder_encoding", "ropee"], "masked: "),
        (["--masked.maskin", "block"], "masked.maskin: no such field; did you mean 'masked.masking'?"),
        (["--recipe.label_smoothing", "0.1"], "recipe.label_smoothing: 0.1 given, but pretraining has no use for it"),
        (["--recipe.layer_decay", "0.7"], "recipe.layer_decay: 0.7 given, but pretraining has no use for it"),
        (["--init", "somewhere"], "init: somewhere given, but pretraining has no use for it"),
    ],
)
def test_a_mistake_is_one_line(flags, message, tmp_path, capsys):
    assert run_command(lambda: train(pretrain_config(tmp_path, *flags))) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_mae_of_a_swin_names_simmim(tmp_path, capsys):
    text = SIMMIM.replace("method: simmim", "method: mae")
    assert run_command(lambda: train(pretrain_config(tmp_path, text=text))) == 2
    assert "for Swin there is SimMIM" in capsys.readouterr().err


def test_a_probe_of_a_pretrained_and_of_a_classifying_run(tmp_path, capsys):
    train(pretrain_config(tmp_path, "--encoding", "sincos2d"))
    command([str(tmp_path / "mae")])
    report = json.loads((tmp_path / "mae" / "probe.json").read_text())
    assert {"linear", "neighbours"} == report["trained"].keys() == report["random"].keys()
    assert report["trained"]["linear"] > 0.9  # brightness is easy
    table = capsys.readouterr().out
    assert "| random |" in table
    assert "30 training pictures" in table
    classification.train(fine_tune(tmp_path))
    assert probe(tmp_path / "run")["trained"]["linear"] > 0.9


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["nowhere"], "nowhere is no run directory"),
        (["x", "--l2", "-1"], "--l2: -1.0 given; accepted: a number from 0"),
        (["x", "--positions", "--l2", "1e-3"], "--l2: 0.001 given with --positions, which has no use for it"),
    ],
)
def test_a_wrong_probe_is_one_line(argv, message, capsys):
    assert run_command(lambda: command(argv)) == 2
    assert message in capsys.readouterr().err


def test_a_linear_probe_finds_the_least_loss():
    torch.manual_seed(0)
    inputs, labels = torch.randn(60, 5), torch.randint(3, (60,))
    scaled = (inputs - inputs.mean(0)) / inputs.std(0)
    layer = torch.nn.Linear(5, 3)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.5)
    for _ in range(3000):
        optimizer.zero_grad()
        (F.cross_entropy(layer(scaled), labels) + 1e-2 * layer.weight.square().sum()).backward()
        optimizer.step()
    expected = (layer(scaled).argmax(1) == labels).float().mean().item()
    assert fit_linear((inputs, labels), (inputs, labels), 3, 1e-2) == pytest.approx(expected, abs=1 / 60)


def test_neighbours_vote_by_similarity():
    train_set = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0]]), torch.tensor([0, 0, 1])
    test_set = torch.tensor([[2.0, 0.1], [0.1, 3.0]]), torch.tensor([0, 1])
    assert nearest_neighbours(train_set, test_set, 2) == 1.0
    assert nearest_neighbours(train_set, (test_set[0], 1 - test_set[1]), 2) == 0.0


def test_the_encoder_is_a_plain_timm_model_afterwards(tmp_path):
    train(pretrain_config(tmp_path, "--encoding", "rope_axial"))
    plain = vp.create_model(
        "vit_tiny_patch16_224", encoding="rope_axial", img_size=(8, 12), patch_size=4, embed_dim=16, depth=2,
        num_heads=2, num_classes=0,
    )  # fmt: skip
    plain.load_state_dict(pretrained_encoder(str(tmp_path / "mae")))


def test_positions_are_read_from_a_run_on_pictures_and_from_one_on_a_task(tmp_path, capsys):
    classification.train(picture_config(tmp_path, "--encoding", "{name: learned, init_std: 5}"))
    command([str(tmp_path / "run"), "--positions"])
    report = json.loads((tmp_path / "run" / "position_probe.json").read_text())
    assert (report["encoding"], report["images"]) == ("learned(init_std=5)", 9)
    assert [layer["layer"] for layer in report["trained"]] == [0, 1]
    assert report["trained"] != report["random"]
    assert f"| 1 | {report['random'][1]['row']:.2f} | " in capsys.readouterr().out
    assert not (tmp_path / "run" / "probe.json").exists()
    (tmp_path / "task").mkdir()
    classification.train(task_config(tmp_path / "task"))
    command([str(tmp_path / "task" / "run"), "--positions"])
    assert "none: R^2 of row and column of a patch, 512 pictures" in capsys.readouterr().out


def test_an_encoder_saved_as_a_file_starts_what_its_run_starts_to_the_bit(tmp_path):
    """Fine-tuning on a labelled subset, from the directory of a pretraining run and from its encoder alone."""
    train(pretrain_config(tmp_path, "--encoding", "learned+rope_mixed", "--recipe.epochs", "1"))
    file = tmp_path / "encoder.safetensors"
    save_file(pretrained_encoder(str(tmp_path / "mae")), file)
    found = {}
    for name, init in {"run": tmp_path / "mae", "file": file}.items():
        flags = ["--encoding", "learned+rope_mixed", "--data.per_class", "8", "--data.size", "[8, 12]"]
        config = picture_config(tmp_path, "--init", str(init), *flags, "--recipe.epochs", "2")
        config.output = str(tmp_path / name)
        result = classification.train(config)
        found[name] = result["accuracy"], result["loss"], checkpoint.load(tmp_path / name / "checkpoints").tensors
    assert found["run"][:2] == found["file"][:2]
    for kind, tensors in found["run"][2].items():
        assert all(torch.equal(value, found["file"][2][kind][key]) for key, value in tensors.items()), kind
