"""timm's Gemma4Vit as host: the vision encoder of Gemma 4, with a table for each axis and a rope."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import ClassVar

import torch
from timm.layers import to_2tuple
from timm.models.gemma4_vit import (
    Gemma4Attention,
    Gemma4Block,
    Gemma4PatchEmbed,
    Gemma4VitClassifier,
    Gemma4VitEncoder,
)
from torch import Tensor, nn

from ..encoding import OneNode
from ..input.factorized import Factorized
from ..positions import Positions
from ..rotary.rope_axial import RopeAxial
from .attention import AttentionContext, attend, caller_masks, encoded, prepare_encodings
from .encoders import ClassifierMixin, EncoderHost, EncoderMixin
from .grid_hosts import trained_size
from .host import first, register_host
from .isotropic import mix
from .masks import add_masks
from .parameters import PartialView, adopt_parameters, bind_parameters
from .projections import into_heads
from .ragged import RaggedMixin


class EncodedGemma4Attention(OneNode, Gemma4Attention):
    """Self-attention of Gemma 4 with encodings, on tokens x (B, N, C)."""

    def forward(
        self, x: Tensor, rope_cos: AttentionContext | None, rope_sin: None, attn_mask: Tensor | None = None
    ) -> Tensor:
        """Return tokens (B, N, C).

        `rope_cos`, timm's way from the model to its attention layers, carries the context here.
        """
        prepared = prepare_encodings(self, rope_cos)
        mask = caller_masks(rope_cos, False)[0] if attn_mask is None else attn_mask
        q, k, v = into_heads(self.head_dim, self.q_proj(x), self.k_proj(x), self.v_proj(x))
        k, v = (part.repeat_interleave(self.num_kv_groups, dim=1) for part in (self.k_norm(k), self.v_norm(v)))
        tensors = add_masks(encoded(x, self.q_norm(q), k, v, prepared), mask, False)
        out = attend(tensors, 1.0, self.attn_drop, self.fused_attn)  # (B, heads, N, head_dim)
        return self.proj_drop(self.o_proj(out.transpose(1, 2).flatten(2)))


class EncodedGemma4Block(Gemma4Block):
    """A block after which conditional encodings may mix the tokens."""

    def forward(
        self, x: Tensor, rope_cos: AttentionContext | None, rope_sin: None, attn_mask: Tensor | None = None
    ) -> Tensor:
        """Return the tokens (B, N, C) after the block."""
        return mix(super().forward(x, rope_cos, rope_sin, attn_mask), self.mixers, rope_cos)


NAMES = {"pos_embed_y": "table_y", "pos_embed_x": "table_x"}  # an encoding's tables, as the stem calls them


class Part(PartialView):
    """A view of one of timm's two tables, which are one parameter that the stem cuts in two."""

    def read(self, parameter: Tensor) -> Tensor:
        """Return the table, as it was cut."""
        return parameter


