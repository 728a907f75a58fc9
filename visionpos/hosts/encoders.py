"""Shared parts of the vision towers of language models, Qwen3 and DeepSeek: timm has each alone and in a classifier."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn

from ..augment import CoordinateAugmentation
from ..encoding import LayerFacts
from ..rotary.rope_axial import RopeAxial
from .attention import AttentionContext
from .isotropic import IsotropicHost, IsotropicMixin


class EncoderMixin(IsotropicMixin):
    """A converted encoder, whose blocks get the context in the place of timm's rope table."""

    def _pos_embed(self, x: Tensor) -> tuple[Tensor, AttentionContext]:
        """Return the tokens (B, N, C) of patches (B, H, W, C), and what the blocks need to know of them."""
        x, positions = self.embed(x)
        return x, self.context(positions)


class ClassifierMixin:
    """A classifier around a converted encoder."""

    @property
    def coordinate_augmentation(self) -> CoordinateAugmentation | None:
        """Return the encoder's augmentation of coordinates while training."""
        return self.encoder.coordinate_augmentation

    @coordinate_augmentation.setter
    def coordinate_augmentation(self, augmentation: CoordinateAugmentation | None) -> None:
        self.encoder.coordinate_augmentation = augmentation

    def group_matcher(self, coarse: bool = False) -> dict:
        """Return timm's groups of layers, with input and shared encodings in the stem."""
        matcher = super().group_matcher(coarse)
        return {**matcher, "stem": matcher["stem"] + r"|^encoder\.pos_embed"}


class EncoderHost(IsotropicHost):
    """A family of encoders, alone or inside a classifier: positions are the encoder's."""

    classifiers: ClassVar[dict[type, type]]  # timm's class -> the converted one

    def encoder(self, model: nn.Module) -> nn.Module:
        """Return the encoder of a classifier, or the model itself."""
        return model.encoder if isinstance(model, tuple(self.classifiers)) else model

    def accepts(self, model: nn.Module) -> bool:
        kinds = {**self.models, **self.classifiers}
        return type(model) in kinds or isinstance(model, tuple(kinds.values()))

    def convert(self, model: nn.Module) -> None:
        super().convert(self.encoder(model))
        model.__class__ = self.classifiers.get(type(model), type(model))

    def adopt_native_positions(self, model: nn.Module) -> None:
        rope, model.rope = model.rope, None
        facts = self.layer_facts(model)[0]
        shape = {"num_heads": facts.num_heads, "head_dim": facts.head_dim}
        model.pos_embed_shared.append(RopeAxial(**shape, temperature=rope.temperature, preset="qwen_vit"))

    def input_facts(self, model: nn.Module) -> LayerFacts:
        return super().input_facts(self.encoder(model))

    def layer_facts(self, model: nn.Module) -> list[LayerFacts]:
        return super().layer_facts(self.encoder(model))

    def encodings(self, model: nn.Module):
        return super().encodings(self.encoder(model))

    def install(self, model: nn.Module, inputs, layers) -> None:
        super().install(self.encoder(model), inputs, layers)
