"""timm's ViT with relative position biases as host: tables, or small networks, in every layer or one for all."""

from __future__ import annotations

from typing import ClassVar

from timm.layers import RelPosBias, RelPosMlp, register_notrace_module
from timm.models.vision_transformer_relpos import (
    RelPosAttention,
    RelPosBlock,
    ResPostRelPosBlock,
    VisionTransformerRelPos,
)
from torch import Tensor, nn

from ..bias.log_cpb import log_coords
from ..bias.offsets import bias_of_offsets
from ..bias.relative_table import RelativeTable
from ..places import BiasEncoding
from ..positions import Positions
from .attention import AttentionContext, math_is_faster, prepare_encodings, self_attention, split_heads
from .host import first, register_host
from .isotropic import IsotropicForward, IsotropicHost, mix
from .parameters import ParameterHolder, adopt_parameters, bind_parameters


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


@register_notrace_module
class EncodedRelPosAttention(RelPosAttention):
    """Self-attention with encodings, on tokens x (B, prefix + N, C)."""

    def forward(self, x: Tensor, shared_rel_pos: AttentionContext | None = None) -> Tensor:
        """Return tokens (B, prefix + N, C).

        `shared_rel_pos`, timm's way from the model to its attention layers, carries the context here.
        """
        prepared = prepare_encodings(self, shared_rel_pos)
        if not prepared and not math_is_faster(x):
            return super().forward(x)
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, -1))
        return self_attention(self, x, *split_heads(self, qkv, prepared))


class EncodedRelPosMixin:
    """A block after which conditional encodings may mix the tokens."""

    def forward(self, x: Tensor, shared_rel_pos: AttentionContext | None = None) -> Tensor:
        """Return the tokens (B, prefix + N, C) after the block."""
        return mix(super().forward(x, shared_rel_pos), self.mixers, shared_rel_pos)


class EncodedRelPosBlock(EncodedRelPosMixin, RelPosBlock):
    """A block of a converted model."""


class EncodedResPostRelPosBlock(EncodedRelPosMixin, ResPostRelPosBlock):
    """A block of a converted model that normalises after its branches."""


class EncodedVisionTransformerRelPos(IsotropicForward, VisionTransformerRelPos):
    """A VisionTransformerRelPos whose positions are encodings of this package."""

    holders = ("shared_rel_pos",)

    def group_matcher(self, coarse: bool = False) -> dict:
        """Return timm's groups of layers, with the encodings of the whole model in the stem."""
        matcher = super().group_matcher(coarse)
        return {**matcher, "stem": matcher["stem"] + "|pos_embed|shared_rel_pos"}


class RelPosHost(IsotropicHost):
    """The family of VisionTransformerRelPos: `blocks.0.attn.rel_pos` or `shared_rel_pos` keep the names in them."""

    name = "VisionTransformerRelPos"
    models: ClassVar = {VisionTransformerRelPos: EncodedVisionTransformerRelPos}
    blocks: ClassVar = {RelPosBlock: EncodedRelPosBlock, ResPostRelPosBlock: EncodedResPostRelPosBlock}
    attentions: ClassVar = {RelPosAttention: EncodedRelPosAttention}

    def slots(self, model: VisionTransformerRelPos) -> list[tuple[nn.ModuleList, nn.Module, str]]:
        """Return each list of encodings inside attention, and the owner and the name of timm's module for it."""
        layers = [(block.attn.encodings, block.attn, "rel_pos") for block in model.blocks]
        return [(model.pos_embed_shared, model, "shared_rel_pos"), *layers]

    def adopt_native_positions(self, model: VisionTransformerRelPos) -> None:
        for encodings, owner, name in self.slots(model):
            rel_pos = getattr(owner, name)
            if isinstance(rel_pos, RelPosMlp):
                encodings.append(NetworkOfHost(rel_pos))
            elif isinstance(rel_pos, RelPosBias):
                grid, table = tuple(rel_pos.window_size), rel_pos.relative_position_bias_table
                setattr(owner, name, ParameterHolder(grid, relative_position_bias_table=table))
                options = {
                    "preset": "beit" if rel_pos.prefix_tokens else "swin"
                }  # for a class token, BEiT's three rows
                options |= {"init_std": 0.02, "interpolation": "geometric", "num_heads": table.shape[1]}
                encodings.append(adopt_parameters(getattr(owner, name), RelativeTable, feat_shape=grid, **options))
        self.bind_native(model)

    def bind_native(self, model: VisionTransformerRelPos) -> None:
        super().bind_native(model)
        for encodings, owner, name in self.slots(model):
            own = first(encodings, (RelativeTable, NetworkOfHost))
            if own is None or own.owner is own:
                setattr(owner, name, None if own is None else ParameterHolder(model.patch_embed.grid_size))
            if own is not None:
                bind_parameters(own, getattr(owner, name))


HOST = register_host(RelPosHost())