class EncodedGemma4PatchEmbed(Gemma4PatchEmbed):
    """The stem without positions; of pictures it returns patches (B, H, W, C), so that their grid is known."""

    @property
    def table_y(self) -> Tensor | None:
        """Return the table of rows (1, n, C), the second of timm's."""
        return None if self.position_embedding_table is None else self.position_embedding_table[1:]

    @property
    def table_x(self) -> Tensor | None:
        """Return the table of columns (1, n, C), the first of timm's."""
        return None if self.position_embedding_table is None else self.position_embedding_table[:1]

    def set_input_size(self, img_size: tuple[int, int] | int, patch_size: None = None) -> None:
        """Note the grid of the model's own pictures; any other is taken as well."""
        sides = zip(to_2tuple(img_size), self.patch_size, strict=True)
        self.grid_size = tuple(side // patch for side, patch in sides)

    def reset_parameters(self) -> None:
        """Initialize as timm does, with or without tables."""
        if self.position_embedding_table is not None:
            super().reset_parameters()

    def _position_embeddings(self, position_ids: Tensor, padding_positions: Tensor | None) -> float:
        return 0.0

    def forward(
        self, x: Tensor | dict[str, Tensor], patch_coord: Tensor | None = None, patch_valid: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return the tokens, their places (x, y) and their padding as timm does, without input encodings."""
        tokens, places, padding = super().forward(x, patch_coord, patch_valid)
        if not isinstance(x, dict) and patch_coord is None and x.ndim == 4:
            tokens = tokens.unflatten(1, tuple(n // p for n, p in zip(x.shape[2:], self.patch_size, strict=True)))
        return tokens, places, padding


class EncodedGemma4VitEncoder(EncoderMixin, RaggedMixin, Gemma4VitEncoder):
    """An encoder whose positions are encodings of this package."""

    holders = ("patch_embed",)

    def embed(self, x: Tensor | tuple[Tensor | None, ...]) -> tuple[Tensor, Positions]:
        return super().embed(x[0] if isinstance(x, tuple) else x)  # of whole pictures all that counts

    def forward_norm(self, x: Tensor) -> Tensor:
        return x

    def forward_block(self, block: Callable[..., Tensor], x: Tensor, context: AttentionContext) -> Tensor:
        return super().forward_block(partial(block, rope_sin=None), x, context)

    def _encode(
        self,
        x: Tensor,
        position_ids: Tensor,
        padding_positions: Tensor | None,
        block_callback: Callable[[int, Tensor], None] | None = None,
        max_block_index: int | None = None,
    ) -> Tensor:
        """Return the tokens (B, N, C) after the blocks, from those of the stem: (B, H, W, C) of whole pictures."""
        if x.ndim == 4:
            x, context = self._pos_embed(x)
        else:
            coords = position_ids.flip(-1)
            valid = torch.ones_like(coords[..., 0]).bool() if padding_positions is None else ~padding_positions
            x, coords, sizes = self.embed_ragged(x, coords, valid)
            context = self.ragged_context(coords, valid, sizes)
        for index, block in enumerate(self.blocks if max_block_index is None else self.blocks[: max_block_index + 1]):
            x = self.forward_block(block, x, context)
            if block_callback is not None:
                block_callback(index, x)
        return x


class EncodedGemma4VitClassifier(ClassifierMixin, Gemma4VitClassifier):
    """A classifier around such an encoder."""


class Gemma4VitHost(EncoderHost):
    """The family of Gemma4Vit. Its rope differs from timm's by rounding alone, about 1e-6.

    timm has the tables of both axes in one parameter, `position_embedding_table`, and those of a `factorized` are
    there as well, if both are of one length.
    """

    name = "Gemma4Vit (Gemma 4)"
    models: ClassVar = {Gemma4VitEncoder: EncodedGemma4VitEncoder}
    classifiers: ClassVar = {Gemma4VitClassifier: EncodedGemma4VitClassifier}
    blocks: ClassVar = {Gemma4Block: EncodedGemma4Block}
    attentions: ClassVar = {Gemma4Attention: EncodedGemma4Attention}

    def convert(self, model: Gemma4VitEncoder | Gemma4VitClassifier) -> None:
        encoder = self.encoder(model)
        if type(encoder) is Gemma4VitEncoder:
            sides = zip(trained_size(model), encoder.patch_size, strict=True)
            encoder.patch_embed.grid_size = tuple(side // patch for side, patch in sides)
        super().convert(model)

    def heads(self, attn: nn.Module) -> tuple[int, int]:
        return attn.num_heads, attn.head_dim

    def adopt_native_positions(self, model: Gemma4VitEncoder) -> None:
        stem, rope = model.patch_embed, model.rotary_emb
        stem.__class__, model.rotary_emb = EncodedGemma4PatchEmbed, None
        options = {"dim": model.embed_dim, "feat_shape": (stem.position_embedding_size,) * 2, "coordinates": "index"}
        model.pos_embed_input.append(adopt_parameters(stem, Factorized, Part(), NAMES, **options))
        facts = self.layer_facts(model)[0]
        shape = {"num_heads": facts.num_heads, "head_dim": facts.head_dim}
        model.pos_embed_shared.append(RopeAxial(**shape, temperature=rope.rope_theta, preset="gemma4"))

    def bind_native(self, model: Gemma4VitEncoder) -> None:
        super().bind_native(model)
        table, stem = first(model.pos_embed_input, Factorized), model.patch_embed
        stem.position_embedding_table = None
        if table is not None and len(set(table.feat_shape)) == 1:  # of one length, as timm's
            both = torch.cat([table.pos_embed_x, table.pos_embed_y]).detach()  # (2, n, C)
            stem.position_embedding_table = nn.Parameter(both, table.pos_embed_y.requires_grad)
            stem.position_embedding_size = both.shape[1]
            bind_parameters(table, stem, Part(), NAMES)


HOST = register_host(Gemma4VitHost())
