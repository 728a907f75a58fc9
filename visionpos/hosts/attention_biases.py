"""timm's `attention_biases`, LeViT's table without signs, as an encoding, for the families whose attention has one."""

from __future__ import annotations

from abc import abstractmethod

import torch
from timm.layers import to_2tuple
from torch import Tensor, nn

from ..bias.relative_table import RelativeTable
from ..encoding import AttentionTensors, LayerFacts, PositionEncoding
from .grids import GridHost, encode_grid
from .parameters import adopt_parameters, bind_parameters

NAMES = {"relative_position_bias_table": "attention_biases"}


class HeadsFirst:
    """timm's layout of the table, (heads, h w), which is (h w, heads) here."""

    def read(self, parameter: Tensor) -> Tensor:
        """Return the table, one row for each offset."""
        return parameter.t()

    def write(self, value: Tensor, encoding: PositionEncoding) -> Tensor:
        """Return timm's layout."""
        return value.t().contiguous()


class EncodedBiases:
    """Mixin for timm's attention with such a table: `encodings` has it, and what timm caches of it is gone."""

    def reset_parameters(self) -> None:
        """Do nothing: the encodings reset their own parameters."""

    def _init_buffers(self) -> None:
        """Do nothing: the encodings compute their own buffers."""


def adopt_biases(attn: nn.Module, cls: type) -> None:
    """Swap the class of an attention layer, and make an encoding of its table."""
    options = {"num_heads": attn.num_heads, "feat_shape": to_2tuple(attn.resolution), "preset": "levit"}
    attn.encodings = nn.ModuleList([adopt_parameters(attn, RelativeTable, HeadsFirst(), NAMES, **options)])
    if "attention_bias_idxs" in attn._non_persistent_buffers_set:
        attn.attention_bias_idxs = None
    attn.__class__ = cls


def bind_biases(attn: nn.Module) -> None:
    """Keep the first table without signs of an attention layer as its `attention_biases`."""
    tables = (each for each in attn.encodings if isinstance(each, RelativeTable) and each.preset == "levit")
    own = next(tables, None)
    if own is None or own.owner is own:
        attn.attention_biases = None
    if own is not None:
        bind_parameters(own, attn, HeadsFirst(), NAMES)


class BiasesHost(GridHost):
    """A family whose attention has such a table, and the grid of its tokens as `resolution`."""

    def layer_facts(self, model: nn.Module) -> list[LayerFacts]:
        blocks = self.blocks(model)
        return [
            LayerFacts(
                **self.widths(block),
                feat_shape=to_2tuple(block.attn.resolution),
                num_heads=block.attn.num_heads,
                head_dim=block.attn.key_dim,
                layer=layer,
                depth=len(blocks),
            )
            for layer, block in enumerate(blocks)
        ]

    @abstractmethod
    def widths(self, block: nn.Module) -> dict[str, int]:
        """Return the numbers of channels of a block, by their names in `LayerFacts`."""

    def bind_native(self, model: nn.Module) -> None:
        for block in self.blocks(model):
            bind_biases(block.attn)


def encode_every_second(
    layer: nn.Module, x: Tensor, grid: tuple[int, int], q: Tensor, k: Tensor, v: Tensor
) -> AttentionTensors:
    """Return the tensors of an attention layer whose queries are every second token of each axis of a grid.

    Encodings act as if every token had a query, zeros where there is none; these are left out again.

    Args:
        layer: has `encodings`.
        x: (B, N, C), the layer's input.
        grid: (H, W), N = H W.
        q: queries, (B, heads, ceil(H / 2) ceil(W / 2), head_dim), not scaled.
        k: keys, (B, heads, N, head_dim).
        v: values, (B, heads, N, any number of channels).
    """
    index = torch.arange(k.shape[2], device=x.device).view(grid)[::2, ::2].flatten()  # (queries,)
    tensors = encode_grid(layer, x, grid, torch.zeros_like(k).index_copy(2, index, q), k, v)
    for name in ("q", "bias", "output"):
        tensor = getattr(tensors, name)
        setattr(tensors, name, None if tensor is None else tensor.index_select(-2, index))
    return tensors
