"""Everything that a report says, as numbers: the content of report.json, from runs side by side."""

from collections.abc import Iterable
from typing import Any

import numpy as np

from visionpos.training.reports.collect import Found, Group
from visionpos.training.reports.statistics import seed_interval

__all__ = ["options_text", "summarize"]

DERIVED_OPTIONS = (  # of an encoding's options, what follows from the model and the data
    *("name", "place", "modules", "dim", "num_heads", "head_dim", "feat_shape", "layer", "depth"),
    *("num_prefix_tokens", "reference_shape", "extrapolate"),
)


def summarize(found: Found, groups: list[Group], baseline: str | None) -> dict[str, Any]:
    """Return everything that the report says, as numbers."""
    runs, first = found.runs, found.runs[0]
    references = {str(group.setting): group for group in groups if group.label == baseline}
    rows = [summarize_group(group, references.get(str(group.setting)), found) for group in groups]
    settings = list(dict.fromkeys(str(group.setting) for group in groups))
    split = first.splits[0]
    order = sorted(rows, key=lambda row: (settings.index(str(row["setting"])), -row["accuracy"][split]["mean"]))
    return {
        "runs": len(runs),
        "unfinished": [str(path) for path in found.unfinished],
        "parts": first.splits,
        "baseline": baseline,
        "varied": found.varied,
        "tuned": found.tuned,
        "fewest_seeds": min(len(group.runs) for group in groups),
        "data": {"name": first.result["config"]["data"]["name"], **first.result["data"]},
        "chance": first.result["chance"],
        "weights": first.result["final"]["weights"],
        "steps": sorted({run.result["steps"] for run in runs}),
        "hardware": sorted({run.result["device"] for run in runs}),
        "versions": [dict(each) for each in sorted({tuple(run.result["versions"].items()) for run in runs})],
        "rows": order,
        "sizes": [row for group in groups for row in size_rows(group, references.get(str(group.setting)))],
    }


def summarize_group(group: Group, baseline: Group | None, found: Found) -> dict[str, Any]:
    """Return one row of the tables."""
    results = [run.result for run in group.runs.values()]
    first = next(iter(group.runs.values()))
    accuracy, difference = {}, {}
    for split in first.splits:
        interval, basis = group.accuracy(split)
        per_seed = {seed: run.result["final"][split] for seed, run in group.runs.items()}
        accuracy[split] = {**vars(interval), "basis": basis, "per_seed": per_seed}
        if baseline is not None and baseline is not group:
            difference[split] = group.difference(baseline, split)
    return {
        "setting": group.setting,
        "encoding": group.label,
        "options": options_text(first.result["encodings"]),
        "tuned": {name: first.field(name) for name in found.tuned},
        "seeds": list(group.runs),
        "accuracy": accuracy,
        "difference": difference,
        "images_per_second": float(np.mean([result["images_per_second"] for result in results])),
        "seconds": float(np.mean([result["seconds"] for result in results])),
        "parameters": results[0]["parameters"],
        "encoding_parameters": results[0]["encoding_parameters"],
    }


def options_text(encodings: Iterable[dict[str, Any]]) -> str:
    """Return encodings with every option that decides the outcome: `learned(init_std=0.02, interpolation=bicubic)`."""
    texts = []
    for encoding in encodings:
        options = {key: value for key, value in encoding.items() if key not in DERIVED_OPTIONS and value is not None}
        listed = ", ".join(f"{key}={value}" for key, value in options.items())
        texts.append(f"{encoding['name']}({listed})" if listed else encoding["name"])
    return " + ".join(dict.fromkeys(texts)) or "none"


def size_rows(group: Group, baseline: Group | None) -> list[dict[str, Any]]:
    """Return accuracy at every size, canvas and shift that all runs of a group were evaluated at."""
    own, other = measured(group), {} if baseline is None else measured(baseline)
    by_itself = {evaluation.get("own_coordinates") for run in group.runs.values() for evaluation in run.evaluations}
    rows = []
    for key, by_seed in own.items():
        if by_seed.keys() == group.runs.keys():
            common = [seed for seed in by_seed if seed in other.get(key, {})]
            gap = float(np.mean([by_seed[seed] - other[key][seed] for seed in common])) if common else None
            coordinates, how, size, split = key
            place = {"coordinates": coordinates, "how": how, "size": list(size), "part": split}
            place["own"] = coordinates in by_itself  # so does the model by itself
            interval = vars(seed_interval(list(by_seed.values())).within(0, 1))
            rows.append({"setting": group.setting, "encoding": group.label, **place, **interval, "above_baseline": gap})
    return rows


def measured(group: Group) -> dict[tuple[str, str, tuple[int, ...], str], dict[int, float]]:
    """Return a map from (coordinates, how, size, split) to one from the seed to the accuracy."""
    table: dict[tuple[str, str, tuple[int, ...], str], dict[int, float]] = {}
    for seed, run in group.runs.items():
        height, width = run.result["data"]["image_size"]
        for evaluation in run.evaluations:
            for row in evaluation["rows"]:
                stretched = row["how"] == "scale" and row["size"][0] * width != row["size"][1] * height
                how = "aspect ratio" if stretched else row["how"]
                shares = {how: row["accuracy"]}
                if "consistency" in row:
                    shares["answers kept after a shift"] = row["consistency"]
                for what, share in shares.items():
                    key = (evaluation["coordinates"], what, tuple(row["size"]), row["part"])
                    table.setdefault(key, {})[seed] = share
    return table
