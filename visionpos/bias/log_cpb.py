"""Log-spaced continuous position bias: Swin Transformer V2 (Liu et al. 2021, arXiv 2111.09883)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..options import Count, GridSize, Positive
from ..places import BiasEncoding
from ..positions import Positions
from ..registry import register_encoding
from .offsets import bias_of_offsets, run_mlp


def log_coords(delta: Tensor, window: tuple[int, ...]) -> Tensor:
    """Return offsets (..., A) in Swin V2's units: sign(u) log2(1 + |u|) / log2(8), u = 8 delta / (window - 1).

    The farthest offset of the window is log2(9) / 3 = 1.0566; an axis of one cell has only the offset 0.
    """
    extents = [max(size - 1, 1) for size in window]
    u = torch.stack([8 * d / extent for d, extent in zip(delta.unbind(-1), extents, strict=True)], dim=-1)
    return u.sign() * torch.log2(1 + u.abs()) / 3


@register_encoding("log_cpb")
class LogCPB(BiasEncoding):
    """A small network turns the logarithm of the offset into a bias: b = 16 sigmoid(MLP(g)), always in (0, 16).

    g = sign(u) log2(1 + |u|) / log2(8), u = 8 delta / (M - 1), delta = query minus key, per axis, M the window.

    Swin V2 has it together with cosine attention, logits tau cos(q, k) with tau up to 100: 0 .. 16 is measured in
    those logits. With dot-product attention, as here in any host, it is another model than Swin V2.

    Args:
        num_heads: attention heads.
        pretrained_window: (M_h, M_w) that was trained on, so that other windows extrapolate in logarithmic units.
            None: the window or grid of the positions, whose borders then always have the same g. A window of one or
            three sizes makes the network one of as many axes.
        init_std: standard deviation of the network's initial weights, 0.02 in the authors' code; biases are zero.
            A network of zeros has no gradient, and 0 is refused.

    Attributes:
        cpb_mlp: Sequential(Linear(2, 512), ReLU, Linear(512, heads, bias=False)), with an input for each axis.

    Raises:
        ValueError: a window that is not positive.
    """

    paper = "Liu et al. 2021, arXiv 2111.09883"
    learnable = True
    from_model = ("pretrained_window",)
    translation_invariant = True
    extrapolation = "formula"  # `pretrained_window`

    def __init__(self, num_heads: Count, pretrained_window: GridSize | None = None, init_std: Positive = 0.02):
        super().__init__(num_heads)
        self.pretrained_window = None if pretrained_window is None else tuple(pretrained_window)
        self.init_std = init_std
        self.axes = len(self.pretrained_window or (1, 1))
        self.cpb_mlp = nn.Sequential(nn.Linear(self.axes, 512), nn.ReLU(), nn.Linear(512, num_heads, bias=False))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weights from a normal distribution of standard deviation `init_std`, cut at +-2."""
        first, _, last = self.cpb_mlp
        nn.init.trunc_normal_(first.weight, std=self.init_std)
        nn.init.zeros_(first.bias)
        nn.init.trunc_normal_(last.weight, std=self.init_std)

    def encode(self, queries: Positions, keys: Positions) -> Tensor:
        window = self.pretrained_window or queries.feat_shape

        def network(delta: Tensor) -> Tensor:
            return 16 * run_mlp(self.cpb_mlp, log_coords(delta, window)).sigmoid()

        return bias_of_offsets(network, queries, keys)
