"""timm's NaFlexVit as host: every picture of a batch has a grid of its own. Also what `use_naflex=True` makes."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

from timm.models.naflexvit import NaFlexVit
from torch import nn

from ..encoding import LayerFacts
from ..input.factorized import Factorized
from ..input.learned2d import Learned2D
from .grid_hosts import trained_size
from .host import register_host
from .naflex_model import EncodedNaFlexVit
from .parameters import adopt_parameters, bind_first
from .rope import RopeHost
from .rope_blocks import EvaBlocks
from .vit_blocks import VitBlocks


class NaFlexVitHost(VitBlocks, RopeHost):
    """The family of NaFlexVit, whose blocks are those of ViT or EVA. Tables keep their names in `embeds`.

    Tables and ropes differ from timm's by rounding alone, about 1e-6, and not at all on the table's own grid.
    """

    name = "NaFlexVit (NaFlex, SigLIP 2, C-RADIO)"
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
        mode, antialias = embeds.pos_embed_interp_mode, getattr(embeds, "pos_embed_antialias", True)  # since 1.0.31
        corners, sampled = getattr(embeds, "pos_embed_align_corners", False), embeds.pos_embed_use_grid_sample
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
