"""Train a timm model with the encoding of your choice to classify pictures, or to solve a position task.

    python -m train.classify --config configs/run/vit_cifar10_small.yaml --encoding rope_axial --seed 0

Run it again to continue after an interruption. The result is that of the last step, averaged weights first; it is never
the best of several looks at the test pictures.
"""

import copy
import platform
import sys
import time
from dataclasses import asdict
from importlib.metadata import version
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

import visionpos as vp
from train import checkpoint
from train.build import build_model, check_model
from train.command_line import parse
from train.config import Config, encoding_label
from train.engine import Trainer, pick_device
from train.errors import run_command
from train.record import RunDirectory, write_json
from train.source import open_source

__all__ = ["headline", "resolved_encodings", "train", "versions"]


def train(config: Config) -> dict[str, Any]:
    """Train as configured, or continue; returns the result, which is also in the run directory."""
    device = pick_device(config.device)
    check_model(config)
    run = RunDirectory(config)
    if run.result is not None:
        print(f"{run.path} is finished: {headline(run.result)}")
        return run.result
    found = checkpoint.load(run.checkpoints)
    source = open_source(config.data, config.recipe, config.seed, device)
    torch.manual_seed(config.seed)
    model = build_model(config, source.facts)
    torch.manual_seed(config.seed)  # whatever the encoding drew, dropout is the same for all
    trainer, line = Trainer(model, source, config, device), {"seconds": 0.0}
    if found is not None:
        trainer.restore(found)
        line = found.state["line"]
        print(f"{run.path}: continuing after step {trainer.step} of {trainer.total}")
    run.begin(trainer.step)
    try:
        line = fit(trainer, run, config, line)
    finally:
        run.close()
    result = summary(config, trainer, line)
    write_json(run.path / "result.json", result)
    print(f"{run.path}: {headline(result)}")
    return result


def fit(trainer: Trainer, run: RunDirectory, config: Config, line: dict[str, Any]) -> dict[str, Any]:
    """Train to the end; every `eval_every`: an evaluation, a log line, a checkpoint. `line` is the last one so far."""
    between = config.recipe.eval_every * (trainer.source.steps_per_epoch or 1)
    label = encoding_label(config.encoding)
    seconds, losses = line["seconds"], []
    quiet = not sys.stderr.isatty()
    with tqdm(total=trainer.total, initial=trainer.step, desc=label, unit="step", disable=quiet) as bar:
        while trainer.step < trainer.total:
            until = min(trainer.total, (trainer.step // between + 1) * between)
            steps = min(config.log_every, until - trainer.step)
            started = time.perf_counter()
            losses.append(trainer.advance(steps))
            seconds += time.perf_counter() - started
            loss = losses[-1].mean().item()
            run.scalar("train/loss", loss, trainer.step)
            run.scalar("train/lr", trainer.learning_rate, trainer.step)
            bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
            bar.update(steps)
            if trainer.step == until:
                line = {
                    "step": trainer.step,
                    "epoch": trainer.epoch,
                    "lr": trainer.learning_rate,
                    "loss": torch.cat(losses).mean().item(),
                    "accuracy": trainer.evaluate(),
                    "seconds": round(seconds, 2),
                    "images_per_second": round(trainer.step * config.recipe.batch_size / seconds, 1),
                }
                losses = []
                run.log(line)
                state = trainer.scalars() | {"line": line, "facts": trainer.source.facts}
                checkpoint.save(run.checkpoints, trainer.step, trainer.tensors(), state)
    return line


def summary(config: Config, trainer: Trainer, line: dict[str, Any]) -> dict[str, Any]:
    """Everything that a table of results may want to say about a finished run."""
    final = "ema" if trainer.ema is not None else "raw"
    plain = vp.set_encoding(copy.deepcopy(trainer.model), "none")
    parameters, without = (sum(each.numel() for each in model.parameters()) for model in (trainer.model, plain))
    gpu = trainer.device.type == "cuda"
    return {
        "final": {"weights": final, **line["accuracy"][final]},
        "accuracy": line["accuracy"],
        "chance": trainer.source.facts["chance"],
        "loss": line["loss"],
        "steps": trainer.step,
        "epochs": trainer.epoch,
        "seconds": line["seconds"],
        "images_per_second": line["images_per_second"],
        "parameters": parameters,
        "encoding_parameters": parameters - without,
        "encodings": resolved_encodings(trainer.model),
        "seed": config.seed,
        "data": trainer.source.facts,
        "device": torch.cuda.get_device_name(trainer.device) if gpu else f"CPU ({platform.machine()})",
        "threads": torch.get_num_threads(),
        "versions": versions(),
        "config": asdict(config),
    }


def resolved_encodings(model: nn.Module) -> list[dict[str, Any]]:
    """Each different encoding of a model with every option as it was built, and the number of modules of it."""
    found: list[dict[str, Any]] = []
    for encoding in vp.get_encoding(model):
        info = vp.encoding_info(encoding.name)
        named = [key for key in (*info["required"], *info["options"]) if hasattr(encoding, key)]
        options = {key: getattr(encoding, key) for key in named}
        entry = {"name": encoding.name, "place": encoding.place, **options}
        same = next((other for other in found if {**other, "modules": 0} == {**entry, "modules": 0}), None)
        if same is None:
            found.append(entry | {"modules": 1})
        else:
            same["modules"] += 1
    return found


def versions() -> dict[str, str]:
    """Of what decides the numbers."""
    return {"python": platform.python_version()} | {name: version(name) for name in ("torch", "torchvision", "timm")}


def headline(result: dict[str, Any]) -> str:
    """A finished run in one line."""
    parts = ", ".join(f"{part} {value:.1%}" for part, value in result["final"].items() if part != "weights")
    seconds = f"{result['seconds']:.0f} s of training"
    return f"accuracy {parts} ({result['final']['weights']} weights, chance {result['chance']:.1%}), {seconds}"


def main() -> None:
    sys.exit(run_command(lambda: train(parse(sys.argv[1:]))))


if __name__ == "__main__":
    main()
