"""Batches of pictures whose grids differ, as timm's NaFlex loader gives them: patches, coordinates, padding."""

import torch

import visionpos as vp


def patches_of(picture, patch):
    """(h w, patch patch C) of a picture (1, C, H, W): row-major patches, channels last in each."""
    rows = picture.unfold(2, patch, patch).unfold(3, patch, patch)[0]  # (C, h, w, patch, patch)
    return rows.permute(1, 2, 3, 4, 0).flatten(2).flatten(0, 1)


def ragged_batch(grids, length, patch=4, seed=1, order=None):
    """The dict of a batch, and its pictures one by one.

    Padding has other numbers than 0, so that it shows where it acts. `order` puts the patches of each picture into
    another order.
    """
    draw = torch.Generator().manual_seed(seed)
    batch = {
        "patches": torch.randn(len(grids), length, patch * patch * 3, generator=draw),
        "patch_coord": torch.zeros(len(grids), length, 2, dtype=torch.long),
        "patch_valid": torch.zeros(len(grids), length, dtype=torch.bool),
    }
    pictures = []
    for index, (height, width) in enumerate(grids):
        pictures.append(torch.randn(1, 3, height * patch, width * patch, generator=draw))
        places = torch.arange(height * width) if order is None else order(height * width)
        batch["patches"][index, : height * width] = patches_of(pictures[-1], patch)[places]
        batch["patch_coord"][index, : height * width] = vp.Positions.grid((height, width)).coords.long()[places]
        batch["patch_valid"][index, : height * width] = True
    return batch, pictures


def double(batch):
    return {name: part.double() if part.is_floating_point() else part for name, part in batch.items()}


def distance(model, batch, pictures):
    """How far a batch is from its pictures one at a time."""
    out = model(batch)
    return max((out[index] - model(picture)[0]).abs().max().item() for index, picture in enumerate(pictures))
