"""Encodings on a grid of tokens or windows of it, in the parts of Swin, SAM, MaxViT and their kin.

Where tokens are follows from the shape of what a layer gets, so that nothing has to be handed on.
"""

from __future__ import annotations

import torch.fx
from torch import Tensor, nn

from ..encoding import AttentionTensors, PositionEncoding
from ..positions import Positions
from .attention import encoded


@torch.fx.wrap  # one call in its graphs: the size of a picture is known when they run
def _add_on_grid(x: Tensor, encodings: nn.ModuleList, tables: list[Tensor]) -> Tensor:
    for encoding in encodings:
        positions = Positions.grid(tuple(x.shape[1:3]), device=x.device)
        x = encoding(x.flatten(1, 2), positions).view(x.shape)
    return x


def add_positions(x: Tensor, encodings: nn.ModuleList) -> Tensor:
    """Return x (B, H, W, C) after input or conditional encodings; x itself where there are none."""
    if not len(encodings):
        return x
    tables = []  # what encodings read from elsewhere, for graphs to have it among their own parameters
    for encoding in encodings if isinstance(x, torch.fx.Proxy) else ():
        names = () if encoding.owner is encoding else PositionEncoding.no_weight_decay(encoding)
        tables += [parameter for name, parameter in encoding.owner.named_parameters() if name in names]
    return _add_on_grid(x, encodings, tables)  # torch.fx wraps no function that was imported


def add_to_tokens(x: Tensor, encodings: nn.ModuleList, grid: tuple[int, int]) -> Tensor:
    """Return x (B, H W, C), the tokens of a grid (H, W), after encodings; x itself where there are none."""
    return add_positions(x.unflatten(1, grid), encodings).flatten(1, 2) if len(encodings) else x


def add_to_map(x: Tensor, encodings: nn.ModuleList) -> Tensor:
    """Return x (B, C, H, W) after input or conditional encodings; x itself where there are none."""
    return add_positions(x.permute(0, 2, 3, 1), encodings).permute(0, 3, 1, 2) if len(encodings) else x


class AddPositions:
    """Mixin for a module of timm's that the tokens pass before the first block, where input encodings are added.

    The model has them, as `pos_embed_input`; `input_encodings` is the same list in a tuple, so that it is not
    registered as a child.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Return x (B, H, W, C) as timm does, with input encodings."""
        return super().forward(add_positions(x, self.input_encodings[0]))


class AddPositionsToMap:
    """Mixin for a module that ends in a map (B, C, H, W), to which input encodings are added."""

    def forward(self, x: Tensor) -> Tensor:
        """Return the map (B, C, H, W) as timm does, with input encodings."""
        return add_to_map(super().forward(x), self.input_encodings[0])


class AddPositionsToTokens:
    """Mixin for a module that returns tokens (B, H W, C) and their grid (H, W); input encodings are added to these."""

    def forward(self, x: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Return the tokens as timm does, with input encodings, and their grid."""
        x, grid = super().forward(x)
        return add_to_tokens(x, self.input_encodings[0], tuple(grid)), grid


class MixPositions:
    """Mixin for a block on x (B, H, W, C), after which conditional encodings may mix the tokens of the whole grid."""

    def forward(self, x: Tensor) -> Tensor:
        """Return the tokens (B, H, W, C) after the block."""
        return add_positions(super().forward(x), self.mixers)


class MixMap:
    """Mixin for a block on a map x (B, C, H, W), after which conditional encodings may mix it."""

    def forward(self, x: Tensor) -> Tensor:
        """Return the map (B, C, H, W) after the block."""
        return add_to_map(super().forward(x), self.mixers)


def encode_grid(
    layer: nn.Module,
    x: Tensor,
    grid: tuple[int, int],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    num_prefix_tokens: int = 0,
) -> AttentionTensors:
    """Return the tensors of an attention layer whose tokens are a whole grid, with its encodings applied.

    Args:
        layer: has `encodings`.
        x: (B, N, C), the layer's input.
        grid: (H, W), N = num_prefix_tokens + H W.
        q: queries, (B, heads, N, head_dim), not scaled.
        k: keys.
        v: values, of any number of channels.
        num_prefix_tokens: in front of the patches.
    """
    positions = Positions.grid(grid, num_prefix_tokens, device=x.device).promote(x.dtype)
    return encoded(x, q, k, v, [(encoding, encoding.prepare(positions)) for encoding in layer.encodings])
