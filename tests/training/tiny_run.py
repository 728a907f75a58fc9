"""Tiny data and tiny runs, for the tests of training."""

import numpy as np
from PIL import Image

from visionpos.training.config.command_line import parse

TASK = """
model:
  name: vit_tiny_patch16_224
  options: {patch_size: 4, embed_dim: 16, depth: 2, num_heads: 2, mlp_ratio: 2, class_token: false, global_pool: avg}
data: {name: direction, grid: [3, 4], holdout: left}
recipe: {steps: 6, eval_every: 2, batch_size: 8, ema_decay: 0.9}
device: cpu
"""

PICTURES = """
model:
  name: vit_tiny_patch16_224
  options: {patch_size: 4, embed_dim: 16, depth: 2, num_heads: 2, drop_path_rate: 0.3, proj_drop_rate: 0.2}
data: {name: FOLDER}
recipe: {epochs: 3, batch_size: 8, ema_decay: 0.9, label_smoothing: 0.1, crop_padding: 2, flip: true, lr: 5e-3}
device: cpu
"""


def task_config(folder, *flags):
    """A run on a position task, in `folder / run`."""
    return config(folder, TASK, *flags)


def picture_config(folder, *flags):
    """A run on pictures of 8 x 12 pixels in class folders, in `folder / run`."""
    if not (folder / "pictures").exists():
        write_pictures(folder / "pictures")
    return config(folder, PICTURES.replace("FOLDER", str(folder / "pictures")), *flags)


def config(folder, text, *flags):
    (folder / "tiny.yaml").write_text(text)
    return parse(["--config", str(folder / "tiny.yaml"), "--output", str(folder / "run"), *flags])


def write_pictures(folder, height=8, width=12):
    """Three classes by brightness, 10 pictures of each to train on and 3 to test."""
    rng = np.random.default_rng(0)
    for split, count in {"train": 10, "test": 3}.items():
        for label, name in enumerate(("dark", "grey", "light")):
            (folder / split / name).mkdir(parents=True)
            for index in range(count):
                pixels = rng.integers(80 * label, 80 * label + 90, (height, width, 3)).astype(np.uint8)
                Image.fromarray(pixels).save(folder / split / name / f"{index}.png")
