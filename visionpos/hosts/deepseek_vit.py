"""timm's DeepseekVit as host: the vision encoder of DeepSeek-V4, with a rope and nothing else, and its classifier."""

from __future__ import annotations

from typing import ClassVar

from timm.layers import AttentionRope
from timm.models.deepseek_vit import DeepseekVitBlock, DeepseekVitClassifier, DeepseekVitEncoder
from torch import Tensor

from .attention import AttentionContext
from .encoders import ClassifierMixin, EncoderHost, EncoderMixin
from .host import register_host
from .isotropic import mix
from .rope_blocks import EncodedAttentionRope


class EncodedDeepseekVitBlock(DeepseekVitBlock):
    """A block after which conditional encodings may mix the tokens."""

    def forward(self, x: Tensor, rope: AttentionContext | None = None) -> Tensor:
        """Return the tokens (B, N, C) after the block.

        `rope`, timm's way from the model to its attention layers, carries the context here.
        """
        return mix(super().forward(x, rope), self.mixers, rope)


class EncodedDeepseekVitEncoder(EncoderMixin, DeepseekVitEncoder):
    """An encoder whose positions are encodings of this package."""


class EncodedDeepseekVitClassifier(ClassifierMixin, DeepseekVitClassifier):
    """A classifier around such an encoder."""


class DeepseekVitHost(EncoderHost):
    """The family of DeepseekVit. Its rope differs from timm's by rounding alone, about 1e-6."""

    name = "DeepseekVit (DeepSeek-V4)"
    models: ClassVar = {DeepseekVitEncoder: EncodedDeepseekVitEncoder}
    classifiers: ClassVar = {DeepseekVitClassifier: EncodedDeepseekVitClassifier}
    blocks: ClassVar = {DeepseekVitBlock: EncodedDeepseekVitBlock}
    attentions: ClassVar = {AttentionRope: EncodedAttentionRope}


HOST = register_host(DeepseekVitHost())
