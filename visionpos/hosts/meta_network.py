"""The bias of Swin v2-CR as an encoding."""

from __future__ import annotations

import torch
from timm.models.swin_transformer_v2_cr import WindowMultiHeadAttention
from torch import Tensor

from ..places import BiasEncoding
from ..positions import Positions
from ..registry import register_native


@register_native
class MetaNetwork(BiasEncoding):
    """The network of a Swin v2-CR, kept as the host's own: b = MLP(g), g = sign(delta) log(1 + |delta|) on each axis.

    delta = query minus key, in grid steps. While training, some hidden channels of each pair are dropped.

    Args:
        host: timm's attention, whose network, under the name `meta_mlp`, is used.

    Attributes:
        meta_mlp: timm's Mlp, 2 -> hidden -> heads.
    """

    paper = "Liu et al. 2021, arXiv 2111.09883"
    name = "meta_mlp"
    learnable = True
    translation_invariant = True
    extrapolation = "formula"

    def __init__(self, host: WindowMultiHeadAttention):
        super().__init__(host.num_heads)
        self.meta_mlp = host.meta_mlp

    def no_weight_decay(self) -> set[str]:
        """Return no name, as timm does."""
        return set()

    def encode(self, queries: Positions, keys: Positions) -> Tensor:
        delta = queries.coords[..., :, None, :] - keys.coords[..., None, :, :]  # (N, N, 2)
        g = delta.sign() * torch.log(1.0 + delta.abs())
        bias = self.meta_mlp(g.flatten(0, -2).to(self.meta_mlp.fc1.weight.dtype))  # (N N, heads)
        return bias.unflatten(0, delta.shape[:-1]).movedim(-1, -3)  # (heads, N, N)
