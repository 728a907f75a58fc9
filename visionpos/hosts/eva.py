"""timm's Eva as host: EVA-02, DINOv3, the rope ViTs, Perception Encoder; their own rope becomes an encoding.

timm drops every checkpoint key that contains "rope", but `rope.freqs`: no parameter here has it in its path.
"""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

import torch
from timm.layers import (
    AttentionRope,
    RotaryEmbeddingCat,
    RotaryEmbeddingDinoV3,
    RotaryEmbeddingMixed,
    register_notrace_module,
)
from timm.models.eva import Eva, EvaAttention, EvaBlock, EvaBlockPostNorm
from torch import Tensor, nn

from ..augment import CoordinateAugmentation
from ..encoding import LayerFacts
from ..frequencies import flat_index
from ..places import RotaryEncoding
from ..positions import Positions
from ..rotary.rope_axial import RopeAxial
from ..rotary.rope_dinov3 import RopeDinoV3
from ..rotary.rope_eva import RopeEva
from ..rotary.rope_mixed import RopeMixed
from ..rotation import Layout, mixed_angles
from .attention import AttentionContext, caller_masks, math_is_faster, prepare_encodings, self_attention, split_heads
from .host import attention_of, first, register_host
from .isotropic import IsotropicHost, IsotropicMixin, keep_tokens, mix
from .parameters import OfLayer, adopt_parameters, bind_parameters
from .projections import into_heads, project


