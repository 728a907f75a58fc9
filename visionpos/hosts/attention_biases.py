"""timm's `attention_biases`, LeViT's table without signs, as an encoding, for the families whose attention has one."""

from __future__ import annotations

from abc import abstractmethod

import torch
from timm.layers import to_2tuple
from torch import Tensor, nn

from ..bias.relative_table import RelativeTable
from ..encoding import AttentionTensors, PositionEncoding
from .attention import NO_DROPOUT, attend_logits
from .grid_hosts import GridHost
from .grids import encode_grid
from .parameters import adopt_parameters, bind_first

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


class BiasesHost(GridHost):
    """A family whose attention has such a table, and the grid of its tokens as `resolution`."""

    def adopt_native_positions(self, model: nn.Module) -> None:
        for block in self.blocks(model):
            attn = block.attn
            options = {"num_heads": attn.num_heads, "feat_shape": to_2tuple(attn.resolution), "preset": "levit"}
            attn.encodings.append(adopt_parameters(attn, RelativeTable, HeadsFirst(), NAMES, **options))
            if "attention_bias_idxs" in attn._non_persistent_buffers_set:
                attn.attention_bias_idxs = None

    def bind_native(self, model: nn.Module) -> None:
        for attn in (block.attn for block in self.blocks(model)):
            tables = (each for each in attn.encodings if getattr(each, "preset", None) == "levit")
            bind_first(tables, RelativeTable, attn, HeadsFirst(), NAMES)

    def seen_shapes(self, model: nn.Module) -> list[tuple[int, int]]:
        return [to_2tuple(block.attn.resolution) for block in self.blocks(model)]

    @abstractmethod
    def channels(self, block: nn.Module) -> dict[str, int]:
        """Return the numbers of channels of a block, but for those of a query, by their names in `LayerFacts`."""

    def facts_of(self, block: nn.Module) -> dict[str, int]:
        return {**self.channels(block), "num_heads": block.attn.num_heads, "head_dim": block.attn.key_dim}


def as_tokens(x: Tensor) -> Tensor:
    """Return tokens (B, N, C) of a map (B, C, H, W), or as they are."""
    return x.flatten(2).mT if x.ndim == 4 else x


def heads_of(layer: nn.Module, x: Tensor) -> Tensor:
    """Return the channels of each head, (B, heads, N, C / heads), of tokens (B, N, C) or a map (B, C, H, W)."""
    return as_tokens(x).unflatten(-1, (layer.num_heads, -1)).transpose(1, 2)


def attend_by_steps(layer: nn.Module, tensors: AttentionTensors) -> Tensor:
    """Return softmax(q k^T scale + bias) v, (B, heads, queries, val_dim), by timm's steps, and so with its bits."""
    return attend_logits(tensors, (tensors.q @ tensors.k.mT) * layer.scale, NO_DROPOUT)


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
