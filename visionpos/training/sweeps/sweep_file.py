"""A sweep file: what it may say, and what is accepted.

    run: ../run/vit_cifar10.yaml                    what all have in common
    encodings: [none, learned, rope_axial]          names, options or files, as in --encoding
    seeds: [0, 1, 2, 3, 4]
    vary: {recipe.epochs: [15, 50]}                 values of other fields, every combination
    tune: {grid: {recipe.lr: [1e-3, 2e-3, 4e-3]}}   settings to choose by training pictures held out
    evaluate: {sizes: [24, 48], canvas: [48]}       other pictures to evaluate finished runs on

The last three may be left out.
"""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from visionpos.training.config.command_line import field_types, make_parser, parse_flags
from visionpos.training.config.ranges import PATH, check_ranges, within
from visionpos.training.config.schema import changed
from visionpos.training.errors import ConfigError, reporting

__all__ = ["FIELDS_OF_SWEEP", "Evaluate", "Sweep", "Tune", "read_sweep"]

FIELDS_OF_SWEEP = ("config", "encoding", "seed", "output")  # fields that the sweep itself decides for every run


@dataclass
class Tune:
    """Set how settings are chosen for each encoding: trained on fewer pictures, judged on those left out.

    Args:
        grid: Values of each field; every combination is tried.
        ranges: Lowest and highest value of each field; Optuna chooses `trials` settings on a logarithmic scale.
        trials: For `ranges`: how many.
        settings: Values of other fields in every trial, in place of the run's: {recipe.epochs: 1} for shorter trials.
        validation: Training pictures held out, as data.validation.
        seed: Of every trial; none of `seeds`.
    """

    grid: dict[str, list[Any]] = field(default_factory=dict)
    ranges: dict[str, tuple[float, float]] = field(default_factory=dict)
    trials: int | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    validation: int = 5000
    seed: int = 1000

    @property
    def fields(self) -> list[str]:
        """Return the names of the fields that are chosen."""
        return [*self.grid, *self.ranges]


@dataclass
class Evaluate:
    """Set other pictures to evaluate finished runs on, as in `python -m train.evaluate`.

    Args:
        sizes: Scale the pictures to these: 24, 32x48.
        canvas: Put them on canvases of these sizes.
        shifts: Move them by so much, down and right: 4, 0x4.
    """

    sizes: list[int | str] = field(default_factory=list)
    canvas: list[int | str] = field(default_factory=list)
    shifts: list[int | str] = field(default_factory=list)


@dataclass
class Sweep:
    """Hold the content of a sweep file.

    Args:
        run: The run file that all share, relative to the sweep file.
        encodings: Specs as in --encoding.
        seeds: Of every encoding.
        vary: Values of other fields, by their dotted names; every combination is run.
        tune: Settings to choose for each encoding first.
        evaluate: What to do with finished runs.
        output: Directory of all runs; by default runs/<sweep file>.
    """

    run: str = within(PATH)
    encodings: list[Any]
    seeds: list[int]
    vary: dict[str, list[Any]] = field(default_factory=dict)
    tune: Tune = field(default_factory=Tune)
    evaluate: Evaluate = field(default_factory=Evaluate)
    output: str | None = within(PATH, None)

    def check(self) -> None:
        """Raise ConfigError for values outside their range, or that contradict each other."""
        check_ranges(self)
        for name in ("encodings", "seeds"):
            if not getattr(self, name):
                raise ConfigError(f"{name}: [] given; accepted: a list of one or more")
        tune = self.tune
        chosen = {"vary": self.vary, "tune.grid": tune.grid, "tune.ranges": tune.ranges}
        for name, values in chosen.items():
            for key, listed in values.items():
                if not listed:
                    raise ConfigError(f"{name}.{key}: [] given; accepted: a list of one or more values")
                if key in FIELDS_OF_SWEEP or sum(key in other for other in chosen.values()) > 1:
                    raise ConfigError(f"{name}.{key}: the sweep decides this field elsewhere; accepted: other fields")
        for key, (low, high) in tune.ranges.items():
            if not 0 < low < high < math.inf:
                raise ConfigError(f"tune.ranges.{key}: {[low, high]} given; accepted: two rising numbers above 0")
        if tune.grid and tune.ranges:
            raise ConfigError("tune: grid and ranges given; accepted: one of them")
        if (tune.trials is not None) != bool(tune.ranges) or (tune.ranges and tune.trials < 1):
            raise ConfigError(
                f"tune.trials: {tune.trials} given; accepted: a whole number from 1 with ranges, else none"
            )
        for key in tune.settings:
            if key in (*FIELDS_OF_SWEEP, *tune.fields, "data.validation"):
                raise ConfigError(
                    f"tune.settings.{key}: the sweep decides this field elsewhere; accepted: other fields"
                )
        alone = changed(tune, ["validation", "seed"]) + (["settings"] if tune.settings else [])
        for name in () if tune.fields else alone:
            raise ConfigError(
                f"tune.{name}: {getattr(tune, name)} given, but there is nothing to tune: no grid or ranges"
            )
        if tune.fields and (tune.seed in self.seeds or "data.validation" in self.vary):
            raise ConfigError(f"tune.seed: {tune.seed} given; accepted: none of seeds, and no data.validation in vary")


def read_sweep(path: Path) -> Sweep:
    """Return the content of a sweep file, checked; ConfigError on any mistake."""
    parser = make_parser("")
    parser.add_argument("--config", action="config")
    parser.add_class_arguments(Sweep)
    flags = parse_flags(parser, ["--config", str(path)], field_types(Sweep))
    flags.pop("config")
    with reporting(str(path)):
        sweep = Sweep(**vars(parser.instantiate(flags)))
    sweep.check()
    return sweep
