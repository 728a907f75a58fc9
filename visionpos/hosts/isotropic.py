"""Shared parts of the hosts with one column of equal blocks: ViT, EVA, BEiT, the relative position ViT and CaiT."""

from __future__ import annotations

from abc import abstractmethod
from collections import deque
from collections.abc import Callable, Iterator
from typing import ClassVar

import torch
import torch.fx
from timm.models._features import feature_take_indices
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..augment import CoordinateAugmentation
from ..encoding import LayerFacts, PositionEncoding
from ..input.learned import Learned
from ..positions import Positions
from .attention import AttentionContext, positions_of
from .host import Host, attention_of, encoding_parameters, layer_lists
from .parameters import adopt_parameters, bind_first, has_parameters, replace_encodings


def mix(x: Tensor, mixers: nn.ModuleList, context: AttentionContext | None) -> Tensor:
    """Return the tokens x (B, prefix + N, C) after the conditional encodings that follow a block."""
    for encoding in mixers:
        x = encoding(x, positions_of(context, "block"))
    return x


@torch.fx.wrap  # one call in its graphs: the sizes of a picture are known when they run
def locate(
    x: Tensor, grid_size: tuple[int, int], num_prefix_tokens: int, augmentation: CoordinateAugmentation | None
) -> Positions:
    """Return the positions of patch tokens: x (B, N, C) on the model's own grid, or (B, H, W, C) on the grid of x.

    Raises:
        ValueError: another number of tokens than that grid has; a hybrid stem takes pictures of any size.
    """
    feat_shape = tuple(x.shape[1:3]) if x.ndim == 4 else grid_size
    if x.ndim == 3 and x.shape[1] != grid_size[0] * grid_size[1]:
        raise ValueError(
            f"the pictures have {x.shape[1]} patches, but the model was built for {grid_size[0]} x {grid_size[1]}: "
            "build it with their size as img_size"
        )
    positions = Positions.grid(feat_shape, int(num_prefix_tokens), device=x.device).promote(x.dtype)
    return positions if augmentation is None else augmentation(positions)


@torch.fx.wrap  # one call in its graphs, which then have the tables among their own parameters
def add_encodings(x: Tensor, positions: Positions, encodings: nn.ModuleList, tables: list[Tensor]) -> Tensor:
    """Return x (B, prefix + N, C) after input encodings; `tables` are what encodings read from the model itself."""
    for encoding in encodings:
        x = encoding(x, positions)
    return x


def keep_tokens(x: Tensor, keep: Tensor, num_prefix_tokens: int) -> Tensor:
    """Return the prefix tokens and the patches `keep` (B, K) of x (B, prefix + N, C): (B, prefix + K, C)."""
    prefix, patches = x.tensor_split([num_prefix_tokens], dim=1)
    patches = patches.gather(1, keep.unsqueeze(-1).expand(-1, -1, x.shape[-1]))
    return torch.cat([prefix, patches], dim=1) if num_prefix_tokens else patches


class BlockSequence(nn.Sequential):
    """timm's sequence of blocks, called with a context; hooks and wrappers of it find what they find in timm's.

    timm itself calls the sequence as a whole, or block by block where it checkpoints them or wants intermediates.
    """

    def forward(self, x: Tensor, context: AttentionContext | None = None) -> Tensor:
        """Return the tokens (B, T, C) after all blocks."""
        for block in self:
            x = block(x, context)
        return x


