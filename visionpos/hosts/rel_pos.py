"""timm's `RelPosBias`, `RelPosBiasTf` and `RelPosMlp` as encodings, for the families whose attention has one."""

from __future__ import annotations

from timm.layers import RelPosBiasTf, RelPosMlp
from torch import Tensor, nn

from ..bias.log_cpb import log_coords
from ..bias.offsets import bias_of_offsets
from ..bias.relative_table import RelativeTable
from ..places import BiasEncoding
from ..positions import Positions
from ..registry import register_native
from .host import first
from .parameters import ParameterHolder, adopt_parameters, bind_parameters


@register_native
class NetworkOfHost(BiasEncoding):
    """timm's RelPosMlp, kept as the host's own, for no encoding here is the same function.

    b = MLP(g) with g = sign(delta) log(1 + |delta|) ("cr", timm's default), or b = 16 sigmoid(MLP(g)) with the g of
    `log_cpb` ("swin"), which has 128 hidden channels in place of Swin V2's 512. Both drop out hidden channels while
    training. delta = query minus key, in grid steps. Prefix tokens have no bias.

    Args:
        host: the layer whose network, under the name `mlp`, is used.

    Attributes:
        mlp: timm's Mlp, 2 -> hidden -> heads.
    """

    name = "RelPosMlp"
    learnable = True
    translation_invariant = True
    extrapolation = "formula"

    def __init__(self, host: RelPosMlp):
        super().__init__(host.num_heads)
        self.mode = host.mode
        self.pretrained_window = tuple(host.pretrained_window_size) if host.pretrained_window_size[0] > 0 else None
        self.mlp = host.mlp

    def encode(self, queries: Positions, keys: Positions) -> Tensor:
        window = self.pretrained_window or queries.feat_shape

        def network(delta: Tensor) -> Tensor:
            g = log_coords(delta, window) if self.mode == "swin" else delta.sign() * (1 + delta.abs()).log()
            return self.mlp(g.to(self.mlp.fc1.weight.dtype))

        bias = bias_of_offsets(network, queries, keys)
        return 16 * bias.sigmoid() if self.mode == "swin" else bias  # after the lookup, for timm's last bit


class HeadsFirst:
    """The layout of TensorFlow's MaxViT, (heads, 2h - 1, 2w - 1), of a table that is ((2h - 1)(2w - 1), heads) here."""

    def read(self, parameter: Tensor) -> Tensor:
        """Return the table, one row for each offset."""
        return parameter.flatten(1).t()

    def write(self, value: Tensor, encoding: RelativeTable) -> Tensor:
        """Return the layout of TensorFlow's MaxViT."""
        return value.t().unflatten(1, encoding.dialect.shape(encoding.feat_shape)).contiguous()


def adopt_rel_pos(owner: nn.Module, name: str, encodings: nn.ModuleList) -> None:
    """Put timm's module of that name, if there is one, into a list of encodings, which is otherwise empty."""
    rel_pos = getattr(owner, name)
    if isinstance(rel_pos, RelPosMlp):
        encodings.append(NetworkOfHost(rel_pos))
        bind_rel_pos(owner, name, encodings, tuple(rel_pos.window_size))
    elif rel_pos is not None:
        grid, table = tuple(rel_pos.window_size), rel_pos.relative_position_bias_table
        setattr(owner, name, ParameterHolder(grid, relative_position_bias_table=table))
        options = {"feat_shape": grid, "init_std": 0.02, "interpolation": "geometric"}
        if isinstance(rel_pos, RelPosBiasTf):
            options |= {"num_heads": rel_pos.num_heads, "preset": "maxvit", "view": HeadsFirst()}
        else:  # for a class token, BEiT's three rows
            options |= {"num_heads": table.shape[1], "preset": "beit" if rel_pos.prefix_tokens else "swin"}
        encodings.append(adopt_parameters(getattr(owner, name), RelativeTable, **options))


def bind_rel_pos(owner: nn.Module, name: str, encodings: nn.ModuleList, grid: tuple[int, int]) -> None:
    """Keep the parameters of the first table, or network, of a list where timm's module of that name has them.

    Args:
        owner: the model, or an attention layer of it.
        name: "rel_pos", or "shared_rel_pos" of the model.
        encodings: of the layer, or of all layers.
        grid: (h, w) of the tokens that see each other.
    """
    own = first(encodings, (RelativeTable, NetworkOfHost))
    if own is None:
        setattr(owner, name, None)
    elif own.owner is own:
        setattr(owner, name, ParameterHolder(grid))
        heads_first = isinstance(own, RelativeTable) and own.preset == "maxvit"
        bind_parameters(own, getattr(owner, name), HeadsFirst() if heads_first else None)


class RelPosInBlocks:
    """Mixin for the host of a family whose attention layers have such a module each, under the name `rel_pos`."""

    def adopt_native_positions(self, model: nn.Module) -> None:
        for block in self.blocks(model):
            adopt_rel_pos(block.attn, "rel_pos", block.attn.encodings)

    def bind_native(self, model: nn.Module) -> None:
        for block, facts in zip(self.blocks(model), self.layer_facts(model), strict=True):
            bind_rel_pos(block.attn, "rel_pos", block.attn.encodings, facts.feat_shape)
