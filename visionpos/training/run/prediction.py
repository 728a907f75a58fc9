"""The probabilities that a trained run gives the classes of pictures in files. `train.predict` is its command line."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

from visionpos.training.data.augment import normalize
from visionpos.training.data.datasets import Shape
from visionpos.training.data.readers import decode
from visionpos.training.errors import ConfigError
from visionpos.training.run.build import trained_model
from visionpos.training.run.engine import mixed_precision, pick_device
from visionpos.training.run.record import open_run

__all__ = ["predict"]

BATCH_SIZE = 64


def predict(path: Path, files: Sequence[str], device: str | None = None) -> Iterator[tuple[str, dict[str, float]]]:
    """Yield each file with the probability of every class, by the run at `path`.

    Args:
        path: The run directory, of a run of `train.classify` on pictures.
        files: Pictures.
        device: Where to compute; by default where the run did.

    Raises:
        ConfigError: no such run, or one that does not classify pictures.
        DataError: a file that is no picture; names it.
    """
    config, found = open_run(path)
    metadata = found.metadata
    if config.data.is_task or hasattr(config, "masked"):
        raise ConfigError(f"{path}: accepted: a run of train.classify on pictures")
    place = pick_device(device or config.device)
    model, _ = trained_model(config, found)
    model.to(place)
    shape = Shape(tuple(metadata["image_size"]), config.data.crop_pct)
    classes = metadata.get("classes") or list(map(str, range(metadata["num_classes"])))
    for start in range(0, len(files), BATCH_SIZE):
        some = files[start : start + BATCH_SIZE]
        pictures = np.stack([np.asarray(shape.apply(decode(file, Path(file)))) for file in some])  # (B, H, W, C)
        images = torch.from_numpy(pictures).permute(0, 3, 1, 2).to(place)
        with torch.no_grad(), mixed_precision(place, config.precision):
            logits = model(normalize(images, metadata["mean"], metadata["std"]))
        for file, row in zip(some, logits.float().softmax(-1).tolist(), strict=True):
            yield file, dict(zip(classes, row, strict=True))
