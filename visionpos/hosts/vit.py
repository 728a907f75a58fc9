"""timm's VisionTransformer and distilled DeiT as hosts."""

from __future__ import annotations

from typing import ClassVar

import torch
from timm.layers import PatchDropout, register_notrace_module
from timm.layers.patch_dropout import patch_dropout_forward
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import Attention as TimmAttention
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .attention import Attention, PositionState
from .host import ForgetsPositions, register_host
from .isotropic import PlainHost, PlainMixin, mix

register_notrace_module(Attention)


class EncodedBlock(Block):
    """A block that passes the positions on explicitly, so that a checkpointed recomputation sees the same ones."""

    grad_checkpointing = False

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """As timm's; `attn_mask` is the caller's own mask."""
        context = self.position_state.context(attn_mask)
        if self.grad_checkpointing and torch.is_grad_enabled():
            x = checkpoint(super().forward, x, context, is_causal, use_reentrant=False)
        else:
            x = super().forward(x, context, is_causal)
        return mix(x, self.mixers, context)


class EncodedPatchDropout(PatchDropout):
    """Patch dropout that tells the model which patches are left."""

    def forward(self, x: Tensor) -> Tensor:
        """x (B, prefix + N, C) -> (B, prefix + K, C)."""
        x, index = patch_dropout_forward(x, self.prob, self.num_prefix_tokens, self.ordered, self.training)
        if index is not None:
            self.position_state.keep(index)
        return x


class EncodedViTMixin(ForgetsPositions, PlainMixin):
    """What a converted VisionTransformer does differently: where positions enter, and nothing else."""

    def _pos_embed(self, x: Tensor) -> Tensor:
        x, positions = self.embed(x)
        self.position_state.enter(self.context(positions))
        return self.pos_drop(x) if len(self.pos_embed_input) else x.contiguous()  # copied where timm concatenates

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """As timm's, block by block."""
        super().set_grad_checkpointing(enable)
        self.grad_checkpointing = False  # timm's own loop would lose the positions
        for block in self.blocks:
            block.grad_checkpointing = enable


class EncodedVisionTransformer(EncodedViTMixin, VisionTransformer):
    """A converted VisionTransformer."""


class EncodedVisionTransformerDistilled(EncodedViTMixin, VisionTransformerDistilled):
    """A converted distilled DeiT."""


class ViTHost(PlainHost):
    """VisionTransformer and DeiT; input encodings after the class token, others in every block's attention."""

    name = "VisionTransformer (ViT, DeiT)"
    models: ClassVar = {
        VisionTransformer: EncodedVisionTransformer,
        VisionTransformerDistilled: EncodedVisionTransformerDistilled,
    }
    blocks: ClassVar = {Block: EncodedBlock}
    attentions: ClassVar = {TimmAttention: Attention}

    def adopt_native_positions(self, model: VisionTransformer) -> None:
        model.position_state = PositionState()
        checkpointing, model.grad_checkpointing = model.grad_checkpointing, False
        for block in model.blocks:
            block.position_state = model.position_state
            block.grad_checkpointing = checkpointing
        if isinstance(model.patch_drop, PatchDropout):
            model.patch_drop.__class__ = EncodedPatchDropout
            model.patch_drop.position_state = model.position_state


HOST = register_host(ViTHost())
