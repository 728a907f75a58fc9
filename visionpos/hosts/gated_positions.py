"""The positions of ConViT's `GPSA` as an encoding."""

from __future__ import annotations

import torch
from timm.models.convit import GPSA
from torch import Tensor

from ..places import BiasEncoding
from ..positions import Positions
from ..registry import register_native


@register_native
class GatedPositions(BiasEncoding):
    """ConViT's positional attention, kept as the host's own: it is blended with that of the content, after the softmax.

    A = (1 - s) softmax(q k^T / sqrt(head_dim)) + s softmax(w (x, y, x^2 + y^2) + c), s = sigmoid(g), for each head;
    (y, x) = key minus query, in grid steps.

    Args:
        host: timm's attention, whose parameters are used.

    Attributes:
        pos_proj: w and c, Linear(3, heads).
        gating_param: g, (heads,).
    """

    paper = "d'Ascoli et al. 2021, arXiv 2103.10697"
    name = "GPSA"
    learnable = True
    translation_invariant = True

    def __init__(self, host: GPSA):
        super().__init__(host.num_heads)
        self.pos_proj, self.gating_param = host.pos_proj, host.gating_param

    def no_weight_decay(self) -> set[str]:
        """Return no name, as timm does."""
        return set()

    def encode(self, queries: Positions, keys: Positions) -> Tensor:
        delta = keys.coords[..., None, :, :] - queries.coords[..., :, None, :]  # ([B,] N, N, 2)
        offsets = torch.cat([delta.flip(-1), delta.square().sum(-1, keepdim=True)], dim=-1)
        return self.pos_proj(offsets.to(self.pos_proj.weight.dtype)).movedim(-1, -3)  # ([B,] heads, N, N)

    def modify_attention(self, tensors: object, prepared: Tensor) -> None:
        """Do nothing: the layer blends the softmax of these logits in."""

    def blend(self, probabilities: Tensor, logits: Tensor) -> Tensor:
        """Return the attention (B, heads, N, N) of both, each row divided by its sum, as in timm."""
        gate = self.gating_param.view(-1, 1, 1).sigmoid()  # (heads, 1, 1)
        both = (1.0 - gate) * probabilities + gate * logits.softmax(dim=-1)
        return both / both.sum(dim=-1, keepdim=True)
