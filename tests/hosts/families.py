"""What makes the small models of `visionpos.analysis.zoo.ZOO` deeper: two attention layers or more."""

from itertools import product

import pytest

import visionpos as vp
from visionpos.analysis.zoo import ZOO
from visionpos.hosts.host import timm_is_from

# their blocks see where tokens are by the shape of what they get
GRIDS = (
    "Swin",
    "Swin v2",
    "Swin v2-CR",
    "SAM",
    "MaxViT",
    "CoAtNet",
    "TinyViT",
    "LeViT",
    "EfficientFormer",
    "EfficientViT",
    "EfficientFormerV2",
    "PVT v2",
    "Twins",
    "DaViT",
    "XCiT",
    "GCViT",
    "HieraDet",
    "CoaT",
    "Visformer",
    "TNT",
)
CHANNELS = ("XCiT", "CoaT")  # attention over channels, or factorised, which has no place for rotations and biases
TWO_STAGES = {"embed_dims": (48, 48), "num_heads": (3, 3)}
DEEPER = {
    "Swin": {"depths": (1, 2), "num_heads": (3, 6)},
    "Swin v2": {"depths": (1, 2), "num_heads": (3, 6)},
    "Swin v2-CR": {"depths": (1, 2), "num_heads": (3, 6)},
    "Hiera": {"stages": (1, 2), "q_pool": 1},
    "MaxViT": {},
    "CoAtNet": {"depths": (1, 2)},
    "PiT": {"base_dims": (16, 16), "depth": (1, 2), "heads": (3, 6)},
    "CrossViT": {"depth": ((1, 2, 0), (1, 1, 0))},
    "CoaT": {},
    "Visformer": {"depth": (1, 2, 1)},
    "ConViT": {"depth": 3},
    "PVT v2": {**TWO_STAGES, "depths": (1, 1), "sr_ratios": (2, 1), "mlp_ratios": (2, 2)},
    "Twins": {**TWO_STAGES, "depths": (2, 1), "wss": (4, 4), "sr_ratios": (2, 1), "mlp_ratios": (2, 2)},
    "DaViT": {**TWO_STAGES, "depths": (1, 1)},
    "GCViT": {},
    "TinyViT": {"depths": (1, 2)},
    "EfficientViT": {"depth": (2,)},
    "EfficientFormer": {"depths": (1, 3), "num_vit": 2},
    "EfficientFormerV2": {"depths": (1, 1, 1, 1), "embed_dims": (8, 8, 12, 24)},
    "LeViT": {"embed_dim": (48, 64), "depth": (1, 1), "num_heads": (3, 4)},
    "HieraDet": {"stages": (1, 2)},
}
if not timm_is_from("1.0.31"):  # whose Swin v2 has no windows that a grid does not fill, as in the second stage
    DEEPER |= {family: {"depths": (2,), "num_heads": (3,)} for family in ("Swin v2", "Swin v2-CR")}


def fitting(family, spec):
    """What of a spec the family has a place for, or something else where that is nothing."""
    if family not in CHANNELS or spec is None:
        return spec
    if isinstance(spec, list):
        return [fitting(family, item) for item in spec]
    if isinstance(spec, dict):
        return {**spec, "name": "peg"}
    names = [name for name in spec.split("+") if vp.encoding_info(name)["place"] in ("input", "conditional")]
    return "+".join(names) or "sincos2d"


def deeper(family):
    return DEEPER.get(family, {"depth": 2})


def everywhere(families=tuple(ZOO), **choices):
    """Give a test every family with every choice: among the fast tests each family has one of them, in turn."""
    every = list(product(*choices.values()))
    cases = [
        pytest.param(family, *choice, marks=[] if number == turn % len(every) else pytest.mark.slow)
        for turn, family in enumerate(family for family in families if family in ZOO)
        for number, choice in enumerate(every)
    ]
    return pytest.mark.parametrize(("family", *choices), cases, ids=str)
