"""timm's Qwen3Vit as host: the vision encoder of Qwen3-VL, with a table that any grid samples and a rope."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

from timm.layers import AttentionRope, trunc_normal_
from timm.models.eva import EvaBlock
from timm.models.qwen3_vit import Qwen3VitClassifier, Qwen3VitEncoder
from torch import Tensor

from ..encoding import LayerFacts
from ..input.learned import Learned
from ..input.learned2d import Learned2D
from .encoders import ClassifierMixin, EncoderHost, EncoderMixin
from .host import first, register_host
from .parameters import adopt_parameters, bind_parameters
from .rope_blocks import EncodedAttentionRope, EncodedEvaBlock


class Rows:
    """A view of a table (1, Gh, Gw, C) that its owner has row after row, (1, Gh Gw, C)."""

    def __init__(self, grid_size: tuple[int, int]):
        self.grid_size = grid_size

    def read(self, parameter: Tensor) -> Tensor:
        """Return (1, Gh, Gw, C) of (1, Gh Gw, C)."""
        return parameter.unflatten(1, self.grid_size)

    def write(self, value: Tensor, encoding: Learned2D) -> Tensor:
        """Return (1, Gh Gw, C) of (1, Gh, Gw, C)."""
        return value.flatten(1, 2)


class EncodedQwen3VitEncoder(EncoderMixin, Qwen3VitEncoder):
    """An encoder whose positions are encodings of this package."""

    def init_weights(self, needs_reset: bool = True) -> None:
        """Initialize as timm does, with or without a table."""
        if self.pos_embed is not None:
            trunc_normal_(self.pos_embed, std=0.02)
        self.apply(lambda module: self._init_weights(module, needs_reset))

    def forward_norm(self, x: Tensor) -> Tensor:
        return x


class EncodedQwen3VitClassifier(ClassifierMixin, Qwen3VitClassifier):
    """A classifier around such an encoder."""


class Qwen3VitHost(EncoderHost):
    """The family of Qwen3Vit. Table and rope differ from timm's by rounding alone, about 1e-6.

    A `learned2d` has its table in timm's `pos_embed`, and so has a `learned` where there is none.
    """

    name = "Qwen3Vit (Qwen3-VL, Qwen3.5)"
    models: ClassVar = {Qwen3VitEncoder: EncodedQwen3VitEncoder}
    classifiers: ClassVar = {Qwen3VitClassifier: EncodedQwen3VitClassifier}
    blocks: ClassVar = {EvaBlock: EncodedEvaBlock}
    attentions: ClassVar = {AttentionRope: EncodedAttentionRope}

    def adopt_table(self, model: Qwen3VitEncoder) -> Learned2D:
        facts = self.input_facts(model)
        options = {"dim": facts.dim, "grid_size": facts.grid_size, "preset": "qwen3_vl"}
        return adopt_parameters(model, Learned2D, Rows(facts.grid_size), **options)

    def input_facts(self, model: Qwen3VitEncoder | Qwen3VitClassifier) -> LayerFacts:
        side = self.encoder(model).pos_embed_grid_size
        return replace(super().input_facts(model), grid_size=(side, side))

    def bind_native(self, model: Qwen3VitEncoder) -> None:
        table = first(model.pos_embed_input, Learned2D) or first(model.pos_embed_input, Learned)
        model.pos_embed = None
        if table is not None:
            bind_parameters(table, model, Rows(table.grid_size) if isinstance(table, Learned2D) else None)


HOST = register_host(Qwen3VitHost())
