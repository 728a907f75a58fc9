"""A user's script with types, which `mypy --strict` passes; tests/test_typing.py runs it."""

import torch
from torch import Tensor, nn

import visionpos as vp


def embedding(grid: tuple[int, int]) -> Tensor:
    return vp.create_encoding("sincos2d", dim=32).embed(vp.Positions.grid(grid))


def table(grid: tuple[int, int]) -> Tensor:
    encoding = vp.create_encoding("relative_table", num_heads=2, feat_shape=grid)
    return encoding.bias(vp.Positions.grid(grid))


def angles(grid: tuple[int, int]) -> Tensor:
    return vp.create_encoding("rope_axial", num_heads=2, head_dim=16).angles(vp.Positions.grid(grid))


def mixed(tokens: Tensor, grid: tuple[int, int]) -> Tensor:
    return vp.create_encoding("peg", dim=tokens.shape[-1]).mix(tokens, vp.Positions.grid(grid))


def by_any_name(name: str, **options: int) -> vp.PositionEncoding:
    return vp.create_encoding(name, **options)


def model(encoding: str) -> nn.Module:
    return vp.create_model("vit_tiny_patch16_224", encoding=encoding, img_size=32, depth=1)


if __name__ == "__main__":
    print(embedding((2, 3)).shape, table((2, 3)).shape, angles((2, 3)).shape)
    print(mixed(torch.zeros(1, 6, 8), (2, 3)).shape, by_any_name("alibi", num_heads=2).name, type(model("none")))