class RopeOfHost(RotaryEncoding):
    """A rope of timm's that is no encoding here, kept as the host's own: an offset or another order of the axes.

    Between the cells of the grid the nearest one is read.

    Args:
        host: timm's module; its tables, augmentation included, are used.
    """

    name = "RotaryEmbedding"
    extrapolation = "formula"
    continuous = False

    def __init__(self, host: nn.Module, num_heads: int, head_dim: int, layout: Layout):
        super().__init__(num_heads, head_dim, layout)
        self.host = host

    def set_feat_shape(self, feat_shape: tuple[int, int]) -> None:
        if hasattr(self.host, "update_feat_shape"):  # the others compute every grid anew
            self.host.update_feat_shape(feat_shape)

    def encode(self, positions: Positions) -> Tensor:
        fixed = getattr(self.host, "feat_shape", None) is not None
        sin, cos = self.host.get_embed(shape=None if fixed else positions.feat_shape).chunk(2, dim=-1)
        once = slice(None, None, 2) if self.layout == "interleaved" else slice(self.head_dim // 2)
        angles = torch.atan2(sin[:, once], cos[:, once])  # (H W, head_dim / 2)
        axes = zip(positions.coords.round().unbind(-1), positions.feat_shape, strict=True)
        cells = torch.stack([axis.clamp(0, size - 1) for axis, size in axes], dim=-1)
        return angles[flat_index(cells, positions.feat_shape).long()].unsqueeze(-3)


class RopeMixedYX(RopeMixed):
    """A mixed rope as timm has it with `rope_grid_indexing="ij"`: row 0 of the frequencies multiplies y, row 1 x."""

    name = "RotaryEmbeddingMixed"

    def encode(self, positions: Positions) -> Tensor:
        return mixed_angles(self.shrink(positions).flip(-1), self.freqs)


class Frequencies(nn.Module):
    """Owner of `rope.freqs`, (2, depth, heads, head_dim / 2): the frequencies of all layers, as timm stores them."""

    def __init__(self, freqs: nn.Parameter):
        super().__init__()
        self.freqs = freqs

    def no_weight_decay(self) -> set[str]:
        """Return the names of the parameters that weight decay must not touch, as timm's module does."""
        return {"freqs"}

    def update_feat_shape(self, feat_shape: tuple[int, int]) -> None:
        """Do nothing: frequencies are the same on every grid. timm calls this when the input size changes."""


@register_notrace_module
class EncodedEvaAttention(EvaAttention):
    """Self-attention of EVA with encodings, on tokens x (B, prefix + N, C)."""

    def forward(self, x: Tensor, rope: AttentionContext | None = None, attn_mask=None, is_causal: bool = False):
        """Return tokens (B, prefix + N, C).

        `rope`, timm's way from the model to its attention layers, carries the context here.
        """
        prepared = prepare_encodings(self, rope)
        if attn_mask is None:
            attn_mask, is_causal = caller_masks(rope, is_causal)
        if not prepared and not math_is_faster(x):
            return super().forward(x, None, attn_mask, is_causal)
        if self.qkv is not None:
            parts = split_heads(self, project(self, x), prepared)
        else:
            q, k, v = into_heads(
                self.proj.in_features // self.num_heads, self.q_proj(x), self.k_proj(x), self.v_proj(x)
            )
            parts = self.q_norm(q), self.k_norm(k), v, prepared
        return self_attention(self, x, *parts, attn_mask, is_causal)


@register_notrace_module
class EncodedAttentionRope(AttentionRope):
    """Self-attention of the rope ViTs with encodings, on tokens x (B, prefix + N, C)."""

    def forward(self, x: Tensor, rope: AttentionContext | None = None, attn_mask=None, is_causal: bool = False):
        """Return tokens (B, prefix + N, C).

        `rope`, timm's way from the model to its attention layers, carries the context here.
        """
        prepared = prepare_encodings(self, rope)
        if attn_mask is None:
            attn_mask, is_causal = caller_masks(rope, is_causal)
        if not prepared and not math_is_faster(x):
            return super().forward(x, None, attn_mask, is_causal)
        if self.q_proj is None:
            parts = split_heads(self, self.qkv(x).unflatten(-1, (3, -1, self.head_dim)), prepared)
        else:
            q, k, v = into_heads(self.head_dim, self.q_proj(x), self.k_proj(x), self.v_proj(x))
            q, k = self.q_norm(q), self.k_norm(k)
            if k.shape[1] < q.shape[1]:  # keys and values that several query heads share
                k, v = (part.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for part in (k, v))
            parts = q, k, v, prepared
        return self_attention(self, x, *parts, attn_mask, is_causal)


class EncodedEvaMixin:
    """A block after which conditional encodings may mix the tokens."""

    def forward(self, x: Tensor, rope: AttentionContext | None = None, attn_mask=None, is_causal: bool = False):
        """Return the tokens (B, prefix + N, C) after the block."""
        return mix(super().forward(x, rope, attn_mask, is_causal), self.mixers, rope)


class EncodedEvaBlock(EncodedEvaMixin, EvaBlock):
    """A block of a converted Eva."""


class EncodedEvaBlockPostNorm(EncodedEvaMixin, EvaBlockPostNorm):
    """A block of a converted Eva that normalises after its branches."""


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

    def group_matcher(self, coarse: bool = False) -> dict:
        """Return timm's groups of layers, with the frequencies of all layers in the stem."""
        matcher = super().group_matcher(coarse)
        return {**matcher, "stem": matcher["stem"] + "|rope"}


def augmentation_of_host(rope: nn.Module) -> tuple[float | None, ...]:
    """Return timm's random shift, jitter and rescaling of the rope's coordinates; None for each that is off."""
    return tuple(getattr(rope, f"{name}_coords", None) for name in ("shift", "jitter", "rescale"))


def rope_of_host(rope: nn.Module, facts: LayerFacts, layout: Layout) -> RotaryEncoding:
    """Return timm's own rope of all layers as an encoding: the same function, or timm's module where we have none."""
    order, augmented = getattr(rope, "grid_indexing", None), any(augmentation_of_host(rope))
    shape = {"num_heads": facts.num_heads, "head_dim": facts.head_dim, "layout": layout}
    trained = {"reference_shape": facts.reference_shape}
    plain = not getattr(rope, "grid_offset", 0)
    if type(rope) is RotaryEmbeddingCat and plain and not augmented:
        if order == "ij":
            extrapolate = True if rope.ref_feat_shape is None else None  # without one timm's coordinates run on
            return RopeEva(**shape, **trained, temperature=rope.temperature, extrapolate=extrapolate)
        if rope.ref_feat_shape is None:
            return RopeAxial(**shape, **trained, temperature=rope.temperature)
    if type(rope) is RotaryEmbeddingDinoV3 and plain and order == "ij":
        names = ("temperature",) if rope.min_period is None else ("min_period", "max_period")
        periods = {name: getattr(rope, name) for name in names}
        if not augmented or rope.normalize_coords == "separate":
            return RopeDinoV3(**shape, **trained, **periods, normalize=rope.normalize_coords)
    return RopeOfHost(rope, **shape)


class EvaHost(IsotropicHost):
    """The family of Eva. `rope.freqs` of a mixed rope keeps its name, every other rope has no parameters.

    A converted rope differs from timm's by rounding alone, about 1e-6: angles are computed in float64 here.
    """

    name = "Eva (EVA-02, DINOv3, rope ViT, PE)"
    models: ClassVar = {Eva: EncodedEva}
    blocks: ClassVar = {EvaBlock: EncodedEvaBlock, EvaBlockPostNorm: EncodedEvaBlockPostNorm}
    attentions: ClassVar = {EvaAttention: EncodedEvaAttention, AttentionRope: EncodedAttentionRope}

    def convert(self, model: nn.Module) -> None:
        if isinstance(model.rope, RotaryEmbeddingMixed) and any(augmentation_of_host(model.rope)):
            raise ValueError(
                "a mixed rope with rope_shift_coords, rope_jitter_coords or rope_rescale_coords cannot be "
                "converted: build the model without them and set model.coordinate_augmentation"
            )
        super().convert(model)

    def adopt_native_positions(self, model: nn.Module) -> None:
        rope, model.rope, model.rope_mixed = model.rope, None, False
        model.rope_reference_shape = getattr(rope, "ref_feat_shape", None)
        facts = self.layer_facts(model)
        if isinstance(rope, RotaryEmbeddingMixed):
            cls = RopeMixed if rope.grid_indexing == "xy" else RopeMixedYX
            model.rope = Frequencies(rope.freqs)
            for layer, block in enumerate(model.blocks):
                names = ("num_heads", "head_dim", "reference_shape")
                options = {name: getattr(facts[layer], name) for name in names}
                view = OfLayer(layer)
                rope_of_layer = adopt_parameters(model.rope, cls, view, **options, temperature=rope.temperature)
                block.attn.encodings.append(rope_of_layer)
        elif rope is not None:
            layout = "half" if model.blocks[0].attn.rotate_half else "interleaved"
            encoding = rope_of_host(rope, facts[0], layout)
            model.pos_embed_shared.append(encoding)
            if any(augmentation_of_host(rope)) and isinstance(encoding, RopeDinoV3):
                shift, jitter, rescale = augmentation_of_host(rope)
                model.coordinate_augmentation = CoordinateAugmentation(shift or 0.0, jitter or 1.0, rescale or 1.0)

    def layer_facts(self, model: nn.Module) -> list[LayerFacts]:
        """Return the facts of every layer. EVA-02's rope was trained on another grid than the model may have."""
        trained = model.rope_reference_shape
        facts = super().layer_facts(model)
        return facts if trained is None else [replace(layer, reference_shape=tuple(trained)) for layer in facts]

    def bind_native(self, model: nn.Module) -> None:
        super().bind_native(model)
        mixed = [first(attention_of(layer).encodings, RopeMixed) for layer in self.layers(model)]
        model.rope = None
        if all(mixed):
            model.rope = Frequencies(nn.Parameter(torch.stack([encoding.freqs.detach() for encoding in mixed], dim=1)))
            for layer, encoding in enumerate(mixed):
                bind_parameters(encoding, model.rope, OfLayer(layer))


HOST = register_host(EvaHost())
