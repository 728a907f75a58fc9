"""timm's VisionTransformer and distilled DeiT as hosts."""

from __future__ import annotations

import torch
from timm.layers import PatchDropout
from timm.layers.patch_dropout import patch_dropout_forward
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import Attention as TimmAttention
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..attention import Attention, PositionState
from ..augment import CoordinateAugmentation
from ..encoding import PositionEncoding
from ..input.learned import Learned
from ..positions import Positions
from .host import Facts, Host, mixes_tokens, register_host


class EncodedBlock(Block):
    """A block that passes the positions on explicitly, so that a checkpointed recomputation sees the same ones."""

    grad_checkpointing = False

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """As timm's; `attn_mask` is the caller's own mask."""
        context = self.position_state.context(attn_mask)
        if self.grad_checkpointing and torch.is_grad_enabled():
            x = checkpoint(super().forward, x, context, is_causal, use_reentrant=False)
        else:
            x = super().forward(x, context, is_causal)
        for encoding in self.mixers:
            x = encoding(x, context.positions)
        return x


class EncodedPatchDropout(PatchDropout):
    """Patch dropout that tells the model which patches are left."""

    def forward(self, x: Tensor) -> Tensor:
        """x (B, prefix + N, C) -> (B, prefix + K, C)."""
        x, index = patch_dropout_forward(x, self.prob, self.num_prefix_tokens, self.ordered, self.training)
        if index is not None:
            self.position_state.keep(index)
        return x


class EncodedViTMixin:
    """What a converted VisionTransformer does differently: where positions enter, and nothing else."""

    coordinate_augmentation: CoordinateAugmentation | None = None  # applied while training

    def feat_shape(self, x: Tensor) -> tuple[int, int]:
        """The patch grid of patch_embed's output: (B, H, W, C) with dynamic_img_size, else (B, N, C)."""
        return tuple(x.shape[1:3]) if self.dynamic_img_size else tuple(self.patch_embed.grid_size)

    def _pos_embed(self, x: Tensor) -> Tensor:
        feat_shape = self.feat_shape(x)
        prefix = [getattr(self, name, None) for name in ("cls_token", "dist_token", "reg_token")]
        prefix = [token.expand(x.shape[0], -1, -1) for token in prefix if token is not None]
        x = x.reshape(x.shape[0], -1, x.shape[-1])
        if prefix or not len(self.pos_embed_input):  # as timm copies or does not, which decides the memory layout
            x = torch.cat([*prefix, x], dim=1)
        positions = Positions.grid(feat_shape, self.num_prefix_tokens, device=x.device)
        if self.training and self.coordinate_augmentation is not None:
            positions = self.coordinate_augmentation(positions)
        self.position_state.enter(positions, self.pos_embed_shared)
        for encoding in self.pos_embed_input:
            x = encoding(x, positions)
        return self.pos_drop(x) if len(self.pos_embed_input) else x

    def forward_features(self, *args, **kwargs) -> Tensor:
        """As timm's; the positions are forgotten afterwards."""
        out = super().forward_features(*args, **kwargs)
        self.position_state.clear()
        return out

    def forward_intermediates(self, *args, **kwargs):
        """As timm's; the positions are forgotten afterwards."""
        out = super().forward_intermediates(*args, **kwargs)
        self.position_state.clear()
        return out

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """As timm's, block by block."""
        super().set_grad_checkpointing(enable)
        self.grad_checkpointing = False  # timm's own loop would lose the positions
        for block in self.blocks:
            block.grad_checkpointing = enable

    def set_input_size(self, img_size=None, patch_size=None) -> None:
        """As timm's; learned tables are resized, formulas interpolate their coordinates."""
        table, self.pos_embed = self.pos_embed, None  # ours to resize
        super().set_input_size(img_size=img_size, patch_size=patch_size)
        self.pos_embed = table
        inputs, layers = HOST.encodings(self)
        for encoding in {*inputs, *(encoding for layer in layers for encoding in layer)}:
            encoding.set_feat_shape(tuple(self.patch_embed.grid_size))

    def no_weight_decay(self) -> set[str]:
        """timm's names and every parameter of an encoding."""
        return super().no_weight_decay() | encoding_parameters(self)


class EncodedVisionTransformer(EncodedViTMixin, VisionTransformer):
    """A converted VisionTransformer."""


