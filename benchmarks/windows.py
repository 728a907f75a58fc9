"""Rows of Swin Transformers, v1 and v2: window attention, the way to windows and back, whole models; over timm's."""

from __future__ import annotations

import copy
from functools import partial

import timm
import torch
from torch import Tensor, nn

import visionpos as vp
from benchmarks.measure import Case, Row, Setting

V1, V2 = "swin_tiny_patch4_window7_224", "swinv2_tiny_window8_256"


class Attention(nn.Module):
    """The window attention of a block, with the block's shift mask."""

    def __init__(self, block: nn.Module):
        super().__init__()
        self.attn, self.mask = block.attn, block.attn_mask

    def forward(self, x: Tensor) -> Tensor:
        """Return the attention of windows x (B * windows, N, C)."""
        return self.attn(x, mask=self.mask)


class PassOn(nn.Module):
    """Stand-in for window attention that returns its input."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return windows x (B * windows, N, C) as they are."""
        return x


class Partition(nn.Module):
    """The way of a block to windows and back: shift, partition, reverse."""

    def __init__(self, block: nn.Module):
        super().__init__()
        self.block = block
        self.block.attn = PassOn()

    def forward(self, x: Tensor) -> Tensor:
        """Return tokens x (B, H, W, C) after the way to windows and back."""
        return self.block._attn(x)


def variants(native: nn.Module, encodings: tuple[str, ...]) -> dict[str, nn.Module]:
    """Return timm's Swin, the same converted, and with other encodings."""
    converted = copy.deepcopy(native)
    vp.get_encoding(converted)  # prepares the model for encodings, and leaves it its own
    others = {encoding: vp.set_encoding(copy.deepcopy(native), encoding) for encoding in encodings}
    return {"timm": native, "visionpos": converted, **others}


def peers(setting: Setting) -> dict[str, str]:
    """Return which variants must equal timm's; in bf16, torch's fused attention rounds elsewhere."""
    return {"visionpos": "timm"} | ({"visionpos, fused": "timm"} if setting.dtype == "float32" else {})


def with_fused(modules: dict[str, nn.Module]) -> dict[str, nn.Module]:
    """Return the modules and the converted one with torch's fused attention, which has not timm's bits.

    So TIMM_FUSED_ATTN=2 has it.
    """
    fused = copy.deepcopy(modules["visionpos"])
    for module in fused.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = True
    return {**modules, "visionpos, fused": fused}


def swin(setting: Setting, name: str, batch: tuple[int, int], **options) -> Case:
    """Build the row of a whole Swin; options are timm's."""
    native = timm.create_model(name, num_classes=10, drop_path_rate=0.0, **options)
    images = torch.randn(setting.batch(*batch), 3, *native.patch_embed.img_size)
    modules = with_fused(variants(native, ("none", "rope_axial")))
    return Case((images,), modules, peers(setting), depth=sum(len(stage.blocks) for stage in native.layers))


def blocks(name: str, stage: int, shifted: bool, encodings: tuple[str, ...], options: dict) -> dict[str, nn.Module]:
    """Return one block of a stage for each variant; of each stage the second is shifted."""
    native = timm.create_model(name, **{"depths": (2, 2, 2, 2), "drop_path_rate": 0.0, **options})
    for module in native.modules():
        if isinstance(module, nn.Linear):
            module.reset_parameters()  # logits of the order of 1, as trained ones; timm's are near 0 at first
    found = variants(native, encodings)
    return {variant: model.layers[stage].blocks[int(shifted)] for variant, model in found.items()}


def attention(setting: Setting, name: str, stage: int, shifted: bool, batch: tuple[int, int], **options) -> Case:
    """Build a row of window attention on tokens that are cut into windows."""
    found = blocks(name, stage, shifted, ("none",), options)
    (height, width), area, dim = (getattr(found["timm"], fact) for fact in ("input_resolution", "window_area", "dim"))
    windows = setting.batch(*batch) * height * width // area
    x = torch.randn(windows, area, dim, requires_grad=setting.backward)
    rounding = 4 if name == V2 else 1  # timm rounds cosines, and then multiplies them by tau
    return Case(
        (x,), with_fused({key: Attention(block) for key, block in found.items()}), peers(setting), depth=rounding
    )


def partition(setting: Setting, name: str, stage: int, shifted: bool, batch: tuple[int, int], **options) -> Case:
    """Build a row of shift, partition and reverse, without the attention between."""
    found = blocks(name, stage, shifted, (), options)
    height, width = found["timm"].input_resolution
    x = torch.randn(setting.batch(*batch), height, width, found["timm"].dim, requires_grad=setting.backward)
    return Case((x,), {key: Partition(block) for key, block in found.items()}, {"visionpos": "timm"})


STAGES = {  # model, stage, batches on a CPU and on CUDA
    "56 x 56": (V1, 0, (2, 256)),
    "14 x 14": (V1, 2, (8, 256)),
    "v2 64 x 64": (V2, 0, (2, 256)),
}
KINDS = {"window": attention, "partition": partition}

ROWS = [
    *(
        Row(
            kind,
            f"{kind} {place}{', shifted' * shifted}",
            partial(build, name=name, stage=stage, shifted=shifted, batch=batch),
            quick=shifted,
        )
        for kind, build in KINDS.items()
        for place, (name, stage, batch) in STAGES.items()
        for shifted in (False, True)
    ),
    Row("swin", "Swin-T", partial(swin, name=V1, batch=(2, 256)), quick=True),
    Row("swin", "Swin v2-T", partial(swin, name=V2, batch=(2, 128))),
]
