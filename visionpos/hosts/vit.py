"""timm's VisionTransformer and distilled DeiT as hosts."""

from __future__ import annotations

from typing import ClassVar

from timm.layers import PatchDropout
from timm.layers.patch_dropout import patch_dropout_forward
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from ..positions import Positions
from .attention import AttentionContext
from .host import register_host
from .isotropic import IsotropicForward, IsotropicHost, keep_tokens
from .vit_blocks import VitBlocks


class EncodedViTMixin(IsotropicForward):
    """The methods of VisionTransformer that are timm's own but for where positions enter."""

    def embed(self, x: Tensor) -> tuple[Tensor, Positions]:
        x, positions = super().embed(x)
        return self.pos_drop(x) if len(self.pos_embed_input) else x.contiguous(), positions  # copied where timm is

    def _pos_embed(self, x: Tensor) -> Tensor:
        """Return the tokens with input encodings, as timm's method does."""
        return self.embed(x)[0]

    def forward_stem(
        self, x: Tensor, keep: Tensor | None = None, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> tuple[Tensor, AttentionContext]:
        """Return the tokens of images (B, C, H, W), and what the blocks need to know of them, masks included."""
        x, positions = self.embed(self.patch_embed(x))
        drop = self.patch_drop
        if keep is not None:
            x = keep_tokens(x, keep, positions.num_prefix_tokens)
        elif isinstance(drop, PatchDropout):
            x, keep = patch_dropout_forward(x, drop.prob, drop.num_prefix_tokens, drop.ordered, drop.training)
        else:
            x = drop(x)
        context = self.context(positions, keep)
        context.attn_mask, context.is_causal = attn_mask, is_causal
        return self.norm_pre(x), context

    def forward_features(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """Return the features (B, prefix + N, C) as timm does."""
        return super().forward_features(x, attn_mask=attn_mask, is_causal=is_causal)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
        output_dict: bool = False,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
    ):
        """Return features and intermediates as timm does."""
        prefix = return_prefix_tokens and self.num_prefix_tokens > 0
        options = (indices, prefix, norm, stop_early, output_fmt, intermediates_only, output_dict)
        return super().forward_intermediates(x, *options, attn_mask=attn_mask, is_causal=is_causal)


class EncodedVisionTransformer(EncodedViTMixin, VisionTransformer):
    """A VisionTransformer whose positions are encodings of this package."""


class EncodedVisionTransformerDistilled(EncodedViTMixin, VisionTransformerDistilled):
    """A distilled DeiT whose positions are encodings of this package."""


class ViTHost(VitBlocks, IsotropicHost):
    """The family of VisionTransformer and DeiT; input encodings follow the class token, others act in every block."""

    name = "VisionTransformer (ViT, DeiT)"
    models: ClassVar = {
        VisionTransformer: EncodedVisionTransformer,
        VisionTransformerDistilled: EncodedVisionTransformerDistilled,
    }

    def adopt_native_positions(self, model: VisionTransformer) -> None:
        """Do nothing more: the learned table is all that timm's model has."""


HOST = register_host(ViTHost())
