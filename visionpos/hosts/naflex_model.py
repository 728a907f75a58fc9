"""The forward pass of a converted NaFlexVit: on pictures, and on patches with coordinates, padded to one length."""

from __future__ import annotations

import torch
from timm.layers import to_2tuple
from timm.models._features import feature_take_indices
from timm.models.naflexvit import NaFlexVit, create_attention_mask
from torch import Tensor, nn

from ..encoding import PositionEncoding
from ..positions import Positions
from .attention import AttentionContext
from .host import attention_of
from .isotropic import keep_tokens
from .ragged import RaggedMixin

TABLES = ("pos_embed", "pos_embed_y", "pos_embed_x")


class EncodedNaFlexVit(RaggedMixin, NaFlexVit):
    """A NaFlexVit whose positions are encodings of this package."""

    holders = ("rope",)

    @property
    def patch_embed(self) -> nn.Module:
        """Return the stem, under the name that it has in other families."""
        return self.embeds

    @property
    def tables(self) -> list[Tensor]:
        """Return parameters of encodings that belong to the model, its stem, or one child for all layers."""
        own = (getattr(self.embeds, name) for name in TABLES)
        return [*super().tables, *(table for table in own if table is not None)]

    @property
    def acts_in_blocks(self) -> bool:
        """Return whether any encoding acts in or behind attention."""
        layers = [module for module in self.modules() if "mixers" in module._modules]
        own = (len(layer.mixers) + len(attention_of(layer).encodings) for layer in layers)
        return bool(len(self.pos_embed_shared) or sum(own))

    def forward_stem(
        self,
        x: Tensor,
        keep: Tensor | None = None,
        patch_coord: Tensor | None = None,
        patch_valid: Tensor | None = None,
        attn_mask: Tensor | None = None,
    ) -> tuple[Tensor, AttentionContext]:
        """Return the tokens of pictures (B, C, H, W) or of patches, and what the blocks need to know of them.

        Args:
            x: pictures, or patches (B, N, P P C) or (B, N, P, P, C).
            keep: (B, K), the patches to go on with; of pictures alone.
            patch_coord: (B, N, 2), (y, x) of each patch; None: x are pictures.
            patch_valid: (B, N), false for padding; None: none is.
            attn_mask: the caller's own, in place of that of the padding.
        """
        x, grid = self.embeds(x, patch_coord, patch_valid)
        x, context = (
            self.embed_grid(x, tuple(grid), keep, attn_mask)
            if patch_coord is None
            else self.embed_patches(x, patch_coord, patch_valid, attn_mask)
        )
        return self.norm_pre(x), context

    def embed_grid(
        self, x: Tensor, grid: tuple[int, int], keep: Tensor | None, attn_mask: Tensor | None
    ) -> tuple[Tensor, AttentionContext]:
        """Return the tokens (B, prefix + H W, C) of whole pictures with input encodings, or the patches to keep."""
        positions = Positions.grid(grid, self.num_prefix_tokens, device=x.device).promote(x.dtype)
        if self.training and self.coordinate_augmentation is not None:
            positions = self.coordinate_augmentation(positions)
        x = self.pos_drop(self.add_positions(x, positions))
        if keep is not None:
            x = keep_tokens(x, keep, self.num_prefix_tokens)
        elif self.training and self.patch_drop is not None:
            x, keep = self.patch_drop(x)
        context = self.context(positions, keep)
        context.attn_mask, context.patch_valid = attn_mask, None
        return x, context

    def embed_patches(
        self, x: Tensor, coords: Tensor, patch_valid: Tensor | None, attn_mask: Tensor | None
    ) -> tuple[Tensor, AttentionContext]:
        """Return the tokens (B, prefix + N, C) of patches anywhere with input encodings, without those dropped."""
        valid = (torch.ones_like(coords[..., 0]) if patch_valid is None else patch_valid).bool()
        x, coords, sizes = self.embed_ragged(x, coords, valid)
        x = self.pos_drop(x)
        if self.training and self.patch_drop is not None:
            x, keep = self.patch_drop(x)
            coords, valid = coords.gather(1, keep.unsqueeze(-1).expand(-1, -1, 2)), valid.gather(1, keep)
            patch_valid = None if patch_valid is None else valid
        if self.acts_in_blocks:
            context = self.ragged_context(coords, valid, sizes, attn_mask)
        else:  # the batch as a whole, as in timm
            keys_alone = getattr(self, "use_key_only_attn_mask", False)  # an option since timm 1.0.31
            keys_alone = {"symmetric": False, "q_len": 1} if keys_alone else {}
            mask = create_attention_mask(patch_valid, self.num_prefix_tokens, dtype=x.dtype, **keys_alone)
            context = AttentionContext(Positions.grid((1, 1)), attn_mask=mask if attn_mask is None else attn_mask)
        context.patch_valid = patch_valid
        return x, context

    def forward_features(
        self,
        patches: Tensor,
        patch_coord: Tensor | None = None,
        patch_valid: Tensor | None = None,
        attn_mask: Tensor | None = None,
    ) -> Tensor | dict[str, Tensor | None]:
        """Return the features (B, prefix + N, C) as timm does: of patches with coordinates, in a dict."""
        x, context = self.forward_stem(patches, None, patch_coord, patch_valid, attn_mask)
        x = self.forward_norm(self.forward_blocks(x, context))
        return x if patch_coord is None else {"patches": x, "patch_valid": context.patch_valid}

    def forward_intermediates(
        self,
        x: Tensor | dict[str, Tensor],
        indices: int | list[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
        output_dict: bool = False,
        patch_coord: Tensor | None = None,
        patch_valid: Tensor | None = None,
        attn_mask: Tensor | None = None,
    ):
        """Return features and intermediates as timm does."""
        given = x if isinstance(x, dict) else {}
        coord, valid = given.get("patch_coord", patch_coord), given.get("patch_valid", patch_valid)
        if output_fmt != "NLC" and (output_fmt != "NCHW" or coord is not None):
            raise ValueError(f"output_fmt must be 'NLC', or 'NCHW' of pictures without coordinates, got {output_fmt!r}")
        if coord is not None and not output_dict and self.training and self.patch_drop is not None:
            raise ValueError("patches are dropped while training: output_dict=True tells which of them are padding")
        wanted, last = feature_take_indices(len(self.blocks), indices)
        mask = given.get("attn_mask", attn_mask)
        x, context = self.forward_stem(given.get("patches", x), None, coord, valid, mask)
        found = []
        for index, block in enumerate(self.blocks[: last + 1] if stop_early else self.blocks):
            x = self.forward_block(block, x, context)
            if index in wanted:
                found.append((self.norm(x) if norm else x).tensor_split([self.num_prefix_tokens], dim=1))
        patches = [patches for _, patches in found]
        if output_fmt == "NCHW":
            patches = [each.mT.unflatten(2, context.positions.feat_shape).contiguous() for each in patches]
        prefix = [prefix for prefix, _ in found] if return_prefix_tokens and self.num_prefix_tokens else None
        if not output_dict:
            patches = patches if prefix is None else list(zip(patches, prefix, strict=True))
            return patches if intermediates_only else (self.forward_norm(x), patches)
        named = {"image_intermediates": patches, "image_intermediates_prefix": prefix}
        named |= {"patch_valid": context.patch_valid, "image_features": None if intermediates_only else self.norm(x)}
        return {name: value for name, value in named.items() if value is not None}

    def set_input_size(self, img_size: tuple[int, int] | int) -> None:
        """Note the grid of the model's own pictures; tables of that grid are resized. Any other is taken as well."""
        self.embeds.grid_size = self.embeds.dynamic_feat_size(to_2tuple(img_size))
        for encoding in self.modules():
            if isinstance(encoding, PositionEncoding):
                encoding.set_feat_shape(self.embeds.grid_size)

    def group_matcher(self, coarse: bool = False) -> dict:
        """Return timm's groups of layers, with input and shared encodings in the stem."""
        matcher = super().group_matcher(coarse)
        return {**matcher, "stem": matcher["stem"] + "|^pos_embed|^rope"}
