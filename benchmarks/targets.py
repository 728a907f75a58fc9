"""Goals of the rows: the largest ratio that meets each, forward and forward + backward."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Target:
    """A goal for one ratio of one row; None where a pass has no goal."""

    row: str
    variant: str
    over: str
    forward: float | None
    both: float | None
    device: str = "cpu"
    dtypes: tuple[str, ...] = ("float32",)
    modes: tuple[str, ...] = ("eager",)
    of: str = "time"  # or "memory"

    def limit(self, result: dict[str, Any]) -> float | None:
        """Return the goal for a measured row, if it has one."""
        met = (self.row, self.device) == (result["row"], result["device"])
        met = met and result["dtype"] in self.dtypes and result["mode"] in self.modes
        return (self.both if result["backward"] else self.forward) if met else None


ROPES, SIZES = ("rope_axial", "rope_mixed"), ("Ti/4", "Ti/16", "S/16")
BOTH = {"dtypes": ("float32", "bf16")}
GPU = {"device": "cuda", "dtypes": ("bf16",), "modes": ("eager", "compiled")}

TARGETS = [
    # the attention layer
    *(Target("layer S/16", rope, "none", 1.05, 1.05) for rope in ROPES),
    *(Target("layer Ti/16", rope, "none", 1.05, 1.05) for rope in ROPES),
    *(Target("layer Ti/4", rope, "none", 1.08, 1.05) for rope in ROPES),
    Target("layer MAE", "rope_axial", "none", None, 1.06),
    *(
        Target(f"layer {size}", "rope_axial", "none", None, 1.05, modes=("compiled",), **BOTH)
        for size in ("S/16", "Ti/16", "Ti/4")
    ),
    # whole models
    *(Target(f"model {size}", rope, "none", 1.03, 1.04) for size in SIZES for rope in ROPES),
    *(Target(f"model {size}", table, "none", 1.01, 1.01) for size in SIZES for table in ("learned", "sincos2d")),
    *(Target(f"model {size}", "alibi2d", "none", 1.06, 1.05) for size in SIZES),
    *(Target(f"model {size}", "relative_table", "none", 1.03, None) for size in SIZES),
    Target("encoder S/16, 25 % visible", "rope_axial", "none", None, 1.06),
    Target("Swin-T", "visionpos", "timm", 0.74, 0.82),
    # windows
    *(Target(f"window {place}, shifted", "visionpos", "timm", 0.42, 0.38) for place in ("56 x 56", "14 x 14")),
    *(Target(f"window {place}", "visionpos", "timm", 0.85, 0.98) for place in ("56 x 56", "14 x 14")),
    Target("window v2 64 x 64, shifted", "visionpos", "timm", 0.55, 0.5),
    *(Target(f"partition {place}, shifted", "visionpos", "timm", 0.3, 0.3) for place in ("56 x 56", "14 x 14")),
    *(Target(f"partition {place}", "visionpos", "timm", 0.7, 0.7) for place in ("56 x 56", "14 x 14")),
    # operations
    *(Target(f"rotation {size}", "rope_axial", "copy", 1.5, None) for size in ("S/16", "Ti/4")),
    *(Target(f"gather {place}", "visionpos", "timm", 0.5, 0.5) for place in ("7 x 7", "14 x 14")),
    # CUDA
    *(Target("model S/16", rope, "none", 1.10, 1.07, **GPU) for rope in ROPES),
    Target("Swin-T", "visionpos", "timm", None, 0.65, "cuda", ("bf16",)),
    Target("Swin-T", "visionpos", "timm", None, 0.85, "cuda", ("bf16",), ("compiled",)),
    *(
        Target(f"kernel {place}", "fused", "roofline", 1.6, 1.8, "cuda", ("bf16",))
        for place in ("56 x 56", "56 x 56, shifted", "14 x 14", "14 x 14, shifted")
    ),
    *(
        Target("long 64 x 64", name, "none", 1.1, 1.1, "cuda", ("float32", "bf16"), ("eager", "compiled"), "memory")
        for name in ("alibi2d", "lookhere")
    ),
]


REASONS = [  # why a goal is missed where it is: mode, row, variant, with backward pass or not (None: either), text
    ("eager", "layer", "rope_mixed", True, "the gradient of learned angles reads q, k and their gradients once more"),
    ("eager", "model", "rope_mixed", True, "the gradient of learned angles reads q, k and their gradients once more"),
    ("eager", "layer", "rope_mixed", False, "one pass over q and k, with a table of its own"),
    ("eager", "model", "rope_mixed", False, "one pass over q and k in every layer, with a table of its own"),
    ("eager", "layer Ti/16", "rope_axial", None, "one pass over q and k; the layer is short, so calls count"),
    ("eager", "layer", "rope_axial", None, "one pass over q and k"),
    ("eager", "model", "rope_axial", None, "one pass over q and k in every layer; where layers are short, calls count"),
    ("eager", "rotation", "rope_axial", None, "a complex product reads and writes what a copy does, and the table"),
    ("eager", "model", "relative_table", None, "an N x N bias is read in every layer, and compared with its table"),
    ("eager", "gather 7 x 7", "visionpos", None, "microseconds, two thirds of them calls"),
    ("eager", "window v2", "visionpos", None, "the same without bias and mask takes as long"),
    ("eager", "window", "visionpos", None, "the same without bias and mask takes as long: timm's steps and bits"),
    ("eager", "Swin-T", "visionpos", None, "the same without bias and mask takes as long: timm's steps and bits"),
    ("eager", "partition", "visionpos", None, "each way is one gather, as long as a copy; calls are the rest"),
    ("compiled", "layer", "rope_mixed", False, "angles, cosines and sines are computed in float64, timm's in float32"),
    ("compiled", "partition", "visionpos", None, "timm's graph; guards of the call are the rest"),
]


def reason(result: dict[str, Any], found: dict[str, Any], limit: float) -> str:
    """Return why this ratio misses its goal, as far as that is known."""
    if found["q1"] <= limit:
        return "by less than the noise: the lower quartile meets it"
    for mode, row, variant, backward, text in REASONS:
        same_run = mode == result["mode"] and backward in (None, result["backward"])
        if same_run and result["row"].startswith(row) and variant == found["variant"]:
            return text
    return ""


def is_timms(name: str) -> bool:
    """Return whether a variant is timm's own."""
    return name.startswith("timm")


def goals(result: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the goals of a measured row: variant, over, of, limit, measured, met.

    Compiled, nothing is slower than timm's.

    Raises:
        ValueError: a target names a ratio that the row does not have.
    """
    ratios = {(found["variant"], found["over"]): found for found in result["ratios"]}
    wanted = [(t.variant, t.over, t.of, t.limit(result)) for t in TARGETS]
    wanted = [goal for goal in wanted if goal[-1] is not None]
    if result["mode"] == "compiled":
        named = {(variant, over) for variant, over, of, _ in wanted if of == "time"}
        wanted += [(*pair, "time", 1.0) for pair in ratios if is_timms(pair[1]) and pair not in named]
    for variant, over, of, limit in wanted:
        if (variant, over) not in ratios:
            raise ValueError(
                f"a target names {variant} over {over}, but {result['row']} has {', '.join(map(str, ratios))}"
            )
        found = ratios[variant, over]
        measured = found["median" if of == "time" else of]
        yield {
            "variant": variant,
            "over": over,
            "of": of,
            "limit": limit,
            "measured": measured,
            "met": measured <= limit,
            "reason": "" if measured <= limit else reason(result, found, limit),
        }
