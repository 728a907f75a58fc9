"""Measurement of all properties of one encoding: `measure("rope_axial")` -> {"stationarity": 7e-15, ...}."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import registry
from ..encoding import PositionEncoding
from ..positions import Positions
from . import kernel as kernels
from . import properties
from .kernel import NotDefined


class Case:
    """One encoding on its grids, with what several properties need, each computed once, in float64."""

    def __init__(self, encoding: PositionEncoding, grid: tuple[int, ...], test_grid: tuple[int, ...]):
        self.original, self.encoding = encoding, kernels.exact(encoding)
        self.grid, self.test_grid = tuple(grid), tuple(test_grid)
        self.positions, self.test_positions = kernels.exact_grid(self.grid), kernels.exact_grid(self.test_grid)

    @cached_property
    def kernel(self) -> Tensor:
        """Return K (heads, N, N) on the training grid."""
        return kernels.logit_kernel(self.encoding, self.positions)

    @cached_property
    def profile(self) -> tuple[Tensor, Tensor]:
        """Return distances and k(r) on the training grid."""
        return properties.distance_profile(self.kernel, self.positions)

    @cached_property
    def rotations(self) -> Tensor:
        """Return the rotations (heads, N, D, D) on the training grid."""
        return kernels.rotations(self.encoding, self.positions)

    @cached_property
    def phases(self) -> Tensor:
        """Return the share of the circle that each rotary band covers on the training grid."""
        frequencies = kernels.phase_frequencies(self.encoding, self.positions)
        return properties.phase_coverage(frequencies, self.grid)

    @cached_property
    def test_values(self) -> Tensor:
        """Return what the encoding computes on the test grid; rotations on a sample of it."""
        return kernels.values(self.encoding, self.sample(self.test_positions))

    def sample(self, positions: Positions) -> Positions:
        """Return 64 tokens where each has a whole matrix, else all."""
        if self.encoding.place != "rotary":
            return positions
        return positions.keep(torch.linspace(0, positions.num_patches - 1, 64).long())

    def only(self, *places: str) -> None:
        """Raise NotDefined for an encoding of another place."""
        if self.encoding.place not in places:
            raise NotDefined(f"only for the place {' or '.join(places)}")

    def offset(self, columns: int) -> tuple[int, ...]:
        """Return an offset of so many tokens to the right, at least one."""
        return (*[0] * (len(self.grid) - 1), max(1, columns))


def sup_norm(case: Case) -> float:
    """Return the sup norm of embeddings, biases and what is mixed in; a rotation has none of interest."""
    case.only("input", "bias", "conditional")
    return properties.sup_norm(case.test_values)


def norm_drift(case: Case) -> float:
    """Return the norm drift of vectors that are added."""
    case.only("input", "conditional")
    return properties.norm_drift(case.test_values[0])


def growth(case: Case) -> float:
    """Return the growth exponent of the bias."""
    case.only("bias")
    return properties.growth_exponent(*case.profile)


def hidden_share(case: Case) -> float:
    """Return the share of the pairs of tokens that a bias hides from each other."""
    case.only("bias")
    return (~case.kernel.isfinite()).double().mean().item()


def linear_map(case: Case) -> float:
    """Return the residual of vectors at a quarter of a row, or of rotations at random offsets."""
    if case.encoding.place == "rotary":
        return properties.rotation_map_residual(case.rotations, case.positions)
    features = kernels.vectors(case.encoding, case.positions)[0]
    return properties.linear_map_residual(features, case.positions, case.offset(case.grid[-1] // 4))


def translation(case: Case, shift: tuple[int, ...]) -> float:
    """Return how far logits differ with the same content on two windows of the grid that lie `shift` apart."""
    index = torch.arange(case.positions.num_patches).view(case.grid)
    first = index[tuple(slice(0, size - step) for size, step in zip(case.grid, shift, strict=True))].flatten()
    if not len(first):
        raise NotDefined(f"a grid of {case.grid} is too small for a shift by {shift}")
    windows = [case.positions.keep(tokens) for tokens in (first, first + int(index[shift]))]
    errors = []
    for seed in range(8 if case.encoding.place == "input" else 1):  # with an embedding, the projections decide much
        logits = [properties.bounded(kernels.attention_logits(case.encoding, window, seed)) for window in windows]
        errors.append(properties.equivariance_error(*logits))
    return sum(errors) / len(errors)


def support(case: Case) -> tuple[float, float]:
    """Return the share of a test grid's pairs, and of its offsets, whose offset lies in the trained range; 0 to 1.

    Offsets are those that the encoding gets: interpolated, all of them lie there.
    """
    if case.encoding.extrapolation in ("formula", "resize") and not case.encoding.runs_on:
        raise NotDefined("whatever the grid, its coordinates are those of a frame of its own")
    grids = (case.positions, case.test_positions)
    trained, ends = (case.encoding.locate(positions).coords.amax(0).tolist() for positions in grids)
    inside = [  # cells of the test grid that lie between the ends of the trained one
        1 + math.floor(reach * (m - 1) / end + 1e-6) if end else m
        for reach, m, end in zip(trained, case.test_grid, ends, strict=True)
    ]
    return properties.support_ratio(tuple(inside), case.test_grid)


def drift(case: Case) -> float:
    """Return the drift of K as the corner token of the test grid sees it, which has all unseen offsets.

    It is compared with K on the training grid.
    """
    row = kernels.logit_kernel(case.encoding, case.test_positions, torch.tensor([0]))
    return properties.output_drift(case.kernel, row)


def entropy_drift(case: Case) -> float:
    """Return the entropy of attention without content on the test grid minus that on the training grid, in nats."""
    if case.encoding.place in ("input", "conditional"):
        raise NotDefined("its logits need the projections of a trained model")
    entropies = []
    for positions in (case.positions, case.test_positions):
        if case.encoding.place == "bias":
            zero = kernels.content(case.encoding, positions, scale=0.0)
            logits = kernels.bias(case.encoding, positions, zero)
        else:  # a rotated zero is zero
            logits = positions.coords.new_zeros(1, positions.num_patches, positions.num_patches)
        entropies.append(properties.attention_entropy(logits))
    return entropies[1] - entropies[0]


def resolution_error(case: Case) -> float:
    """Return max |K - K_train| / max |K_train|, K of every other token of a grid twice as dense.

    Its coordinates are those of the training grid.
    """
    case.only("input", "rotary", "bias")
    dense, encoding = tuple(2 * size - 1 for size in case.grid), copy.deepcopy(case.encoding)
    if encoding.extrapolation != "resize":
        encoding.reference_shape, encoding.extrapolate = case.grid, False
    index = torch.arange(math.prod(dense)).view(dense)[tuple(slice(0, None, 2) for _ in dense)].flatten()
    sampled = kernels.logit_kernel(encoding, kernels.exact_grid(dense).keep(index))
    return properties.relative_error(sampled, case.kernel)


def uniqueness(case: Case) -> float:
    """Return the uniqueness of vectors, rotations or rows of a bias, on the training grid."""
    values = kernels.values(case.encoding, case.positions)
    return properties.uniqueness(properties.bounded(values) if case.encoding.place == "bias" else values)


def rounding_error(case: Case, dtype: torch.dtype) -> float:
    """Return max |value - exact| / max |exact| on the test grid, with state of a dtype and float32 coordinates."""
    stored = copy.deepcopy(case.original).cpu().to(dtype)
    low = kernels.values(stored, case.sample(Positions.grid(case.test_grid)))
    return properties.relative_error(low, case.test_values)


def rank(case: Case) -> float:
    """Return the numerical rank of a bias."""
    case.only("bias")
    return properties.numerical_rank(case.kernel)


class Property(NamedTuple):
    """One row of the tables: a label, what computes it, and for which places."""

    label: str
    definition: Callable  # its docstring says what the number is, in which range
    compute: Callable[[Case], float]


_p = properties
PROPERTIES: dict[str, Property] = {  # tables have this order
    "sup_norm": Property("largest value, test grid", _p.sup_norm, sup_norm),
    "norm_drift": Property("norm drift, test grid", _p.norm_drift, norm_drift),
    "orthogonality_error": Property(
        "rotation: error of R^T R = I", _p.orthogonality_error, lambda c: _p.orthogonality_error(c.rotations)
    ),
    "growth_exponent": Property("bias: growth exponent", _p.growth_exponent, growth),
    "hidden_share": Property("bias: share of hidden pairs", hidden_share, hidden_share),
    "linear_map": Property("offset as a linear map: residual", _p.linear_map_residual, linear_map),
    "stationarity": Property("Toeplitz residual", _p.stationarity, lambda c: _p.stationarity(c.kernel, c.positions)),
    "spearman": Property("decay: Spearman with distance", _p.spearman, lambda c: _p.spearman(c.kernel, c.positions)),
    "rising_share": Property("decay: share of rising steps", _p.rising_share, lambda c: _p.rising_share(c.profile[1])),
    "rebound": Property("decay: largest rebound", _p.rebound, lambda c: _p.rebound(c.profile[1])),
    "half_radius": Property("decay: half radius, grid steps", _p.half_radius, lambda c: _p.half_radius(*c.profile)),
    "anisotropy": Property("anisotropy", _p.anisotropy, lambda c: _p.anisotropy(c.kernel, c.positions)),
    "directionality": Property("directionality", _p.directionality, lambda c: _p.directionality(c.kernel)),
    "translation_step": Property(
        "translation error, one step", _p.equivariance_error, lambda c: translation(c, c.offset(1))
    ),
    "translation_half": Property(
        "translation error, half a row", _p.equivariance_error, lambda c: translation(c, c.offset(c.grid[-1] // 2))
    ),
    "support_pairs": Property("test pairs with a trained offset", support, lambda c: support(c)[0]),
    "support_offsets": Property("test offsets trained", support, lambda c: support(c)[1]),
    "phases_covered": Property(
        "rotary bands with all phases trained", _p.phase_coverage, lambda c: (c.phases >= 1).double().mean().item()
    ),
    "phase_coverage": Property("mean phase coverage", _p.phase_coverage, lambda c: c.phases.mean().item()),
    "output_drift": Property("largest z-score, test grid", _p.output_drift, drift),
    "entropy_drift": Property("entropy, test minus training, nats", entropy_drift, entropy_drift),
    "resolution_error": Property("error at twice the density", resolution_error, resolution_error),
    "uniqueness": Property("smallest difference of two tokens", _p.uniqueness, uniqueness),
    "error_float32": Property("error in float32", rounding_error, lambda c: rounding_error(c, torch.float32)),
    "error_bfloat16": Property(
        "error with bfloat16 state", rounding_error, lambda c: rounding_error(c, torch.bfloat16)
    ),
    "rank": Property("bias: rank at max error 0.01", _p.numerical_rank, rank),
}
ON_TEST_GRID = ("sup_norm", "norm_drift", "support_pairs", "support_offsets", "output_drift", "entropy_drift",
                "error_float32", "error_bfloat16")  # fmt: skip


def measure(
    encoding: str | PositionEncoding,
    grid: tuple[int, int] = (14, 14),
    test_grid: tuple[int, int] = (28, 28),
    only: Iterable[str] = PROPERTIES,
    **options: Any,
) -> dict[str, float | NotDefined]:
    """Return the properties of an encoding on the grid it is trained on, and of what a model has on a test grid.

    What happens there is the encoding's `extrapolation`; the option `extrapolate` asks for another way.

    Args:
        encoding: a registered name, built as a ViT-Tiny has it, freshly initialised; or an encoding, for `grid`.
        grid: (H, W) while training.
        test_grid: (H, W) while testing.
        only: keys of `PROPERTIES`, by default all.
        options: of the encoding, if it is a name.

    Returns:
        The number of each key, or the `NotDefined` that says why there is none.

    Raises:
        ValueError: an unknown name, option or key.
    """
    if isinstance(encoding, str):
        encoding = kernels.build(encoding, grid, **options)
    elif options:
        raise ValueError(f"options ({', '.join(options)}) go with a name, not with an encoding that is built already")
    case = Case(encoding, grid, test_grid)
    return {key: _value(key, case) for key in only}


def measure_running_on(
    name: str, grid: tuple[int, int] = (14, 14), test_grid: tuple[int, int] = (28, 28), **options: Any
) -> dict[str, float | NotDefined]:
    """Return what `measure` finds on the test grid if coordinates run on; nothing where that cannot be asked for."""
    if "extrapolate" not in registry.encoding_info(name)["options"]:
        return {}
    return measure(name, grid, test_grid, ON_TEST_GRID, **{**options, "extrapolate": True})


def _value(key: str, case: Case) -> float | NotDefined:
    if key not in PROPERTIES:
        raise ValueError(f"unknown property {key!r}{registry.hint(key, PROPERTIES)} Valid: {', '.join(PROPERTIES)}")
    if case.encoding.place == "none":
        return NotDefined("it encodes nothing")
    if case.encoding.extrapolation == "error" and key in (*ON_TEST_GRID, "resolution_error"):
        return NotDefined("it knows no other grid")
    try:
        return PROPERTIES[key].compute(case)
    except NotDefined as reason:
        return reason
