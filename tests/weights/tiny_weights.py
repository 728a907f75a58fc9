"""Small models, and made-up state dicts in the names of the original code."""

import torch

from tests import small
from tests.small import VIT

DIM, HEADS, DEPTH = (VIT[key] for key in ("embed_dim", "num_heads", "depth"))
GRID = (8, 12)


def swin(name="swin_tiny_patch4_window7_224", **options):
    shape = {"img_size": (32, 64), "window_size": (4, 2), "embed_dim": 24, "depths": (1, 2, 1), "num_heads": (2, 4, 6)}
    return small.swin(name=name, **{**shape, **options})


def drawn(*shape, seed=3):
    return 0.1 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def block(gates=("gamma_1", "gamma_2"), bias=True):
    """Shapes of a block of ViT, in the order in which its authors have it."""
    shapes = {"norm1.weight": (DIM,), "norm1.bias": (DIM,), "attn.qkv.weight": (3 * DIM, DIM)}
    shapes |= {"attn.qkv.bias": (3 * DIM,)} if bias else {}
    shapes |= {"attn.proj.weight": (DIM, DIM), "attn.proj.bias": (DIM,), "norm2.weight": (DIM,), "norm2.bias": (DIM,)}
    shapes |= {"mlp.fc1.weight": (4 * DIM, DIM), "mlp.fc1.bias": (4 * DIM,)}
    return shapes | {"mlp.fc2.weight": (DIM, 4 * DIM), "mlp.fc2.bias": (DIM,)} | dict.fromkeys(gates, (DIM,))


def checkpoint(blocks, **others):
    """A state dict with drawn values; "__" in a keyword stands for a dot, a tensor is taken as it is."""
    shapes = {"cls_token": (1, 1, DIM), "patch_embed.proj.weight": (DIM, 3, 4, 4), "patch_embed.proj.bias": (DIM,)}
    shapes |= {f"blocks.{i}.{name}": shape for i in range(DEPTH) for name, shape in blocks.items()}
    shapes |= {"norm.weight": (DIM,), "norm.bias": (DIM,)}
    shapes |= {name.replace("__", "."): shape for name, shape in others.items()}
    tensors = (v if isinstance(v, torch.Tensor) else drawn(*v, seed=i) for i, v in enumerate(shapes.values()))
    return dict(zip(shapes, tensors, strict=True))


HEAD = {"head__weight": (5, DIM), "head__bias": (5,)}
TABLE = {"pos_embed": (1, 1 + 96, DIM)}
PLAIN = block(gates=())
