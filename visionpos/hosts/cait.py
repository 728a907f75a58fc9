"""timm's CaiT as host: its patch blocks take encodings; the class attention after them sees only what patches carry."""

from __future__ import annotations

from typing import ClassVar

import torch
from timm.models.cait import Cait, LayerScaleBlock, TalkingHeadAttn
from torch import Tensor, nn

from ..encoding import OneNode
from .attention import AttentionContext, attend_logits, encoded, prepare_encodings, split_heads
from .host import register_host
from .isotropic import IsotropicHost, mix
from .without_prefix import WithoutPrefixTokens


def mix_heads(x: Tensor, projection: nn.Linear) -> Tensor:
    """Return x (B, heads, T, T) with each head a linear mixture of all, in the projection's dtype."""
    return projection(x.permute(0, 2, 3, 1).to(projection.weight.dtype)).permute(0, 3, 1, 2)


class EncodedTalkingHeadAttn(OneNode, TalkingHeadAttn):
    """Talking-heads attention of the patches with encodings, on tokens x (B, N, C).

    y = W(softmax(L(scale q k^T) + b)) v, where L and W mix the heads (`proj_l` and `proj_w`). Rotations turn q and k.
    A bias b is added to what the softmax gets, after L, as by the authors of talking heads (Shazeer et al. 2020,
    arXiv 2003.02436): mixed by L, heads would lose the slopes and directions that an encoding gives each of them, and
    a bias of minus infinity would become NaN. What W has as a bias of its own is a weight of every key, hidden or not.
    """

    def forward(self, x: Tensor, context: AttentionContext | None = None) -> Tensor:
        """Return tokens (B, N, C)."""
        prepared = prepare_encodings(self, context)
        if not prepared:
            return super().forward(x)
        *qkv, prepared = split_heads(self, self.qkv(x).unflatten(-1, (3, self.num_heads, -1)), prepared)
        tensors = encoded(x, *qkv, prepared)
        logits = mix_heads((tensors.q * self.scale) @ tensors.k.mT, self.proj_l)
        out = attend_logits(tensors, logits, lambda p: self.attn_drop(mix_heads(p, self.proj_w)))
        return self.proj_drop(self.proj(out.transpose(1, 2).flatten(2)))


class EncodedLayerScaleBlock(LayerScaleBlock):
    """A block that hands positions on to its attention, and after which conditional encodings may mix the tokens."""

    def forward(self, x: Tensor, context: AttentionContext | None = None) -> Tensor:
        """Return the tokens (B, N, C) after the block."""
        x = x + self.drop_path(self.gamma_1 * self.attn(self.norm1(x), context))
        x = x + self.drop_path(self.gamma_2 * self.mlp(self.norm2(x)))
        return mix(x, self.mixers, context)


class EncodedCait(WithoutPrefixTokens, Cait):
    """A CaiT whose positions are encodings of this package."""

    num_prefix_tokens = 1  # of the features

    def forward_norm(self, x: Tensor) -> Tensor:
        """Return the normalised features (B, 1 + N, C) of patch tokens (B, N, C), the class token first."""
        return self.norm(self.forward_cls(x))

    def forward_cls(self, x: Tensor) -> Tensor:
        """Return patch tokens (B, N, C) behind the class token, which has looked at them: (B, 1 + N, C)."""
        if self.cls_token is None:  # pruned
            return x
        cls_token = self.cls_token.expand(x.shape[0], -1, -1)
        for block in self.blocks_token_only:
            cls_token = block(x, cls_token)
        return torch.cat([cls_token, x], dim=1)


class CaitHost(IsotropicHost):
    """The family of CaiT. Its class-attention blocks stay timm's, for the class token has no place."""

    name = "Cait (CaiT)"
    models: ClassVar = {Cait: EncodedCait}
    blocks: ClassVar = {LayerScaleBlock: EncodedLayerScaleBlock}
    attentions: ClassVar = {TalkingHeadAttn: EncodedTalkingHeadAttn}

    def adopt_native_positions(self, model: Cait) -> None:
        """Do nothing more: the learned table is all that timm's model has."""

    def num_prefix_tokens(self, model: Cait) -> int:
        return 0


HOST = register_host(CaitHost())
