"""timm's NaFlexVit as host: every picture of a batch has a grid of its own. Also what `use_naflex=True` makes."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

import torch
import torch.fx
from timm.layers import to_2tuple
from timm.models.naflexvit import NaFlexVit, create_attention_mask
from torch import Tensor, nn

from ..encoding import LayerFacts, PositionEncoding
from ..input.factorized import Factorized
from ..input.learned2d import Learned2D
from ..positions import Positions
from .attention import AttentionContext
from .grid_hosts import trained_size
from .host import register_host
from .isotropic import IsotropicForward, keep_tokens, locate
from .parameters import adopt_parameters, bind_first
from .ragged import RaggedMixin, pictures_alone
from .rope import RopeHost
from .rope_blocks import EvaBlocks
from .vit_blocks import VitBlocks

torch.fx.wrap("locate")  # here, too
torch.fx.wrap("pictures_alone")


class EncodedNaFlexVit(RaggedMixin, IsotropicForward, NaFlexVit):
    """A NaFlexVit whose positions are encodings of this package."""

    holders = ("rope", "embeds")

    @property
    def patch_embed(self) -> nn.Module:
        """Return the stem, under the name that it has in other families."""
        return self.embeds

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
            self.embed_grid(x, grid, keep, attn_mask)
            if patch_coord is None
            else self.embed_patches(x, patch_coord, patch_valid, attn_mask)
        )
        return self.norm_pre(x), context

    def embed_grid(
        self, x: Tensor, grid: tuple[int, int], keep: Tensor | None, attn_mask: Tensor | None
    ) -> tuple[Tensor, AttentionContext]:
        """Return the tokens (B, prefix + H W, C) of whole pictures with input encodings, or the patches to keep."""
        augmentation, prefix = self.coordinate_augmentation if self.training else None, self.num_prefix_tokens
        positions = locate(x[:, prefix:], grid, prefix, augmentation)
        x = self.pos_drop(self.add_positions(x, positions))
        if keep is not None:
            x = keep_tokens(x, keep, prefix)
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
        if any(HOST.encodings(self)[1]):
            context = self.ragged_context(coords, valid, sizes, attn_mask)
        else:  # the batch as a whole, as in timm
            keys_alone = {"symmetric": False, "q_len": 1} if self.use_key_only_attn_mask else {}
            mask = create_attention_mask(patch_valid, self.num_prefix_tokens, dtype=x.dtype, **keys_alone)
            anywhere = Positions.grid((1, 1), self.num_prefix_tokens)
            context = AttentionContext(anywhere, attn_mask=mask if attn_mask is None else attn_mask)
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
        if isinstance(patch_coord, torch.fx.Proxy):  # which no one can ask whether it will be None
            pictures = pictures_alone(patches, patch_coord, patch_valid, attn_mask)
            return {"patches": self.forward_features(pictures), "patch_valid": patch_valid}
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
        given = {"patches": x, "patch_coord": patch_coord, "patch_valid": patch_valid, "attn_mask": attn_mask}
        given = {name: x.get(name, value) for name, value in given.items()} if isinstance(x, dict) else given
        flat = given["patch_coord"] is not None
        if output_fmt != "NLC" and (output_fmt != "NCHW" or flat):
            raise ValueError(f"output_fmt must be 'NLC', or 'NCHW' of pictures without coordinates, got {output_fmt!r}")
        if flat and not output_dict and self.training and self.patch_drop is not None:
            raise ValueError("patches are dropped while training: output_dict=True tells which of them are padding")
        prefix = return_prefix_tokens and self.num_prefix_tokens > 0
        options = (indices, prefix, norm, stop_early, output_fmt, intermediates_only, output_dict)
        return super().forward_intermediates(given.pop("patches"), *options, **given)

    def set_input_size(self, img_size: tuple[int, int] | int) -> None:
        """Note the grid of the model's own pictures; tables of that grid are resized. Any other is taken as well."""
        self.embeds.grid_size = self.embeds.dynamic_feat_size(to_2tuple(img_size))
        for encoding in self.modules():
            if isinstance(encoding, PositionEncoding):
                encoding.set_feat_shape(self.embeds.grid_size)


class NaFlexVitHost(VitBlocks, RopeHost):
    """The family of NaFlexVit, whose blocks are those of ViT or EVA. Tables keep their names in `embeds`.

    Tables and ropes differ from timm's by rounding alone, about 1e-6, and not at all on the table's own grid.
    """

    name = "NaFlexVit (NaFlex, SigLIP 2, C-RADIO)"
    since = "1.0.31"  # knows what its features are padded with
    models: ClassVar = {NaFlexVit: EncodedNaFlexVit}
    blocks: ClassVar = {**VitBlocks.blocks, **EvaBlocks.blocks}
    attentions: ClassVar = {**VitBlocks.attentions, **EvaBlocks.attentions}

    def grid_size(self, model: NaFlexVit) -> tuple[int, int]:
        return model.embeds.grid_size

    def convert(self, model: NaFlexVit) -> None:
        if type(model) is NaFlexVit:
            options = self.table_options(model.embeds)  # of a table that is none here, an error
            grid = model.embeds.pos_embed_grid_size or model.embeds.dynamic_feat_size(trained_size(model))
            model.embeds.grid_size = tuple(grid)
            super().convert(model)
            if model.embeds.pos_embed_type == "learned":
                model.pos_embed_input.append(adopt_parameters(model.embeds, Learned2D, **options))
            if model.embeds.pos_embed_type == "factorized":
                model.pos_embed_input.append(adopt_parameters(model.embeds, Factorized, **options))
            model.embeds.pos_embed_type = "none"
            model.pos_drop, model.embeds.pos_drop = model.embeds.pos_drop, nn.Identity()  # behind the encodings

    def table_options(self, embeds: nn.Module) -> dict:
        """Return the options of the encoding that timm's table is.

        Raises:
            ValueError: a table that is read in a way that no encoding has.
        """
        if embeds.pos_embed_type == "none":
            return {}
        size, keep_aspect = tuple(embeds.pos_embed_grid_size), embeds.pos_embed_ar_preserving
        if embeds.pos_embed_type == "factorized":
            return {"dim": embeds.embed_dim, "feat_shape": size, "keep_aspect": keep_aspect}
        mode, antialias = embeds.pos_embed_interp_mode, embeds.pos_embed_antialias
        corners, sampled = embeds.pos_embed_align_corners, embeds.pos_embed_use_grid_sample
        stretched = keep_aspect and size[0] != size[1]  # timm does not, on the table's own grid
        if mode == "bilinear" and not antialias and not stretched:
            mode = "ends" if corners else "sample"
        elif mode not in ("bilinear", "bicubic") or corners or sampled:
            raise ValueError(
                f"a NaFlexVit with pos_embed_interp_mode={mode!r}, pos_embed_antialias={antialias}, "
                f"pos_embed_align_corners={corners} and pos_embed_use_grid_sample={sampled} cannot be converted: give "
                "a square table and 'bilinear' without antialias, or 'bilinear' or 'bicubic' without the last two"
            )
        return {
            "dim": embeds.embed_dim,
            "grid_size": size,
            "interpolation": mode,
            "antialias": antialias,
            "keep_aspect": keep_aspect,
        }

    def input_facts(self, model: NaFlexVit) -> LayerFacts:
        return replace(super().input_facts(model), num_prefix_tokens=0, grid_size=self.grid_size(model))

    def bind_native(self, model: NaFlexVit) -> None:
        super().bind_native(model)
        for kind in (Learned2D, Factorized):
            bind_first(model.pos_embed_input, kind, model.embeds)


HOST = register_host(NaFlexVitHost())
