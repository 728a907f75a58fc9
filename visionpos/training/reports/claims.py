"""What articles claim of encodings, the measured property that would show it, and what trained models did.

The property is measured on the untrained encoding (`visionpos.analysis`), trained on 6 x 6 patches and tested on
12 x 12; what models did is their accuracy in the study of position tasks. If a claim predicts, encodings rank alike by
both: the table gives Spearman's rank correlation over encodings, and how often chance gives one as far from 0.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from visionpos.analysis.measure import PROPERTIES, NotDefined, measure
from visionpos.training.reports.tables import Table

__all__ = ["CLAIMS", "Claim", "claims_table", "rank_correlation"]

TRAINED, TESTED = (6, 6), (12, 12)
FEWEST = 5  # encodings, below which a rank correlation says nothing
PERMUTATIONS = 10_000


class Claim(NamedTuple):
    """Say what is claimed, by which property it is measured, and which accuracy it would decide.

    Args:
        text: The claim.
        key: The property, of `visionpos.analysis.measure.PROPERTIES`.
        sign: 1 if the claim wants much of it, -1 if little.
        task: The position task.
        outcome: A split of the test, or coordinates and size in pixels of an evaluation.
    """

    text: str
    key: str
    sign: int
    task: str
    outcome: str


CLAIMS = (
    Claim("what tells all tokens apart can say where one is", "uniqueness", 1, "locate", "inside"),
    Claim("what looks in a direction can tell directions", "directionality", 1, "direction", "inside"),
    Claim("what falls with distance finds neighbours", "spearman", -1, "jigsaw", "inside"),
    Claim(
        "what depends on offsets alone carries over to the other half", "translation_half", -1, "direction", "outside"
    ),
    Claim("what stays in the trained range runs on", "output_drift", -1, "direction", "extrapolated 48x48"),
    Claim("what is smooth can be interpolated", "resolution_error", -1, "direction", "interpolated 48x48"),
)


def claims_table(contents: Sequence[dict[str, Any]]) -> Table | None:
    """Return the table of the claims that these studies can speak of, from their `summarize`; None if there is none."""
    accuracies, specs = outcomes(contents)
    claims = [claim for claim in CLAIMS if (claim.task, claim.outcome) in accuracies]
    measured = {
        label: measure(spec["name"], TRAINED, TESTED, dict.fromkeys(claim.key for claim in claims), **options)
        for label, spec in specs.items()
        for options in [{key: value for key, value in spec.items() if key != "name"}]
    }
    rows = []
    for claim in claims:
        found = accuracies[claim.task, claim.outcome]
        pairs = {label: measured[label][claim.key] for label in found if label in measured}
        pairs = {label: value for label, value in pairs.items() if not isinstance(value, NotDefined)}
        wanted = f"{PROPERTIES[claim.key].label}: {'much' if claim.sign > 0 else 'little'}"
        verdict = f"only {len(pairs)} encodings: none"
        if len(pairs) >= FEWEST:
            values = np.array([claim.sign * float(f"{value:.6g}") for value in pairs.values()])  # the rest is rounding
            correlation, chance = rank_correlation(values, np.array([found[label] for label in pairs]))
            verdict = f"{correlation:+.2f} over {len(pairs)} encodings; by chance in {chance:.1%}"
        rows.append([claim.text, wanted, f"{claim.task}, {claim.outcome}", verdict])
    caption = (
        f"{len(rows)} correlations are looked at together; +1: the property ranks encodings as their accuracy "
        "does. What has no such property is left out."
    )
    head = ["claim", "property measured", "accuracy of models", "rank correlation"]
    return Table("Claims, what was measured, and what models did", caption, head, rows) if rows else None


def outcomes(
    contents: Sequence[dict[str, Any]],
) -> tuple[dict[tuple[str, str], dict[str, float]], dict[str, dict[str, Any]]]:
    """Return (task, outcome) -> encoding -> mean accuracy, of the study with the most encodings; and each spec."""
    accuracies: dict[tuple[str, str], dict[str, float]] = {}
    specs = {}
    for content in contents:
        of_study: dict[tuple[str, str], dict[str, float]] = {}
        found = [(row, split, row["accuracy"][split]) for row in content["rows"] for split in content["parts"]]
        names = [f"{row['coordinates']} {row['size'][0]}x{row['size'][1]}" for row in content["sizes"]]
        sizes = [(row, name, row["accuracy"]) for row, name in zip(content["sizes"], names, strict=True)]
        for row, outcome, accuracy in found + [each for each in sizes if each[0]["part"] == content["parts"][0]]:
            task = row["setting"].get("data.name", content["data"]["name"])
            of_study.setdefault((task, outcome), {}).setdefault(row["encoding"], accuracy["mean"])
        accuracies |= {key: each for key, each in of_study.items() if len(each) > len(accuracies.get(key, {}))}
        for row in content["rows"]:
            spec = {"name": row["spec"]} if isinstance(row["spec"], str) else row["spec"]
            if isinstance(spec, dict) and "+" not in spec["name"]:
                specs[row["encoding"]] = spec
    return accuracies, specs


def rank_correlation(one: NDArray, other: NDArray, seed: int = 0) -> tuple[float, float]:
    """Return Spearman's rank correlation of two vectors, ties at their mean rank, and its two-sided chance.

    The chance is the share of random orders whose correlation is at least as far from 0 (a permutation test). Of a
    vector whose values are all equal there is no ranking: correlation 0, chance 1.
    """
    ranks = [mean_ranks(values) - (len(values) - 1) / 2 for values in (one, other)]
    scale = np.sqrt(np.square(ranks[0]).sum() * np.square(ranks[1]).sum())
    if scale == 0:
        return 0.0, 1.0
    shuffled = np.random.default_rng(seed).permuted(np.tile(ranks[1], (PERMUTATIONS, 1)), axis=1)
    found, by_chance = ranks[0] @ ranks[1] / scale, shuffled @ ranks[0] / scale
    return float(found), float((np.abs(by_chance) >= abs(found) - 1e-12).mean())


def mean_ranks(values: NDArray) -> NDArray:
    """Return the rank of each value from 0, equal ones at the mean of their ranks."""
    return np.array([(values < value).sum() + ((values == value).sum() - 1) / 2 for value in values])
