"""Axial RoPE: "Rotary Position Embedding for Vision Transformer" (Heo et al. 2024, arXiv 2403.13298); its dialects."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..frequencies import require_multiple, to_float64
from ..options import Count, Natural, Positive
from ..positions import Positions
from ..registry import register_encoding
from ..rotation import AxialLayout
from .dialects import DIALECTS, Dialect, Preset, axial_angles, axial_frequencies, scale_axial
from .scaling import FrequencyRotary


@register_encoding("rope_axial")
class RopeAxial(FrequencyRotary):
    """Half of the pairs turn with the column, half with the row.

    angles = [x theta | y theta], theta_k = temperature ** (-4k / head_dim), k < head_dim / 4, in units of one grid
    step. q . k depends on the offset (dy, dx) alone. On three axes, (t, y, x), each has a third of the pairs, x first,
    theta_k = temperature ** (-6k / head_dim); on one it has all. Presets do likewise, in the order x, y, t or t, y, x.
    The layout "half_per_axis" and learned frequencies are for two axes.

    Presets, which released encoders have; the temperature and the layout of each can be changed:
        rope_vit: as above; 100, "interleaved" (Heo et al. 2024).
        moonvit: x and y in turn, [x theta_0, y theta_0, x theta_1, ...]; 10000, "interleaved" (Kimi-VL).
        pixtral: one series phi_i = temperature ** (-2i / head_dim) for both axes, [y phi_0, y phi_2, ... | x phi_1,
            x phi_3, ...]; 10000, "half".
        qwen_vit: [y theta | x theta]; 10000, "half" (Qwen2-VL, and DeepSeek-V4's vision tower).
        gemma4: as above; 100, "half_per_axis".
        mrope: interleaved M-RoPE, [t phi_0, y phi_1, x phi_2, t phi_3, ...]: every third pair turns with the time of
            a video, and stands still in a picture; 10000, "half" (Qwen3-VL, GenLIP).

    Args:
        num_heads: attention heads.
        head_dim: channels of a head, a multiple of 4, and on three axes of 6.
        temperature: of the frequencies. None: the preset's; rope_vit has 50 in its Swin.
        layout: "interleaved", "half" or "half_per_axis". None: the preset's.
        preset: which pairs turn with which axis, and how fast.
        sections: (t, y, x) of mrope, as its configurations say it: of the pairs of y and of x so many turn with them,
            the first ones, and the others with the time, at their own frequencies. None: all turn with their own axis.
        learn_frequencies: theta is learned as its logarithm, "shared" by the heads or "per_head"; the directions stay
            on the axes. At the start it is the formula's.
        scaling: of the frequencies on a larger grid, see `visionpos.rotary.scaling.FrequencyRotary`. NTK and YaRN need
            those of a formula, and not those of mrope, a part of which never turns.

    Attributes:
        log_frequencies: Parameter (heads or 1, head_dim / 4, 2), ln theta of each axis, if frequencies are learned, or
            None. Float32 even in a model of less, and without weight decay.

    Raises:
        ValueError: a `head_dim` that is not a multiple of 4, sections without mrope, frequencies to learn with it, or a
            scaling that either cannot have.

    Example:
        >>> rope = vp.create_encoding("rope_axial", num_heads=1, head_dim=8, preset="moonvit")
        >>> rope.layout, rope.angles(vp.Positions.grid((2, 3)))[0, 5]  # of the token (y, x) = (1, 2)
        ('interleaved', tensor([2.0000, 1.0000, 0.0200, 0.0100]))
    """

    paper = "Heo et al. 2024, arXiv 2403.13298"
    translation_invariant = True
    axes = None
    num_series = "axes"
    extrapolation = "run_on"  # raw grid steps at every size, as in the authors' code

    def __init__(
        self,
        num_heads: Count,
        head_dim: Count,
        temperature: Positive | None = None,
        layout: AxialLayout | None = None,
        preset: Preset = "rope_vit",
        sections: tuple[Natural, Natural, Natural] | None = None,
        learn_frequencies: Literal["shared", "per_head"] | None = None,
        **grid_options,
    ):
        layout = layout or DIALECTS[preset].layout
        if learn_frequencies or layout == "half_per_axis":
            self.axes = 2
        super().__init__(num_heads, head_dim, layout, **grid_options)
        require_multiple("head_dim", head_dim, 4, "pairs of channels for each of two axes")
        self.preset, self.sections = preset, None if sections is None else tuple(sections)
        self.temperature = self.dialect.temperature if temperature is None else temperature
        self.num_series = 1 if self.dialect.in_turn else "axes"
        if sections is not None and preset != "mrope":
            raise ValueError(f"sections belong to preset 'mrope', got {sections} with {preset!r}")
        if learn_frequencies and preset == "mrope":
            raise ValueError("learn_frequencies must be None with preset 'mrope', a part of whose pairs never turns")
        self.learn_frequencies, self.log_frequencies = learn_frequencies, None
        if learn_frequencies:
            rows = num_heads if learn_frequencies == "per_head" else 1
            self.learnable = True
            self.log_frequencies = nn.Parameter(torch.empty(rows, head_dim // 4, 2))
            self.reset_parameters()
        self.check_scaling()

    def check_scaling(self) -> None:
        """Check that frequencies which are no geometric series are only divided.

        Raises:
            ValueError: another scaling than "linear" of learned frequencies, or of mrope.
        """
        if (self.learn_frequencies or self.preset == "mrope") and self.scales and self.settings["type"] != "linear":
            accepted = "'interpolate', 'run_on' or 'linear' with learned frequencies and with preset 'mrope'"
            raise ValueError(f"{self.name}: scaling must be {accepted}, got {self.scaling!r}")

    @property
    def dialect(self) -> Dialect:
        """Return the preset as a record."""
        return DIALECTS[self.preset]

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Set learned frequencies to those of the formula."""
        if self.log_frequencies is not None:
            self.log_frequencies.copy_(axial_frequencies(self.num_angles, self.temperature, self.dialect).log())

    def frequencies(self, count: int = 2, device=None) -> Tensor:
        """Return theta of each of `count` axes in float64, (head_dim / 4, 2), if it is learned with heads in front."""
        if self.log_frequencies is not None:
            return to_float64(self.log_frequencies).exp()
        return axial_frequencies(self.num_angles, self.temperature, self.dialect, count, device)

    def encode(self, positions: Positions) -> Tensor:
        self.check_scaling()
        coords = positions.coords
        theta = self.frequencies(len(positions.feat_shape), coords.device)
        theta = scale_axial(self, theta, positions, self.dialect)
        if self.sections is None:
            return axial_angles(coords, theta, self.num_angles, self.dialect)
        rounds = torch.arange(len(theta), device=theta.device)
        own = torch.stack([rounds < n for n in self.sections], dim=-1)  # (rounds, axes); the others turn with the time
        coords = F.pad(coords, (3 - coords.shape[-1], 0))  # (t, y, x)
        parts = (coords, own), (coords[..., :1].expand_as(coords), ~own)
        return sum(axial_angles(part, theta * turning, self.num_angles, self.dialect) for part, turning in parts)

    def _apply(self, fn, recurse=True):
        """Leave learned logarithms in float32, or better, where the model becomes narrower."""

        def convert(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype.itemsize >= 4 else tensor.to(moved.device)

        return super()._apply(fn if self.log_frequencies is None else convert, recurse)
