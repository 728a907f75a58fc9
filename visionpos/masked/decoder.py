"""The decoder of a masked autoencoder: a small ViT on encoded visible patches and mask tokens."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from ..encoding import PositionEncoding
from ..frequencies import require_multiple
from ..hosts.attention import Attention, AttentionContext
from ..hosts.host import encoding_parameters, register_host
from ..hosts.isotropic import IsotropicHost, mix
from ..positions import Positions


class MaskedDecoder(nn.Module):
    """Predict every patch from encoded visible patches and mask tokens (He et al. 2021, section 3).

    Args:
        in_dim: channels of the encoder's tokens.
        out_dim: numbers to predict for a patch.
        dim: channels of the decoder.
        depth: blocks.
        num_heads: attention heads.
        feat_shape: (H, W), the grid of the encoder.
        num_prefix_tokens: class and register tokens of the encoder, which go through the decoder as well.
        mlp_ratio: hidden channels of a block's MLP over `dim`.

    Raises:
        ValueError: no blocks, no heads, or heads of unequal width.
    """

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        dim: int,
        depth: int,
        num_heads: int,
        feat_shape: tuple[int, int],
        num_prefix_tokens: int,
        mlp_ratio: float = 4.0,
    ):
        super().__init__()
        require_multiple("decoder_depth", depth, 1, "blocks")
        require_multiple("decoder_num_heads", num_heads, 1, "attention heads")
        require_multiple("decoder_dim", dim, num_heads, "decoder_num_heads of equal width")
        norm = partial(nn.LayerNorm, eps=1e-6)
        self.embed_dim, self.num_prefix_tokens = dim, num_prefix_tokens
        self.patch_embed = SimpleNamespace(grid_size=tuple(feat_shape))  # what a host asks of its stem
        self.pos_embed = None
        self.pos_embed_input, self.pos_embed_shared = nn.ModuleList(), nn.ModuleList()
        self.embed_tokens = nn.Linear(in_dim, dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.blocks = nn.ModuleList(
            Block(dim, num_heads, mlp_ratio, qkv_bias=True, norm_layer=norm) for _ in range(depth)
        )
        for block in self.blocks:
            block.mixers = nn.ModuleList()
            block.attn.__class__, block.attn.encodings = Attention, nn.ModuleList()
        self.norm = norm(dim)
        self.pred = nn.Linear(dim, out_dim)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weights as in the paper: Xavier's uniform, biases zero, the mask token with deviation 0.02."""
        nn.init.normal_(self.mask_token, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)

    def forward(self, tokens: Tensor, restore: Tensor, feat_shape: tuple[int, int]) -> Tensor:
        """Return predictions (B, N, out_dim) in the order of the grid.

        Args:
            tokens: (B, prefix + K, in_dim) of the encoder.
            restore: (B, N), as in `Mask`.
            feat_shape: (H, W), the grid of all N patches.
        """
        tokens = self.embed_tokens(tokens)
        prefix, visible = tokens.tensor_split([self.num_prefix_tokens], dim=1)
        hidden = self.mask_token.to(tokens.dtype).expand(len(tokens), restore.shape[1] - visible.shape[1], -1)
        patches = torch.cat([visible, hidden], dim=1)
        patches = patches.gather(1, restore.unsqueeze(-1).expand(-1, -1, patches.shape[-1]))
        x = torch.cat([prefix, patches], dim=1)
        positions = Positions.grid(feat_shape, self.num_prefix_tokens, device=x.device).promote(x.dtype)
        for encoding in self.pos_embed_input:
            x = encoding(x, positions)
        context = AttentionContext.of(positions, self.pos_embed_shared)
        for block in self.blocks:
            x = mix(block(x, context), block.mixers, context)
        return self.pred(self.norm(x)[:, self.num_prefix_tokens :])

    def set_feat_shape(self, feat_shape: tuple[int, int]) -> None:
        """Work on another grid from now on; learned tables are resized."""
        self.patch_embed.grid_size = tuple(feat_shape)
        for module in self.modules():
            if isinstance(module, PositionEncoding):
                module.set_feat_shape(tuple(feat_shape))

    def no_weight_decay(self) -> set[str]:
        """Return the names of the mask token and of what the encodings name."""
        return {"mask_token", *encoding_parameters(self)}


class DecoderHost(IsotropicHost):
    """The family of the decoder, which takes encodings as a ViT does."""

    name = "MaskedDecoder (of MaskedAutoencoder)"

    def accepts(self, model: Any) -> bool:
        return isinstance(model, MaskedDecoder)

    def convert(self, model: MaskedDecoder) -> None:
        """Do nothing: it is built converted."""

    def adopt_native_positions(self, model: MaskedDecoder) -> None:
        """Do nothing: it has no positions of its own."""


HOST = register_host(DecoderHost())
