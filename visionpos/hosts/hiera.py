"""timm's Hiera as host: tokens in unrolled order, attention in mask units, queries that are pooled.

Coordinates travel with the tokens: `unroll` orders both, a mask drops both, and where a block pools the queries of
`q_stride` neighbours, the query stands in their middle. In mask units encodings see the coordinates of the unit.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from timm.models.hiera import Hiera, HieraBlock, MaskUnitAttention
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..encoding import AttentionTensors, LayerFacts, PositionEncoding
from ..input.abs_win import AbsWin
from ..input.learned import Learned
from ..places import ContextualBias
from ..positions import Positions
from .attention import AttentionContext, PositionState, attend, encoded, fit_bias
from .host import (
    FixedCoordinates,
    ForgetsPositions,
    Host,
    encoding_parameters,
    first,
    layer_lists,
    register_host,
)
from .parameters import adopt_parameters, bind_parameters, replace_encodings

NO_DROPOUT = nn.Dropout(0.0)  # Hiera's attention has none


def pool_max(x: Tensor, q_stride: int) -> Tensor:
    """(..., q_stride * K, C) in unrolled order -> (..., K, C), as Hiera pools."""
    return x.unflatten(-2, (q_stride, -1)).amax(-3)


def pool_middle(positions: Positions, q_stride: int) -> Positions:
    """Where pooled queries stand, on the grid of their keys."""
    return replace(positions, coords=positions.coords.unflatten(-2, (q_stride, -1)).mean(-3), is_grid=False)


def pool_grid(positions: Positions, stride: tuple[int, int]) -> Positions:
    """Where pooled tokens stand, on a grid of their own."""
    coords = positions.coords.unflatten(-2, (stride[0] * stride[1], -1))[..., 0, :, :]  # of the upper left one
    coords = torch.stack([axis / s for axis, s in zip(coords.unbind(-1), stride, strict=True)], dim=-1)
    shape = tuple(n // s for n, s in zip(positions.feat_shape, stride, strict=True))
    return replace(positions, coords=coords, feat_shape=shape)


def pair_up(tensors: AttentionTensors, encoding: PositionEncoding, queries: Positions, keys: Positions) -> None:
    """Apply an encoding to pooled queries and keys, which stand at different places."""
    if encoding.place == "rotary":
        tensors.q, tensors.k = encoding(tensors.q, tensors.q, queries)[0], encoding(tensors.k, tensors.k, keys)[1]
    elif isinstance(encoding, ContextualBias):
        tensors.add_bias(encoding.bias(queries, keys, getattr(tensors, encoding.content_source)))
    else:
        tensors.add_bias(encoding.bias(queries, keys))


class EncodedMaskUnitAttention(MaskUnitAttention):
    """Attention in mask units, or of all tokens, with encodings; x (B, T, C) in unrolled order."""

    positions: Positions | None = None  # of x, while the block runs

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, C) -> (B, T / q_stride, dim_out), as timm's."""
        if not len(self.encodings):
            return super().forward(x)
        units = x.shape[1] // (self.q_stride * self.window_size) if self.use_mask_unit_attn else 1
        x = x.unflatten(1, (-1, units)).transpose(1, 2).flatten(0, 1)  # (B * units, T / units, C)
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        if self.q_stride > 1:
            tensors = self._pooled(x, q, k, v)
        else:
            tensors = encoded(x, q, k, v, [(encoding, encoding.prepare(self.positions)) for encoding in self.encodings])
        out = attend(tensors, self.scale, NO_DROPOUT, self.fused_attn).transpose(1, 2).flatten(2)
        return self.proj(out.unflatten(0, (-1, units)).transpose(1, 2).flatten(1, 2))

    def _pooled(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> AttentionTensors:
        tensors = AttentionTensors(pool_max(x, self.q_stride), pool_max(q, self.q_stride), k, v)
        queries = pool_middle(self.positions, self.q_stride)
        for encoding in self.encodings:
            pair_up(tensors, encoding, queries, self.positions)
        return fit_bias(tensors)


class EncodedHieraBlock(HieraBlock):
    """A block that tells its attention where the tokens are, the same in a checkpointed recomputation."""

    grad_checkpointing = False

    def forward(self, x: Tensor) -> Tensor:
        """x (B, T, C) in unrolled order, as timm's."""
        positions = self.position_state.context(None).positions
        if self.grad_checkpointing and torch.is_grad_enabled():
            return checkpoint(self._forward, x, positions, use_reentrant=False)
        return self._forward(x, positions)

    def _forward(self, x: Tensor, positions: Positions) -> Tensor:
        """`positions` are those of the first stage."""
        for _ in range(self.pooled_before):
            positions = pool_grid(positions, self.stride)
        self.attn.positions = self.unit(positions) if self.attn.use_mask_unit_attn else positions
        x = super().forward(x)
        self.attn.positions = None
        if self.attn.q_stride > 1:
            positions = pool_grid(positions, self.stride)
        for encoding in self.mixers:
            x = encoding(x, positions)
        return x

    def unit(self, positions: Positions) -> Positions:
        """The tokens of one mask unit, in its own coordinates."""
        coords = positions.coords if positions.coords.ndim == 2 else positions.coords[0]
        first = coords.unflatten(0, (self.attn.q_stride * self.attn.window_size, -1))[:, 0]
        axes = zip(first.unbind(-1), self.feat_shape, strict=True)
        return Positions(torch.stack([axis % size for axis, size in axes], dim=-1), self.feat_shape)


class EnterPositions:
    """Forward pre-hook of patch_embed: works out where the tokens are that the blocks will get."""

    def __init__(self, unroll: nn.Module, mu_size: int, state: PositionState):
        self.unroll, self.mu_size, self.state = unroll, mu_size, state

    def __call__(self, patch_embed: nn.Module, args: tuple, kwargs: dict) -> None:
        positions = Positions.grid(tuple(self.unroll.size), device=args[0].device)
        coords = self.unroll(positions.coords.unsqueeze(0)).squeeze(0)
        if kwargs["mask"] is not None:  # (B, 1, units, units), true where tokens stay; timm orders units last
            keep = kwargs["mask"].bool().flatten(1).repeat(1, self.mu_size)
            coords = coords.expand(len(keep), -1, -1)[keep].unflatten(0, (len(keep), -1))
        self.state.enter(AttentionContext(replace(positions, coords=coords, is_grid=False)))


class EncodedHiera(ForgetsPositions, FixedCoordinates, Hiera):
    """A converted Hiera."""

    def _pos_embed(self, x: Tensor) -> Tensor:
        positions = Positions.grid(tuple(self.tokens_spatial_shape), device=x.device)
        for encoding in self.pos_embed_input:
            x = encoding(x, positions)
        return x

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """As timm's, block by block."""
        for block in self.blocks:  # timm's own loop would lose the positions
            block.grad_checkpointing = enable

    def no_weight_decay(self) -> set[str]:
        """Every parameter of an encoding; timm has no other names, and none without `pos_embed`."""
        return encoding_parameters(self)


def pooled_outputs(encoding: PositionEncoding) -> bool:
    """Whether the encoding adds to the output of each token, which pooled queries have no place for."""
    return getattr(encoding, "site", None) == "values" or getattr(encoding, "value_table", None) is not None


class HieraHost(Host):
    """Hiera on pictures."""

    name = "Hiera"

    def accepts(self, model: nn.Module) -> bool:
        return type(model) is Hiera or isinstance(model, EncodedHiera)

    def convert(self, model: Hiera) -> None:
        if isinstance(model, EncodedHiera):
            return
        if len(model.tokens_spatial_shape) != 2:
            raise ValueError(
                f"only Hiera on pictures takes encodings; this one has tokens {model.tokens_spatial_shape}"
            )
        facts, state = self.input_facts(model), PositionState()
        model.__class__, model.position_state = EncodedHiera, state
        model.pos_embed_input = nn.ModuleList()
        if model.pos_embed_win is not None:
            options = {"window_size": facts.window_size, "global_size": tuple(model.pos_embed.shape[-2:])}
            model.pos_embed_input.append(adopt_parameters(model, AbsWin, dim=facts.dim, **options))
        elif model.pos_embed is not None:
            table = adopt_parameters(model, Learned, dim=facts.dim, feat_shape=facts.feat_shape)
            model.pos_embed_input.append(table)
        hook = EnterPositions(model.unroll, model.mu_size, state)
        model.patch_embed.register_forward_pre_hook(hook, with_kwargs=True)
        pooled = 0
        for block in model.blocks:
            size = model.mask_unit_size if block.attn.use_mask_unit_attn else model.tokens_spatial_shape
            block.feat_shape = tuple(n // s**pooled for n, s in zip(size, model.q_stride, strict=True))
            block.stride, block.pooled_before = tuple(model.q_stride), pooled
            pooled += block.attn.q_stride > 1
            block.__class__, block.attn.__class__ = EncodedHieraBlock, EncodedMaskUnitAttention
            block.position_state, block.grad_checkpointing = state, model.grad_checkpointing
            block.attn.encodings, block.mixers = nn.ModuleList(), nn.ModuleList()
        model.grad_checkpointing = False

    def input_facts(self, model: Hiera) -> LayerFacts:
        return LayerFacts(
            dim=model.patch_embed.proj.out_channels,
            feat_shape=tuple(model.tokens_spatial_shape),
            window_size=tuple(model.mask_unit_size),
        )

    def layer_facts(self, model: Hiera) -> list[LayerFacts]:
        return [
            LayerFacts(
                dim=block.dim_out,
                dim_in=block.dim,
                feat_shape=block.feat_shape,
                num_heads=block.attn.heads,
                head_dim=block.attn.head_dim,
                layer=index,
                depth=len(model.blocks),
            )
            for index, block in enumerate(model.blocks)
        ]

    def mixing_layers(self, model: Hiera) -> list[int]:
        return [0, *(end + 1 for end in model.stage_ends[:-1])]

    def encodings(self, model: Hiera):
        return list(model.pos_embed_input), [[*block.attn.encodings, *block.mixers] for block in model.blocks]

    def install(self, model: Hiera, inputs, layers) -> None:
        for index, (block, encodings) in enumerate(zip(model.blocks, layers, strict=True)):
            for encoding in filter(pooled_outputs, encodings if block.attn.q_stride > 1 else ()):
                raise ValueError(
                    f"{encoding.name} adds to the output of every token, but blocks.{index} of Hiera pools its queries "
                    "and has fewer outputs; leave out lepe and values=True"
                )
        lists = (place for block, new in zip(model.blocks, layers, strict=True) for place in layer_lists(block, new))
        replace_encodings((model.pos_embed_input, inputs), *lists)
        native = first(model.pos_embed_input, (AbsWin, Learned))
        if native is not None:
            bind_parameters(native, model)


HOST = register_host(HieraHost())
