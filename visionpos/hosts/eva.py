"""timm's Eva as host: EVA-02, DINOv3, the rope ViTs, Perception Encoder; their own rope becomes an encoding."""

from __future__ import annotations

from typing import ClassVar

from timm.models.eva import Eva
from torch import Tensor

from .attention import AttentionContext
from .host import register_host
from .isotropic import IsotropicMixin, keep_tokens
from .rope import RopeHost
from .rope_blocks import EvaBlocks


class EncodedEva(IsotropicMixin, Eva):
    """An Eva whose positions are encodings of this package."""

    holders = ("rope",)

    def _pos_embed(self, x: Tensor, keep: Tensor | None = None) -> tuple[Tensor, AttentionContext]:
        """Return the tokens, and in place of timm's rope table the context that the blocks need."""
        x, positions = self.embed(x)
        x = x if keep is None else keep_tokens(x, keep, positions.num_prefix_tokens)
        x = self.pos_drop(x)
        if self.patch_drop is not None and keep is None:
            x, keep = self.patch_drop(x)
        return x, self.context(positions, keep)

    def forward_stem(self, x: Tensor, keep: Tensor | None = None) -> tuple[Tensor, AttentionContext]:
        x, context = self._pos_embed(self.patch_embed(x), keep)
        return self.norm_pre(x), context


class EvaHost(EvaBlocks, RopeHost):
    """The family of Eva."""

    name = "Eva (EVA-02, DINOv3, rope ViT, PE)"
    models: ClassVar = {Eva: EncodedEva}


HOST = register_host(EvaHost())