class IsotropicMixin:
    """The stem and the loop over blocks of a converted model, where positions enter; all else stays timm's."""

    holders: ClassVar[tuple[str, ...]] = ()  # children that hold parameters of encodings outside themselves
    coordinate_augmentation: CoordinateAugmentation | None = None  # applied while training
    grad_checkpointing: bool = False  # of timm's models that cannot

    @property
    def prefix_tokens(self) -> list[Tensor]:
        """Return the tokens in front of the patch tokens, each (1, n, C)."""
        tokens = [getattr(self, name, None) for name in ("cls_token", "dist_token", "reg_token")]
        return [token for token in tokens if token is not None]

    @property
    def tables(self) -> list[Tensor]:
        """Return parameters of encodings that belong to the model itself, or to one of its children for all layers."""
        children = [getattr(self, name) for name in self.holders]
        held = [parameter for child in children if child is not None for parameter in child.parameters()]
        return held if self.pos_embed is None else [self.pos_embed, *held]

    def embed(self, x: Tensor) -> tuple[Tensor, Positions]:
        """Return all tokens of patch tokens (B, N, C) or (B, H, W, C), with input encodings, and where they are."""
        augmentation = self.coordinate_augmentation if self.training else None
        prefix = [token.expand(x.shape[0], -1, -1) for token in self.prefix_tokens]
        num_prefix_tokens = sum(token.shape[1] for token in self.prefix_tokens)
        positions = locate(x, tuple(self.patch_embed.grid_size), num_prefix_tokens, augmentation)
        x = x.flatten(1, -2)
        x = torch.cat([*prefix, x], dim=1) if prefix else x
        x = add_encodings(x, positions, self.pos_embed_input, self.tables)
        return x, positions

    def context(self, positions: Positions, index: Tensor | None = None) -> AttentionContext:
        """Return what the blocks need to know of the patch tokens, or of those in index (B, K)."""
        return AttentionContext.of(positions, self.pos_embed_shared, index)

    def forward_stem(self, x: Tensor, keep: Tensor | None = None) -> tuple[Tensor, AttentionContext]:
        """Return the tokens of images (B, C, H, W), and what the blocks need to know of them.

        Args:
            x: the pictures.
            keep: (B, K), the patches to go on with, in any order.
        """
        x, positions = self.embed(self.patch_embed(x))
        x = x if keep is None else keep_tokens(x, keep, positions.num_prefix_tokens)
        pos_drop = self._modules.get("pos_drop")  # not in every family
        return x if pos_drop is None else pos_drop(x), self.context(positions, keep)

    def forward_block(self, block: Callable[..., Tensor], x: Tensor, context: AttentionContext) -> Tensor:
        """Return the tokens after one block, checkpointed or not."""
        return checkpoint(block, x, context, use_reentrant=False) if self.grad_checkpointing else block(x, context)

    def through_blocks(self, x: Tensor, context: AttentionContext, blocks) -> Iterator[tuple[Tensor, AttentionContext]]:
        """Yield the tokens after each of the first blocks, and what the next one needs to know of them."""
        for block in blocks:
            x = self.forward_block(block, x, context)
            yield x, context

    def forward_blocks(self, x: Tensor | tuple[Tensor, Tensor], context: AttentionContext) -> Tensor:
        """Return the tokens after all blocks, of those in front of them: TNT has two kinds."""
        if self.grad_checkpointing or type(self.blocks) in (nn.Sequential, nn.ModuleList):  # the first after surgery
            return deque(self.through_blocks(x, context, self.blocks), maxlen=1)[0][0]  # the last tokens alone
        return self.blocks(x, context)  # or what wraps them all

    def forward_norm(self, x: Tensor) -> Tensor:
        """Return the features that the tokens after the last block become."""
        return self.norm(x)

    def forward_kept(self, x: Tensor, keep: Tensor) -> Tensor:
        """Return `forward_features` of a subset of the patches of each image; the others are never seen.

        Args:
            x: pictures (B, C, H, W).
            keep: (B, K) indices of patches, in any order.

        Returns:
            (B, prefix + K, C), in the order of `keep`.
        """
        return self.forward_norm(self.forward_blocks(*self.forward_stem(x, keep)))

    def set_input_size(self, img_size=None, patch_size=None) -> None:
        """Change the input size as timm does; learned tables are resized, formulas interpolate their coordinates."""
        resize = getattr(super(), "set_input_size", self.patch_embed.set_input_size)  # not in every timm's BEiT
        table, self.pos_embed = self.pos_embed, None  # ours to resize
        try:
            resize(img_size=img_size, patch_size=patch_size)
        finally:
            self.pos_embed = table
        for module in self.modules():
            if isinstance(module, PositionEncoding):
                module.set_feat_shape(tuple(self.patch_embed.grid_size))

    def no_weight_decay(self) -> set[str]:
        """Return timm's names and every parameter of an encoding."""
        return super().no_weight_decay() | encoding_parameters(self)

    def group_matcher(self, coarse: bool = False) -> dict | Callable:
        """Return timm's groups of layers, with the encodings of the whole model in the stem."""
        groups = super().group_matcher(coarse)
        if not isinstance(groups, dict):  # CaiT's function has them there already
            return groups
        return {**groups, "stem": "|^".join((groups["stem"], "pos_embed", *self.holders))}


