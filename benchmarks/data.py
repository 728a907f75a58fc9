"""Speed of making training batches: ours, of images that stay in memory, over PIL image by image.

Command   python -m benchmarks.data [--rounds 11] [--output FILE.json]
Hardware  one core: one thread, CPU time; about a minute
Pictures  made up, 32 x 32, in memory on both sides: no file is read or decoded
Goals     crop, flip and normalise at least 16 times PIL with torchvision's first transforms; the full policy at least 5
          times timm's default training transform with RandAugment, random erasing and mixup
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import random
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from statistics import median

import numpy as np
import PIL
import timm
import torch
import torchvision
from PIL import Image
from timm.data import Mixup, create_transform
from torchvision import transforms

from benchmarks.clock import ratio, take_turns
from visionpos.training.data.augment import Augment, Augmentation

BATCH, PICTURES, CLASSES, SIDE = 512, 5000, 10, 32
MEAN, STD = (0.49, 0.48, 0.45), (0.25, 0.24, 0.26)
MIX = {"mixup_alpha": 0.8, "cutmix_alpha": 1.0, "label_smoothing": 0.1}
RANDAUGMENT = "rand-m9-mstd0.5"  # its relative with -inc1 fails with Pillow 13, in posterize
SIMPLE = Augmentation(crop_padding=4, flip=True)
FULL = Augmentation(crop_padding=4, flip=True, auto_augment="trivial", re_prob=0.25, **MIX)


class Pictures:
    """The same made-up images as a tensor and as PIL images, smooth as photographs are, and a batch of them."""

    def __init__(self):
        draw = torch.Generator().manual_seed(0)
        coarse = torch.rand(PICTURES, 3, SIDE // 4, SIDE // 4, generator=draw)
        smooth = torch.nn.functional.interpolate(coarse, scale_factor=4, mode="bicubic").clamp(0, 1)
        self.images = (255 * smooth).to(torch.uint8)
        self.labels = torch.randint(CLASSES, (PICTURES,), generator=draw)
        self.pil = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in self.images]
        self.rows = torch.randperm(PICTURES, generator=draw)[:BATCH]


def ours(pictures: Pictures, options: Augmentation) -> Callable[[], tuple[torch.Tensor, torch.Tensor]]:
    """Return a step that makes a batch as training does."""
    augment = Augment(pictures.images, pictures.labels, CLASSES, MEAN, STD, options)
    generator = torch.Generator().manual_seed(0)
    return lambda: augment(pictures.rows, generator)


def by_pil(pictures: Pictures, transform: Callable, mixup: Mixup | None = None) -> Callable[[], object]:
    """Return a step that makes a batch as a loader without workers does."""

    def step():
        images = torch.stack([transform(pictures.pil[row]) for row in pictures.rows])
        labels = pictures.labels[pictures.rows]
        return mixup(images, labels) if mixup else (images, labels)

    return step


def torchvision_transform() -> Callable:
    """Return the transform that crops, flips and normalises."""
    crop = transforms.RandomCrop(SIDE, padding=4, padding_mode="reflect")
    return transforms.Compose(
        [crop, transforms.RandomHorizontalFlip(), transforms.ToTensor(), transforms.Normalize(MEAN, STD)]
    )


def timm_transform() -> Callable:
    """Return timm's default transform for training, with RandAugment and random erasing."""
    return create_transform(
        (3, SIDE, SIDE), is_training=True, auto_augment=RANDAUGMENT, re_prob=0.25, re_mode="pixel", mean=MEAN, std=STD
    )


def main() -> None:
    """Measure, print a Markdown table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=11, help="measurements of each row, two or more")
    parser.add_argument("--output", type=Path, help="a JSON file")
    args = parser.parse_args()
    if args.rounds < 2:
        parser.error(f"--rounds: {args.rounds} given; accepted: from 2")
    torch.set_num_threads(1)
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002, timm's Mixup draws from here
    torch.manual_seed(0)
    pictures = Pictures()
    mixup = Mixup(num_classes=CLASSES, **MIX)
    steps = {
        "PIL + torchvision: crop, flip, normalise": by_pil(pictures, torchvision_transform()),
        "ours: crop, flip, normalise": ours(pictures, SIMPLE),
        f"PIL + timm: default, {RANDAUGMENT}, erasing, mixup": by_pil(pictures, timm_transform(), mixup),
        "ours: crop, flip, TrivialAugment, normalise, erasing, mixup": ours(pictures, FULL),
    }
    for step in steps.values():
        step()
    times = take_turns(steps, torch.device("cpu"), args.rounds)
    names = list(steps)
    rows = []
    print("| batches of 512 pictures, 32 x 32 | images/s | µs per image | times as fast (quartiles) | goal |")
    print("| --- | --- | --- | --- | --- |")
    for base, name, goal in ((*names[:2], 16), (*names[2:], 5)):
        faster = ratio(times, base, name)
        for each, cell in ((base, "1 | "), (name, f"{faster.median:.1f} ({faster.q1:.1f}-{faster.q3:.1f}) | {goal}")):
            seconds = median(times[each]) / BATCH
            print(f"| {each} | {1 / seconds:,.0f} | {1e6 * seconds:.1f} | {cell} |")
            rows.append({"row": each, "images_per_second": 1 / seconds})
        rows[-1] |= {"over": base, "times_as_fast": asdict(faster), "goal": goal}
    if args.output:
        facts = {
            "date": datetime.date.today().isoformat(),
            "device": platform.processor() or platform.machine(),
            "versions": {each.__name__: each.__version__ for each in (torch, torchvision, timm, PIL)},
            "command": f"python -m benchmarks.data --rounds {args.rounds}",
            "batch": BATCH,
            "rows": rows,
        }
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(facts, indent=1))
        print(f"\nwritten to {args.output}")


if __name__ == "__main__":
    main()
