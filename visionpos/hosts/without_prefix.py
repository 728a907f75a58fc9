"""The forward pass of CaiT and ConViT, whose class token comes behind some blocks."""

from __future__ import annotations

from torch import Tensor

from .isotropic import IsotropicForward


class WithoutPrefixTokens(IsotropicForward):
    """The forward pass of models that get class tokens on their way, if any, and whose features have none."""

    prefix_tokens = ()  # of the first block

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
        return_prefix_tokens: bool = False,
    ):
        """Return features and intermediates as timm does; there are no prefix tokens to return."""
        return super().forward_intermediates(
            x, indices, return_prefix_tokens, norm, stop_early, output_fmt, intermediates_only
        )