class IsotropicForward(IsotropicMixin):
    """The forward pass of models whose own has no way for a context: all but EVA."""

    def forward_features(self, x: Tensor, **mask) -> Tensor:
        """Return the features (B, prefix + N, C) as timm does; `mask` is what the model's stem takes of one."""
        return self.forward_norm(self.forward_blocks(*self.forward_stem(x, **mask)))

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
        output_dict: bool = False,
        **mask,
    ):
        """Return features and intermediates as timm does; `mask` is what the model's stem takes of one."""
        if output_fmt not in ("NCHW", "NLC"):
            raise ValueError(f"output_fmt must be 'NCHW' or 'NLC', got {output_fmt!r}")
        wanted, last = feature_take_indices(len(self.blocks), indices)
        found, blocks = [], self.blocks[: last + 1] if stop_early else self.blocks
        for index, (x, context) in enumerate(self.through_blocks(*self.forward_stem(x, **mask), blocks)):  # noqa: B020
            if index in wanted:
                tokens = self.norm(x) if norm else x
                found.append(tokens.tensor_split([context.num_prefix_tokens], dim=1))
        prefix, patches = [tokens for tokens, _ in found], [tokens for _, tokens in found]
        if output_fmt == "NCHW":
            patches = [tokens.mT.unflatten(2, context.positions.feat_shape).contiguous() for tokens in patches]
        if not output_dict:
            intermediates = list(zip(patches, prefix, strict=True)) if return_prefix_tokens else patches
            return intermediates if intermediates_only else (self.forward_norm(x), intermediates)
        named = {"image_intermediates": patches}
        named |= {"image_intermediates_prefix": prefix} if return_prefix_tokens else {}
        named |= {} if context.patch_valid is None else {"patch_valid": context.patch_valid}
        return named if intermediates_only else {**named, "image_features": self.forward_norm(x)}


