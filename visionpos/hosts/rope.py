"""timm's `rope` of all layers as encodings, for the families that have one: EVA and NaFlexVit.

timm drops every checkpoint key that contains "rope", but `rope.freqs`: no parameter here has it in its path.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from timm.layers import RotaryEmbeddingCat, RotaryEmbeddingDinoV3, RotaryEmbeddingMixed
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
from .host import attention_of, first
from .isotropic import IsotropicHost
from .parameters import OfLayer, adopt_parameters, bind_parameters


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


class RopeHost(IsotropicHost):
    """A family with a rope. `rope.freqs` of a mixed one keeps its name, every other rope has no parameters.

    A converted rope differs from timm's by rounding alone, about 1e-6: angles are computed in float64 here.
    """

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
