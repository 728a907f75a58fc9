"""What makes the small models of `visionpos.analysis.hosts.ZOO` deeper: two attention layers or more."""

# their blocks see where tokens are by the shape of what they get
GRIDS = ("Swin", "Swin v2", "SAM", "MaxViT", "CoAtNet", "TinyViT", "LeViT")
DEEPER = {
    "Swin": {"depths": (1, 2), "num_heads": (3, 6)},
    "Swin v2": {"depths": (1, 2), "num_heads": (3, 6)},
    "Hiera": {"stages": (1, 2), "q_pool": 1},
    "MaxViT": {},
    "CoAtNet": {"depths": (1, 2)},
    "TinyViT": {"depths": (1, 2)},
    "LeViT": {"embed_dim": (48, 64), "depth": (1, 1), "num_heads": (3, 4)},
}


def deeper(family):
    return DEEPER.get(family, {"depth": 2})
