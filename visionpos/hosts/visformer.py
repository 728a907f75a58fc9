"""timm's Visformer as host: maps in three stages, each with a learned table, and with attention in some of them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

from timm.models._features import feature_take_indices
from timm.models._manipulate import checkpoint_seq
from timm.models.visformer import Attention, Block, Visformer
from torch import Tensor, nn

from ..encoding import LayerFacts, OneNode
from .attention import attend
from .grid_hosts import EncodedGridModel
from .grids import MixMap, add_to_map, encode_grid
from .host import register_host
from .stems import MapLayout, StemsHost


class EncodedAttention(OneNode, Attention):
    """Self-attention of Visformer with encodings, on a map x (B, C, H, W)."""

    def forward(self, x: Tensor) -> Tensor:
        """Return a map (B, C, H, W)."""
        if not len(self.encodings):
            return super().forward(x)
        grid = tuple(x.shape[2:])
        q, k, v = self.qkv(x).flatten(2).unflatten(1, (3, self.num_heads, -1)).mT.unbind(1)  # (B, heads, H W, head_dim)
        tensors = encode_grid(self, x.flatten(2).mT, grid, q.contiguous(), k.contiguous(), v.contiguous())
        out = attend(tensors, self.scale, self.attn_drop, self.fused_attn)
        return self.proj_drop(self.proj(out.mT.flatten(1, 2).unflatten(2, grid)))


class EncodedBlock(MixMap, Block):
    """A block on a map x (B, C, H, W), after which conditional encodings may mix it."""


class EncodedVisformer(EncodedGridModel, Visformer):
    """A Visformer whose positions are encodings of this package."""

    def through_stages(self, x: Tensor, count: int = 3) -> Iterator[Tensor]:
        """Yield the maps after each of the first stages, of pictures x."""
        x = x if self.stem is None else self.stem(x)
        for number in range(1, count + 1):
            embed = getattr(self, f"patch_embed{number}")
            if embed is not None:  # of a stage that timm has pruned
                x, encodings = embed(x), HOST.input_lists(self)[number - 1]
                x = self.pos_drop(add_to_map(x, encodings)) if len(encodings) else x
            stage = getattr(self, f"stage{number}")
            x = checkpoint_seq(stage, x) if self.grad_checkpointing else stage(x)
            yield x

    def forward_features(self, x: Tensor) -> Tensor:
        """Return the features (B, C, H, W) of pictures as timm does."""
        *_, x = self.through_stages(x)
        return self.norm(x)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ):
        """Return features and intermediates as timm does."""
        if output_fmt != "NCHW":
            raise ValueError(f"output_fmt must be 'NCHW', got {output_fmt!r}")
        wanted, last = feature_take_indices(3, indices)
        maps = list(self.through_stages(x, last + 1 if stop_early else 3))
        x = self.norm(maps[-1]) if len(maps) == 3 else maps[-1]
        found = [x if norm and index == 2 else maps[index] for index in wanted]
        return found if intermediates_only else (x, found)


class VisformerHost(StemsHost):
    """The family of Visformer; its layers are the blocks that have attention."""

    name = "Visformer"
    models: ClassVar = {Visformer: EncodedVisformer}
    parts: ClassVar = {Block: EncodedBlock, Attention: EncodedAttention}

    def stages(self, model: Visformer) -> list[list[nn.Module]]:
        stages = (model.stage1, model.stage2, model.stage3)
        return [[block for block in stage if block.attn is not None] for stage in stages]

    def grids(self, model: Visformer) -> list[tuple[int, int]]:
        embeds = (model.patch_embed1, model.patch_embed2, model.patch_embed3)
        return [tuple((embed or model.patch_embed1).grid_size) for embed in embeds]

    def stems(self, model: Visformer) -> list[LayerFacts]:
        embeds = (model.patch_embed1, model.patch_embed2, model.patch_embed3)
        return [LayerFacts(dim=e.proj.out_channels, feat_shape=tuple(e.grid_size)) for e in embeds if e is not None]

    def tables(self, model: Visformer) -> list[tuple[nn.Module, str, MapLayout]]:
        return [(model, f"pos_embed{index}", MapLayout()) for index, _ in enumerate(self.stems(model), start=1)]

    def convert(self, model: Visformer) -> None:
        if model.vit_stem:
            raise ValueError(
                "a Visformer with vit_stem takes no encodings: its stages have one width, against timm's own"
            )
        super().convert(model)
        model.pos_drop = getattr(model, "pos_drop", None) or nn.Dropout(0.0)


HOST = register_host(VisformerHost())
