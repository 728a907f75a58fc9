"""timm's PiT as host: ViT's blocks in stages, with convolutions that pool the map of patches between them."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

import torch
import torch.fx
from timm.models._features import feature_take_indices
from timm.models.pit import PoolingVisionTransformer, Transformer
from timm.models.vision_transformer import Attention as TimmAttention
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from ..encoding import LayerFacts
from ..positions import Positions
from .attention import Attention, AttentionContext
from .grids import add_to_map
from .host import FixedCoordinates, encoding_parameters, register_host
from .isotropic import BlockSequence
from .stems import MapLayout, StemsHost
from .vit_blocks import EncodedBlock


@torch.fx.wrap  # one call in its graphs: the size of a picture is known when they run
def locate_map(x: Tensor, prefix: Tensor) -> Positions:
    """Return the positions of a map x (B, C, H, W), behind prefix tokens (B, P, C)."""
    return Positions.grid(tuple(x.shape[2:]), int(prefix.shape[1]), device=x.device).promote(x.dtype)


class EncodedTransformer(Transformer):
    """A stage, whose blocks are told where the patches of its map stand."""

    def forward(self, x: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Return the map (B, C, H, W) and the prefix tokens (B, P, C) after the stage."""
        x, prefix = (x[0], x[1]) if self.pool is None else self.pool(x[0], x[1])
        context = AttentionContext(locate_map(x, prefix))
        tokens = self.blocks(self.norm(torch.cat([prefix, x.flatten(2).mT], dim=1)), context)
        return tokens[:, prefix.shape[1] :].mT.reshape(x.shape), tokens[:, : prefix.shape[1]]


class EncodedPiT(FixedCoordinates, PoolingVisionTransformer):
    """A PiT whose positions are encodings of this package."""

    def forward_stem(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the map and the prefix tokens of pictures (B, C, H, W)."""
        x = self.pos_drop(add_to_map(self.patch_embed(x), self.pos_embed_input))
        return x, self.cls_token.expand(x.shape[0], -1, -1)

    def forward_features(self, x: Tensor) -> Tensor:
        """Return the prefix tokens (B, P, C) of pictures (B, C, H, W) as timm does."""
        return self.norm(self.transformers(self.forward_stem(x))[1])

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
        wanted, last = feature_take_indices(len(self.transformers), indices)
        stages = self.transformers[: last + 1] if stop_early else self.transformers
        passed = [self.forward_stem(x)]
        for stage in stages:
            passed.append(stage(passed[-1]))
        found, prefix = [passed[index + 1][0] for index in wanted], passed[-1][1]
        if intermediates_only:
            return found
        return self.norm(prefix) if len(stages) == len(self.transformers) else prefix, found

    def no_weight_decay(self) -> set[str]:
        """Return timm's names and every parameter of an encoding."""
        return super().no_weight_decay() | encoding_parameters(self)


class PiTHost(StemsHost):
    """The family of PiT; its class and distillation tokens have no place, and every stage has a grid of its own."""

    name = "PoolingVisionTransformer (PiT)"
    models: ClassVar = {PoolingVisionTransformer: EncodedPiT}
    parts: ClassVar = {Block: EncodedBlock, TimmAttention: Attention}

    def stages(self, model: PoolingVisionTransformer) -> list[list[nn.Module]]:
        return [list(stage.blocks) for stage in model.transformers]

    def grids(self, model: PoolingVisionTransformer) -> list[tuple[int, int]]:
        grid = model.patch_embed.grid_size
        return [tuple(-(-n // 2**stage) for n in grid) for stage in range(len(model.transformers))]

    def adopt_native_positions(self, model: PoolingVisionTransformer) -> None:
        super().adopt_native_positions(model)
        for stage in model.transformers:
            stage.__class__, stage.blocks.__class__ = EncodedTransformer, BlockSequence

    def stems(self, model: PoolingVisionTransformer) -> list[LayerFacts]:
        return [LayerFacts(dim=model.cls_token.shape[-1], feat_shape=tuple(model.patch_embed.grid_size))]

    def tables(self, model: PoolingVisionTransformer) -> list[tuple[nn.Module, str, MapLayout]]:
        return [(model, "pos_embed", MapLayout())]

    def layer_facts(self, model: PoolingVisionTransformer) -> list[LayerFacts]:
        return [replace(facts, num_prefix_tokens=model.cls_token.shape[1]) for facts in super().layer_facts(model)]


HOST = register_host(PiTHost())
