"""timm's `attention_biases`, LeViT's table without signs, as an encoding, for the families whose attention has one."""

from __future__ import annotations

from torch import Tensor, nn

from ..bias.relative_table import RelativeTable
from ..encoding import PositionEncoding
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


def adopt_biases(attn: nn.Module, cls: type, grid: tuple[int, int]) -> None:
    """Swap the class of an attention layer whose tokens are a grid (h, w), and make an encoding of its table."""
    options = {"num_heads": attn.num_heads, "feat_shape": tuple(grid), "preset": "levit"}
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