class EncodedVisionTransformerDistilled(EncodedViTMixin, VisionTransformerDistilled):
    """A converted distilled DeiT."""


CLASSES = {
    VisionTransformer: EncodedVisionTransformer,
    VisionTransformerDistilled: EncodedVisionTransformerDistilled,
}


def encoding_parameters(model: nn.Module) -> set[str]:
    """Full names of the parameters that live in encodings and want no weight decay."""
    return {
        f"{path}.{name}"
        for path, module in model.named_modules()
        if isinstance(module, PositionEncoding)
        for name in module.no_weight_decay()
    }


class ViTHost(Host):
    """VisionTransformer and DeiT; input encodings after the class token, others in every block's attention."""

    name = "VisionTransformer (ViT, DeiT)"

    def accepts(self, model: nn.Module) -> bool:
        return type(model) in CLASSES or isinstance(model, EncodedViTMixin)

    def prepare(self, model: VisionTransformer) -> None:
        if isinstance(model, EncodedViTMixin):
            return
        for index, block in enumerate(model.blocks):
            if type(block) is not Block or type(block.attn) is not TimmAttention:
                raise ValueError(
                    f"blocks.{index} is a {type(block).__name__} with {type(getattr(block, 'attn', None)).__name__}; "
                    "only timm's Block with its Attention takes encodings"
                )
        inputs = []
        if model.pos_embed is not None:
            with torch.device("meta"):
                learned = Learned(**self.input_facts(model))
            learned.live_in(model)
            inputs.append(learned)
        state = PositionState()
        model.__class__ = CLASSES[type(model)]
        model.position_state = state
        model.pos_embed_input = nn.ModuleList(inputs)
        model.pos_embed_shared = nn.ModuleList()
        checkpointing, model.grad_checkpointing = model.grad_checkpointing, False
        for block in model.blocks:
            block.__class__, block.attn.__class__ = EncodedBlock, Attention
            block.position_state = state
            block.grad_checkpointing = checkpointing
            block.attn.encodings, block.mixers = nn.ModuleList(), nn.ModuleList()
        if isinstance(model.patch_drop, PatchDropout):
            model.patch_drop.__class__ = EncodedPatchDropout
            model.patch_drop.position_state = state

    def input_facts(self, model: VisionTransformer) -> Facts:
        return {
            "dim": model.embed_dim,
            "feat_shape": tuple(model.patch_embed.grid_size),
            "num_prefix_tokens": 0 if model.no_embed_class else model.num_prefix_tokens,  # rows of a learned table
        }

    def layer_facts(self, model: VisionTransformer) -> list[Facts]:
        depth = len(model.blocks)
        shape = {"feat_shape": tuple(model.patch_embed.grid_size), "num_prefix_tokens": model.num_prefix_tokens}
        return [
            {
                **shape,
                "dim": model.embed_dim,
                "num_heads": block.attn.num_heads,
                "head_dim": block.attn.head_dim,
                "layer": index,
                "depth": depth,
            }
            for index, block in enumerate(model.blocks)
        ]

    def mixing_layers(self, model: VisionTransformer) -> list[int]:
        return [0]

    def encodings(self, model: VisionTransformer):
        shared = list(model.pos_embed_shared)
        layers = [[*shared, *block.attn.encodings, *block.mixers] for block in model.blocks]
        return list(model.pos_embed_input), layers

    def install(self, model: VisionTransformer, inputs, layers) -> None:
        for encoding in model.pos_embed_input:
            encoding.move_out()
        model.pos_embed = None
        model.pos_embed_input = nn.ModuleList(inputs)
        for encoding in inputs:
            if isinstance(encoding, Learned) and model.pos_embed is None:
                encoding.live_in(model)  # where timm and its checkpoints have the table
        shared = [
            encoding
            for encoding in layers[0]
            if all(encoding in layer for layer in layers) and (encoding.shared or len(layers) > 1)
        ]
        model.pos_embed_shared = nn.ModuleList(shared)
        for block, encodings in zip(model.blocks, layers, strict=True):
            own = [encoding for encoding in encodings if encoding not in shared]
            block.mixers = nn.ModuleList(encoding for encoding in own if mixes_tokens(encoding))
            block.attn.encodings = nn.ModuleList(encoding for encoding in own if not mixes_tokens(encoding))


HOST = register_host(ViTHost())
