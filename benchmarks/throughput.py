"""Training throughput on pictures of CIFAR's size: ours, and timm's pieces as timm's train.py puts them together.

Command   python -m benchmarks.throughput [--models vit_192x9 swin_96] [--batch 512] [--steps 40] [--output FILE.json]
Clock     wall time of whole steps, data included, after a warm-up; in turns, medians over the rounds
Ours      pictures on the device, batched augmentation, compiled and in bf16 on a GPU, eager and in fp32 on a CPU
timm's    PIL pictures, `create_loader` with its prefetcher, RandAugment (rand-m9-mstd0.5) and random erasing, `Mixup`,
          AdamW, averaged weights, bf16 autocast on a GPU; eager, as train.py is without --torchcompile

Both do the same kind of augmentation: crop, flip, a policy of colours and geometry, erasing, mixup or CutMix. The
pictures are made up, since what they show does not change the time.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import timm
import torch
from PIL import Image
from timm.data import Mixup, create_loader
from timm.loss import SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2
from timm.utils import ModelEmaV3
from torch import Tensor
from torch.utils.data import Dataset

import visionpos as vp
from benchmarks.report import facts
from visionpos.training.config.command_line import read_yaml
from visionpos.training.config.schema import Config, Data, Model, Recipe
from visionpos.training.data.datasets import Pictures
from visionpos.training.run.distributed import Distributed
from visionpos.training.run.engine import Trainer, pick_device
from visionpos.training.run.objective import Classification
from visionpos.training.run.source import PictureSource

CONFIGS = Path(__file__).parents[1] / "configs"
OWN = {"vit_192x9": "learned", "swin_96": "relative_table"}  # what timm's model has
CLASSES = 10
Step = Callable[[int], object]  # trains that many steps, and waits for the device


def made_up(count: int) -> Pictures:
    """Return random images of 32 x 32 pixels and labels."""
    images = torch.randint(256, (count, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return Pictures(images, torch.arange(count) % CLASSES, tuple(map(str, range(CLASSES))))


def ours(model: dict, encoding: str, pictures: Pictures, batch: int, device: torch.device) -> Step:
    """Return the step of our trainer with the full augmentation policy."""
    recipe = Recipe(**read_yaml(CONFIGS / "recipe" / "cifar_200_epochs.yaml") | {"batch_size": batch})
    config = Config(Model(**model), Data("cifar10"), recipe, encoding)
    source = PictureSource(pictures, pictures, "test", recipe, 0, device)
    host = timm.create_model(model["name"], **model["options"], img_size=32, num_classes=CLASSES)
    trainer = Trainer(vp.set_encoding(host, encoding), Classification(source, config), config, Distributed(device))
    return trainer.advance


class PilPictures(Dataset):
    """A data set of images as a folder of decoded files would give them."""

    def __init__(self, pictures: Pictures):
        self.images = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in pictures.images]
        self.labels = pictures.labels.tolist()
        self.transform = None

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int):
        return self.transform(self.images[index]), self.labels[index]


def timms(model: dict, pictures: Pictures, batch: int, device: torch.device) -> Step:
    """Return the step of timm's model, loader, mixup, optimiser and averaged weights."""
    host = timm.create_model(model["name"], **model["options"], img_size=32, num_classes=CLASSES).to(device).train()
    gpu = device.type == "cuda"
    loader = create_loader(
        PilPictures(pictures), (3, 32, 32), batch, is_training=True, use_prefetcher=gpu, no_aug=False,
        scale=(0.8, 1.0), auto_augment="rand-m9-mstd0.5", re_prob=0.25, re_mode="pixel", device=device,
        num_workers=(os.cpu_count() or 1) if gpu else 0, persistent_workers=gpu,
    )  # fmt: skip
    mixup = Mixup(0.8, 1.0, prob=0.5, label_smoothing=0.1, num_classes=CLASSES)
    loss_of, optimizer = SoftTargetCrossEntropy(), create_optimizer_v2(host, "adamw", lr=1e-3, weight_decay=0.05)
    ema = ModelEmaV3(host, decay=0.9998)

    def forever() -> Iterator[tuple[Tensor, Tensor]]:
        while True:
            yield from loader

    batches = forever()

    def train(steps: int) -> None:
        for _ in range(steps):
            images, targets = mixup(*(part.to(device) for part in next(batches)))
            with torch.autocast(device.type, torch.bfloat16, enabled=gpu):
                loss = loss_of(host(images), targets)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(host.parameters(), 1.0)
            optimizer.step()
            ema.update(host)
        loss.item()

    return train


def measure(name: str, batch: int, steps: int, rounds: int, device: torch.device) -> dict:
    """Return the images per second of both, with one model."""
    model, pictures = read_yaml(CONFIGS / "model" / f"{name}.yaml"), made_up(max(4 * batch, 2048))
    sides = {"ours": ours(model, OWN[name], pictures, batch, device), "timm": timms(model, pictures, batch, device)}
    rates: dict[str, list[float]] = {side: [] for side in sides}
    for train in sides.values():
        train(max(3, steps // 10))
    for _ in range(rounds):
        for side, train in sides.items():
            started = time.perf_counter()
            train(steps)
            rates[side].append(batch * steps / (time.perf_counter() - started))
    medians = {side: statistics.median(each) for side, each in rates.items()}
    return {"model": name, "batch": batch, "images_per_second": medians, "times": medians["ours"] / medians["timm"]}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(OWN), default=list(OWN))
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    device = pick_device(args.device)
    rows = [measure(name, args.batch, args.steps, args.rounds, device) for name in args.models]
    print("| model | batch | ours, images/s | timm, images/s | times |\n|---|---|---|---|---|")
    for row in rows:
        each = row["images_per_second"]
        print(f"| {row['model']} | {row['batch']} | {each['ours']:.0f} | {each['timm']:.0f} | {row['times']:.2f} |")
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        command = "python -m benchmarks.throughput"
        args.output.write_text(json.dumps({"rows": rows, "facts": facts(device, command, args.rounds)}, indent=1))


if __name__ == "__main__":
    main()
