"""Rows of whole models: with an encoding, over the same without any, and over timm's own."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import partial

import timm
import torch
from torch import Tensor, nn

import visionpos as vp
from benchmarks.measure import Case, Row, Setting

TINY, SMALL = {"embed_dim": 192, "num_heads": 3}, {"embed_dim": 384, "num_heads": 6}
SIZES = {  # options of timm's, and batches on a CPU and on CUDA
    "Ti/4": ({**TINY, "img_size": 32, "patch_size": 4}, (32, 512)),
    "Ti/16": ({**TINY, "img_size": 224, "patch_size": 16}, (4, 256)),
    "S/16": ({**SMALL, "img_size": 224, "patch_size": 16}, (4, 256)),
}
ENCODINGS = ("learned", "sincos2d", "rope_axial", "rope_mixed", "alibi2d", "lookhere", "relative_table")
LONG = ("rope_axial", "alibi2d", "lookhere")
MASKED = ("sincos2d", "rope_axial", "rope_mixed", "alibi2d")
HOSTS = {  # timm's models with an encoding of their own besides the learned table
    "rope ViT": "vit_small_patch16_rope_224",
    "mixed rope ViT": "vit_small_patch16_rope_mixed_224",
    "BEiT": "beit_base_patch16_224",
}


class Visible(nn.Module):
    """An encoder that sees a part of the patches, other ones of every picture: the encoder of a masked autoencoder."""

    def __init__(self, model: nn.Module, keep: Tensor):
        super().__init__()
        self.model, self.keep = model, keep

    def forward(self, x: Tensor) -> Tensor:
        """Return the features of images x (B, 3, H, W)."""
        return self.model.forward_kept(x, self.keep)


def pictures(setting: Setting, model: nn.Module, batch: tuple[int, int]) -> tuple[Tensor]:
    """Return a batch of random images for a model."""
    return (torch.randn(setting.batch(*batch), 3, *model.patch_embed.img_size),)


def vit(setting: Setting, options: dict, batch: tuple[int, int], encodings: Sequence[str] | None = ENCODINGS) -> Case:
    """Build a ViT row: each encoding (None: all) over timm's ViT without any, and the learned table over timm's."""
    native = timm.create_model("vit_tiny_patch16_224", num_classes=10, **options)
    plain = timm.create_model("vit_tiny_patch16_224", num_classes=10, pos_embed="none", **options)
    plain.load_state_dict(native.state_dict(), strict=False)
    names = [name for name in vp.list_encodings() if name != "none"] if encodings is None else encodings
    modules = {"none": plain, **{name: vp.set_encoding(copy.deepcopy(native), name) for name in names}}
    if "learned" not in modules:
        return Case(pictures(setting, plain, batch), modules)
    modules["timm's learned"] = native
    return Case(pictures(setting, plain, batch), modules, {"learned": "timm's learned"}, depth=len(plain.blocks))


def host(setting: Setting, name: str, options: dict, batch: tuple[int, int]) -> Case:
    """Build a row of timm's model with its own encoding, converted, and as timm has it, over the same without any."""
    native = timm.create_model(name, num_classes=10, **options)
    for key, parameter in native.named_parameters():
        if key.endswith("relative_position_bias_table"):
            nn.init.normal_(parameter, std=0.02)  # zeros at first
    converted = copy.deepcopy(native)
    vp.get_encoding(converted)  # prepares the model for encodings, and leaves it its own
    modules = {"none": vp.set_encoding(copy.deepcopy(native), "none"), "visionpos": converted, "timm": native}
    return Case(pictures(setting, native, batch), modules, {"visionpos": "timm"}, depth=len(native.blocks))


def masked(setting: Setting, options: dict, batch: tuple[int, int], visible: float = 0.25) -> Case:
    """Build a row of the encoder of a masked autoencoder on the visible patches."""
    plain = vp.set_encoding(timm.create_model("vit_tiny_patch16_224", num_classes=0, **options), "none")
    images = pictures(setting, plain, batch)
    patches = plain.patch_embed.num_patches
    keep = torch.rand(len(images[0]), patches).argsort(dim=1)[:, : int(visible * patches)]
    models = {name: vp.set_encoding(copy.deepcopy(plain), name) for name in ("none", *MASKED)}
    return Case(images, {name: Visible(model, keep) for name, model in models.items()})


ROWS = [
    *(
        Row("model", f"model {size}", partial(vit, options=options, batch=batch), quick=size == "Ti/4")
        for size, (options, batch) in SIZES.items()
    ),
    *(
        Row("host", f"{kind} {size}", partial(host, name=name, options=options, batch=batch))
        for kind, name in HOSTS.items()
        for size, (options, batch) in SIZES.items()
    ),
    Row("mae", "encoder S/16, 25 % visible", partial(masked, options=SIZES["S/16"][0], batch=(8, 1024)), quick=True),
    Row(
        "every", "every encoding, Ti/4", partial(vit, options=SIZES["Ti/4"][0], batch=SIZES["Ti/4"][1], encodings=None)
    ),
    *(
        Row(
            "long",
            f"long {side} x {side}",
            partial(vit, options={**TINY, "img_size": 16 * side, "patch_size": 16}, batch=batch, encodings=LONG),
        )
        for side, batch in ((32, (1, 32)), (64, (1, 8)))
    ),
]