class IsotropicHost(Host):
    """A family with `patch_embed`, prefix tokens and `blocks`; it says which classes are swapped for which."""

    models: ClassVar[dict[type, type]]  # timm's class -> the converted one
    blocks: ClassVar[dict[type, type]]
    attentions: ClassVar[dict[type, type]]

    def accepts(self, model: nn.Module) -> bool:
        return type(model) in self.models or isinstance(model, tuple(self.models.values()))

    def convert(self, model: nn.Module) -> None:
        if isinstance(model, IsotropicMixin):
            return
        for index, block in enumerate(model.blocks):
            attentions = [attention_of(layer) for layer in self.layers_of(block)]
            if type(block) not in self.blocks or any(type(attn) not in self.attentions for attn in attentions):
                raise ValueError(
                    f"blocks.{index} is a {type(block).__name__} with {type(attentions[0]).__name__}; "
                    f"only timm's {' or '.join(cls.__name__ for cls in self.blocks)} with "
                    f"{' or '.join(cls.__name__ for cls in self.attentions)} takes encodings"
                )
        model.pos_embed_input, model.pos_embed_shared = nn.ModuleList(), nn.ModuleList()
        if getattr(model, "pos_embed", None) is None:
            model.pos_embed = None
        else:
            model.pos_embed_input.append(self.adopt_table(model))
        for layer in self.layers(model):
            attn = attention_of(layer)
            attn.__class__, attn.encodings = self.attentions[type(attn)], nn.ModuleList()
            attn.shared = (model.pos_embed_shared,)  # a tuple, so that it is no child: it is the model's
            layer.mixers = nn.ModuleList()
        for block in model.blocks:
            block.__class__ = self.blocks.get(type(block), type(block))  # of one that is attention: it has it already
        if type(model.blocks) is nn.Sequential:
            model.blocks.__class__ = BlockSequence
        self.adopt_native_positions(model)
        model.__class__ = self.models[type(model)]

    def layers_of(self, block: nn.Module) -> list[nn.Module]:
        """Return what of a block has one attention layer, and mixers: the block, unless it has several layers."""
        return [block]

    def layers(self, model: nn.Module) -> list[nn.Module]:
        """Return what of a model has one attention layer, and mixers, in order: its blocks, or parts of them."""
        return [layer for block in model.blocks for layer in self.layers_of(block)]

    def heads(self, attn: nn.Module) -> tuple[int, int]:
        """Return how many attention maps a layer has, and the channels of a query in each."""
        return attn.num_heads, attn.proj.in_features // attn.num_heads

    def adopt_table(self, model: nn.Module) -> PositionEncoding:
        """Return the encoding that the model's own `pos_embed` is."""
        facts = self.input_facts(model)
        options = {"feat_shape": facts.feat_shape, "num_prefix_tokens": facts.num_prefix_tokens}
        return adopt_parameters(model, Learned, dim=facts.dim, **options)

    @abstractmethod
    def adopt_native_positions(self, model: nn.Module) -> None:
        """Make encodings of what timm's attention has of its own: the rest of `convert`."""

    def grid_size(self, model: nn.Module) -> tuple[int, int]:
        """Return the grid (H, W) of the model's own pictures."""
        return tuple(model.patch_embed.grid_size)

    def num_prefix_tokens(self, model: nn.Module) -> int:
        """Return how many tokens stand before the patches where the blocks see them."""
        return model.num_prefix_tokens

    def input_facts(self, model: nn.Module) -> LayerFacts:
        rows = 0 if getattr(model, "no_embed_class", False) else self.num_prefix_tokens(model)  # of a learned table
        return LayerFacts(dim=model.embed_dim, feat_shape=self.grid_size(model), num_prefix_tokens=rows)

    def layer_facts(self, model: nn.Module) -> list[LayerFacts]:
        heads = [self.heads(attention_of(layer)) for layer in self.layers(model)]
        shape, prefix = self.grid_size(model), self.num_prefix_tokens(model)
        common = {"dim": model.embed_dim, "feat_shape": shape, "num_prefix_tokens": prefix, "depth": len(heads)}
        return [LayerFacts(**common, num_heads=n, head_dim=d, layer=i) for i, (n, d) in enumerate(heads)]

    def mixing_layers(self, model: nn.Module) -> list[int]:
        return [0]

    def encodings(self, model: nn.Module):
        shared = list(model.pos_embed_shared)
        layers = [[*shared, *attention_of(layer).encodings, *layer.mixers] for layer in self.layers(model)]
        return list(model.pos_embed_input), layers

    def install(self, model: nn.Module, inputs, layers) -> None:
        several = len(layers) > 1
        shared = [
            encoding
            for encoding in layers[0]
            if all(encoding in layer for layer in layers)
            and (several or encoding in model.pos_embed_shared or not has_parameters(encoding))
        ]
        own = [[encoding for encoding in layer if encoding not in shared] for layer in layers]
        replace_encodings(
            (model.pos_embed_input, inputs),
            (model.pos_embed_shared, shared),
            *(place for layer, new in zip(self.layers(model), own, strict=True) for place in layer_lists(layer, new)),
        )
        self.bind_native(model)

    def bind_native(self, model: nn.Module) -> None:
        """Put parameters that timm and its checkpoints have under names of their own there."""
        bind_first(model.pos_embed_input, Learned, model)
