"""Compare finished runs: which encoding is better, and how sure is that?

    python -m train.report runs/encodings_cifar10

The arguments are run directories, or directories of them such as `train.sweep` leaves. `report.md`, `report.json` and
figures are written to `--output`. Runs may differ in encoding and seed, in the fields that their sweep varied or tuned,
and in those that `--vary` names; any other difference is an error.
"""

import itertools
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from visionpos.training.config.command_line import make_parser, parse_flags
from visionpos.training.errors import ConfigError, run_command
from visionpos.training.reports.collect import Found, Group, find_runs, group_runs
from visionpos.training.reports.figures import draw
from visionpos.training.reports.statistics import seed_interval
from visionpos.training.run.record import write_json, write_whole

__all__ = ["markdown", "report"]

FEW = 5  # seeds, below which a table must say so
SHAPES = (  # of an encoding's options, what follows from the model and the data
    *("name", "place", "modules", "dim", "num_heads", "head_dim", "feat_shape", "layer", "depth"),
    *("num_prefix_tokens", "reference_shape", "extrapolate"),
)


def report(paths: Sequence[Path], output: Path | None, varied: Sequence[str], baseline: str | None) -> dict[str, Any]:
    """Write the report; returns the content of report.json, with the directory it is in.

    Args:
        paths: Run directories, or directories of them.
        output: Where to write; by default `report` in the only directory of `paths`.
        varied: Fields in which the runs may differ.
        baseline: Label of the encoding that others are compared to; by default `none`, if it is there.
    """
    if output is None:
        if len(paths) != 1 or (paths[0] / "config.yaml").exists():
            raise ConfigError("--output: not given; accepted: a directory (left out only for one directory of runs)")
        output = paths[0] / "report"
    found = find_runs(paths, varied)
    groups = group_runs(found)
    labels = list(dict.fromkeys(group.label for group in groups))
    if baseline is not None and baseline not in labels:
        raise ConfigError(f"--baseline: {baseline!r} given; accepted: {', '.join(labels)}")
    baseline = baseline or ("none" if "none" in labels else None)
    content = summarize(found, groups, baseline)
    try:
        output.mkdir(parents=True, exist_ok=True)
        content["figures"] = draw(content, output)
        write_json(output / "report.json", content)
        write_whole(output / "report.md", markdown(content))
    except OSError as error:
        raise ConfigError(f"--output: cannot write to {output}: {error}") from None
    return content | {"output": str(output)}


