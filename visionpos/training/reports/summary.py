"""Everything that a report says, as numbers: the content of report.json, from runs side by side."""

from collections.abc import Iterable
from typing import Any

from visionpos.training.reports.collect import Found, Group

__all__ = ["options_text", "summarize"]

DERIVED_OPTIONS = (  # of an encoding's options, what follows from the model and the data
    *("name", "place", "modules", "dim", "num_heads", "head_dim", "feat_shape", "layer", "depth"),
    *("num_prefix_tokens", "reference_shape", "extrapolate"),
)


def summarize(found: Found, groups: list[Group], baseline: str | None) -> dict[str, Any]:
    """Return everything that the report says, as numbers."""
    runs, first = found.runs, found.runs[0]
    references = {str(group.setting): group for group in groups if group.label == baseline}
    settings = list(dict.fromkeys(str(group.setting) for group in groups))
    split = first.splits[0]
    best_first = sorted(groups, key=lambda group: (settings.index(str(group.setting)), -group.mean(split)))
    compared = sum(str(group.setting) in references for group in groups) - len(references)
    rows = [summarize_group(group, references.get(str(group.setting)), compared, found) for group in best_first]
    sizes = [row for group in best_first for row in size_rows(group, references.get(str(group.setting)), compared)]
    return {
        "runs": len(runs),
        "unfinished": [str(path) for path in found.unfinished],
        "parts": first.splits,
        "baseline": baseline,
        "compared": compared,
        "study": found.study,
        "varied": found.varied,
        "tuned": found.tuned,
        "fewest_seeds": min(len(group.runs) for group in groups),
        "data": {"name": first.result["config"]["data"]["name"], **first.result["data"]},
        "chance": first.result["chance"],
        "weights": first.result["final"]["weights"],
        "steps": sorted({run.result["steps"] for run in runs}),
        "hardware": sorted({run.result["device"] for run in runs}),
        "versions": [dict(each) for each in sorted({tuple(run.result["versions"].items()) for run in runs})],
        "rows": rows,
        "contrasts": contrasts(found, groups),
        "sizes": sizes,
    }


def summarize_group(group: Group, baseline: Group | None, compared: int, found: Found) -> dict[str, Any]:
    """Return one row of the tables."""
    first = next(iter(group.runs.values()))
    accuracy, difference = {}, {}
    for split in first.splits:
        shares = group.final(split)
        accuracy[split] = group.accuracy(f"final {split}", shares)
        if baseline is not None and baseline is not group:
            others = baseline.final(split)
            difference[split] = group.difference(baseline, f"final {split}", shares, others, compared)
    return {
        "setting": group.setting,
        "encoding": group.label,
        "spec": first.field("encoding"),
        "options": options_text(first.result["encodings"]),
        "tuned": {name: first.field(name) for name in found.tuned},
        "seeds": list(group.runs),
        "accuracy": accuracy,
        "difference": difference,
        "parameters": first.result["parameters"],
        "encoding_parameters": first.result["encoding_parameters"],
    }


def contrasts(found: Found, groups: list[Group]) -> list[dict[str, Any]]:
    """Return the differences that study.json asks for, as pairs of encodings, in each setting that has both."""
    rows = []
    for one, other in (found.study or {}).get("contrast", []):
        for ours in groups:
            for theirs in groups:
                if (ours.label, theirs.label) == (one, other) and ours.setting == theirs.setting:
                    splits = next(iter(ours.runs.values())).splits
                    gaps = {
                        split: ours.difference(theirs, f"final {split}", ours.final(split), theirs.final(split), 1)
                        for split in splits
                    }
                    if all(gaps.values()):
                        rows.append({"encodings": [one, other], "setting": ours.setting, "difference": gaps})
    return rows


def options_text(encodings: Iterable[dict[str, Any]]) -> str:
    """Return encodings with every option that decides the outcome: `learned(init_std=0.02, interpolation=bicubic)`."""
    texts = []
    for encoding in encodings:
        options = {key: value for key, value in encoding.items() if key not in DERIVED_OPTIONS and value is not None}
        listed = ", ".join(f"{key}={value}" for key, value in options.items())
        texts.append(f"{encoding['name']}({listed})" if listed else encoding["name"])
    return " + ".join(dict.fromkeys(texts)) or "none"


def size_rows(group: Group, baseline: Group | None, compared: int) -> list[dict[str, Any]]:
    """Return accuracy at every size, canvas and shift that all runs of a group were evaluated at."""
    own, other = measured(group), {} if baseline in (None, group) else measured(baseline)
    by_itself = {each.get("own_coordinates") for run in group.runs.values() for each in run.evaluations}
    rows = []
    for key, shares in own.items():
        if shares.keys() == group.runs.keys():
            coordinates, how, size, split, name = key
            place = {"coordinates": coordinates, "how": how, "size": list(size), "part": split}
            place["own"] = coordinates in by_itself  # so does the model by itself
            gap = group.difference(baseline, name, shares, other[key], compared) if key in other else None
            accuracy = {"accuracy": group.accuracy(name, shares), "difference": gap}
            rows.append({"setting": group.setting, "encoding": group.label, **place, **accuracy})
    return rows


def measured(group: Group) -> dict[tuple[str, str, tuple[int, ...], str, str], dict[int, float]]:
    """Return a map from (coordinates, how, size, split, name in `Run.right`) to one from the seed to the accuracy."""
    table: dict[tuple[str, str, tuple[int, ...], str, str], dict[int, float]] = {}
    for seed, run in group.runs.items():
        height, width = run.result["data"]["image_size"]
        for evaluation in run.evaluations:
            for row in evaluation["rows"]:
                stretched = row["how"] == "scale" and row["size"][0] * width != row["size"][1] * height
                shares = {("aspect ratio" if stretched else row["how"], row["how"]): row["accuracy"]}
                if "consistency" in row:
                    shares["answers kept after a shift", "consistency"] = row["consistency"]
                for (how, name), share in shares.items():
                    name = f"{evaluation['coordinates']} {name} {row['size'][0]}x{row['size'][1]} {row['part']}"
                    key = (evaluation["coordinates"], how, tuple(row["size"]), row["part"], name)
                    table.setdefault(key, {})[seed] = share
    return table
