"""What makes the small models of `visionpos.analysis.hosts.ZOO` deeper: two attention layers or more."""

# their blocks see where tokens are by the shape of what they get
GRIDS = ("Swin", "Swin v2", "SAM", "MaxViT", "CoAtNet", "TinyViT")
DEEPER = {
    "Swin": {"depths": (1, 2), "num_heads": (3, 6)},
    "Swin v2": {"depths": (1, 2), "num_heads": (3, 6)},
    "Hiera": {"stages": (1, 2), "q_pool": 1},
    "MaxViT": {},
    "CoAtNet": {"depths": (1, 2)},
    "PiT": {"base_dims": (16, 16), "depth": (1, 2), "heads": (3, 6)},
    "TinyViT": {"depths": (1, 2)},
}


def deeper(family):
    return DEEPER.get(family, {"depth": 2})