def summarize(found: Found, groups: list[Group], baseline: str | None) -> dict[str, Any]:
    """Everything that the report says, as numbers."""
    runs, first = found.runs, found.runs[0]
    references = {str(group.setting): group for group in groups if group.label == baseline}
    rows = [summarize_group(group, references.get(str(group.setting)), found) for group in groups]
    settings = list(dict.fromkeys(str(group.setting) for group in groups))
    part = first.parts[0]
    order = sorted(rows, key=lambda row: (settings.index(str(row["setting"])), -row["accuracy"][part]["mean"]))
    return {
        "runs": len(runs),
        "unfinished": [str(path) for path in found.unfinished],
        "parts": first.parts,
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
    """One row of the tables."""
    results = [run.result for run in group.runs.values()]
    first = next(iter(group.runs.values()))
    accuracy, difference = {}, {}
    for part in first.parts:
        interval, basis = group.accuracy(part)
        per_seed = {seed: run.result["final"][part] for seed, run in group.runs.items()}
        accuracy[part] = {**vars(interval), "basis": basis, "per_seed": per_seed}
        if baseline is not None and baseline is not group:
            difference[part] = group.difference(baseline, part)
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
    """Encodings with every option that decides the outcome: `learned(init_std=0.02, interpolation=bicubic)`."""
    texts = []
    for encoding in encodings:
        options = {key: value for key, value in encoding.items() if key not in SHAPES and value is not None}
        listed = ", ".join(f"{key}={value}" for key, value in options.items())
        texts.append(f"{encoding['name']}({listed})" if listed else encoding["name"])
    return " + ".join(dict.fromkeys(texts)) or "none"


def size_rows(group: Group, baseline: Group | None) -> list[dict[str, Any]]:
    """Accuracy at every size, on every canvas and after every shift that all runs of a group were evaluated at."""
    own, other = measured(group), {} if baseline is None else measured(baseline)
    rows = []
    for key, by_seed in own.items():
        if by_seed.keys() == group.runs.keys():
            common = [seed for seed in by_seed if seed in other.get(key, {})]
            gap = float(np.mean([by_seed[seed] - other[key][seed] for seed in common])) if common else None
            coordinates, how, size, part = key
            place = {"coordinates": coordinates, "how": how, "size": list(size), "part": part}
            interval = vars(seed_interval(list(by_seed.values())).within(0, 1))
            rows.append({"setting": group.setting, "encoding": group.label, **place, **interval, "above_baseline": gap})
    return rows


def measured(group: Group) -> dict[tuple[str, str, tuple[int, ...], str], dict[int, float]]:
    """(coordinates, how, size, part) -> seed -> accuracy."""
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


def markdown(content: dict[str, Any]) -> str:
    """The report in Markdown."""
    sections = ["# Comparison of position encodings", facts(content)]
    for part in content["parts"]:
        sections += [f"## Accuracy: {part}", caption(content), accuracy_table(content, part)]
    sections += ["## Cost", caption(content), cost_table(content)]
    kinds = {(row["how"], row["coordinates"], row["part"]): None for row in content["sizes"]}
    for how, coordinates, part in kinds:
        sections += [f"## {how.capitalize()}, {coordinates} coordinates: {part}", caption(content)]
        sections += [size_table(content, how, coordinates, part)]
    if content["figures"]:
        sections += ["## Figures", *(f"![{name}]({name})" for name in content["figures"])]
    return "\n\n".join(section for section in sections if section) + "\n"


def facts(content: dict[str, Any]) -> str:
    """What the numbers are based on."""
    data, weights = content["data"], {"ema": "averaged weights (EMA)", "raw": "raw weights"}[content["weights"]]
    versions = "; ".join(", ".join(f"{key} {value}" for key, value in each.items()) for each in content["versions"])
    fewest, most = content["fewest_seeds"], max(len(row["seeds"]) for row in content["rows"])
    lines = [
        f"{content['runs']} runs, {f'{fewest} to {most}' if fewest < most else most} seeds for each encoding.",
        f"Data: {data['name']}, {data['test_size']:,} test pictures, chance {content['chance']:.1%}.",
        f"Accuracy is that of the {weights} of the last step only, never the best of several looks.",
        "Intervals are of 95 %: a two-level bootstrap, wider for few seeds, where it says 'seeds and pictures'; "
        "Student's t over seeds where it says 'seeds only' (no predictions.safetensors), and for other sizes.",
        f"Hardware: {', '.join(content['hardware'])}. Versions: {versions}.",
    ]
    if len(content["hardware"]) > 1:
        lines.append("Images per second and seconds were not all measured on the same hardware.")
    if content["tuned"]:
        lines.append(f"Chosen for each encoding on training pictures held out: {', '.join(content['tuned'])}.")
    if content["baseline"] is None:
        lines.append("No run is without a position encoding, and no --baseline was given: there are no differences.")
    if content["unfinished"]:
        lines.append(f"Not finished, and left out: {', '.join(content['unfinished'])}.")
    return "\n".join(f"- {line}" for line in lines)


def caption(content: dict[str, Any]) -> str:
    """What a table must say by itself, wherever it is copied to."""
    data = content["data"]
    few = f" **Fewer than five seeds ({content['fewest_seeds']}).**" if content["fewest_seeds"] < FEW else ""
    return f"{data['test_size']:,} test pictures; {data['note']}.{few}"


def accuracy_table(content: dict[str, Any], part: str) -> str:
    above = f"above {content['baseline']} (95 %)"
    head = [*content["varied"], "encoding", "as built", *content["tuned"]]
    head += ["accuracy (95 %), %", "seeds", "interval from", above, "seed by seed"]
    rows = []
    for row in content["rows"]:
        accuracy, difference = row["accuracy"][part], row["difference"].get(part)
        cells = [*row["setting"].values(), row["encoding"], row["options"], *row["tuned"].values()]
        cells += [percent(accuracy, "{:.2f}"), len(row["seeds"]), accuracy["basis"]]
        cells += [percent(difference, "{:+.2f}") if difference else ""]
        cells += [", ".join(f"{100 * each:+.2f}" for each in difference["per_seed"].values()) if difference else ""]
        rows.append(cells)
    if content["baseline"] is None:
        head, rows = head[:-2], [row[:-2] for row in rows]
    return table(head, rows)


def cost_table(content: dict[str, Any]) -> str:
    head = [*content["varied"], "encoding", "images per second", "seconds", "parameters", "of the encoding"]
    rows = []
    for row in content["rows"]:
        cost = [f"{row['images_per_second']:,.0f}", f"{row['seconds']:.1f}"]
        cost += [f"{row['parameters']:,}", f"{row['encoding_parameters']:,}"]
        rows.append([*row["setting"].values(), row["encoding"], *cost])
    return table(head, rows)


def size_table(content: dict[str, Any], how: str, coordinates: str, part: str) -> str:
    """One column for each size, or shift down and right, in pixels; the last is the mean gain over the baseline."""
    chosen = [
        row for row in content["sizes"] if (row["how"], row["coordinates"], row["part"]) == (how, coordinates, part)
    ]
    sizes = sorted({tuple(row["size"]) for row in chosen})
    rows = []
    by_group: Callable[[dict[str, Any]], str] = lambda row: f"{row['setting']} {row['encoding']}"  # noqa: E731
    for _, group in itertools.groupby(chosen, by_group):
        found = {tuple(row["size"]): row for row in group}
        gaps = [row["above_baseline"] for row in found.values() if row["above_baseline"] is not None]
        first = next(iter(found.values()))
        cells = [percent(found[size], "{:.1f}") if size in found else "" for size in sizes]
        gap = f"{100 * np.mean(gaps):+.2f}" if gaps else ""
        rows.append([*first["setting"].values(), first["encoding"], *cells, gap])
    names = ["x".join(map(str, size)) for size in sizes]
    return table([*content["varied"], "encoding", *names, f"mean above {content['baseline']}"], rows)


def percent(interval: dict[str, Any], form: str) -> str:
    """A mean with its interval, in percent."""
    if interval["low"] is None:
        return form.format(100 * interval["mean"])
    mean, low, high = (form.format(100 * interval[key]) for key in ("mean", "low", "high"))
    return f"{mean} ({low} to {high})"


def table(head: Sequence[object], rows: Iterable[Sequence[object]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(str(cell) for cell in line)} |" for line in lines)


def command(argv: Sequence[str]) -> None:
    """Read the command line, write the report, print it."""
    parser = make_parser("Compare finished runs.")
    parser.add_argument("runs", nargs="+", help="run directories, or directories of them")
    parser.add_argument("--output", default=None, help="where to write; by default `report` in the directory of runs")
    parser.add_argument("--vary", nargs="+", default=[], help="fields in which the runs may differ: recipe.epochs ...")
    parser.add_argument("--baseline", default=None, help="the encoding that others are compared to; by default none")
    flags = parse_flags(parser, argv, dict.fromkeys(["runs", "output", "vary", "baseline"], str))
    output = None if flags.output is None else Path(flags.output)
    content = report([Path(run) for run in flags.runs], output, flags.vary, flags.baseline)
    print(f"{markdown(content)}\nThis is {Path(content['output']) / 'report.md'}; report.json is beside it.")


def main() -> None:
    sys.exit(run_command(lambda: command(sys.argv[1:])))


if __name__ == "__main__":
    main()
