"""What speaks for each encoding: who uses it, what larger pictures did to it, and when to take it.

Numbers of others are quoted as they stand in what is named, top-1 accuracy on ImageNet-1k in percent if nothing else is
said, and none of them was measured again here; "abstract" means that no more than that was read. Our own are of the
runs that [results](results.md) has, where seeds and intervals are: with one seed, a point or two say nothing.
"""

from __future__ import annotations

import inspect
import json
import textwrap
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from ..registry import list_encodings
from .report import markdown

STUDY = Path(__file__).parents[2] / "results" / "cifar10_vit_h200"  # of the repository; an installed package has none
WAYS = ("interpolated", 1.0), ("interpolated", 1.5), ("extrapolated", 1.5)  # coordinates, times the trained size


class Evidence(NamedTuple):
    """What is known of one encoding beside its formula."""

    used_by: str
    larger: str  # what was measured on pictures larger than those trained on
    when: str


DECISION = [
    ("your case", "take", "because"),
    ("released weights", "what they have", "`create_model` without `encoding` keeps it, bit for bit"),
    (
        "a ViT from scratch, nothing else known",
        "`rope_axial`, interpolated on larger pictures",
        "no parameters, and most released vision towers turn so; run on, it loses much (below)",
    ),
    (
        "pictures up to twice the trained size",
        "`rope_mixed`",
        "on 384 after 224 it gains in every size of ViT (rope-vit), where the learned table loses",
    ),
    (
        "pictures far larger, untrained",
        "`lookhere` or `fire`",
        "from 224 to 1024 they keep most, rotations least (two papers, abstracts); not repeated here",
    ),
    (
        "a masked autoencoder",
        "`sincos2d`",
        "the weights of MAE have it, and nothing of it depends on the hidden patches",
    ),
    ("windows", "`relative_table`", "the weights of Swin have it; `log_cpb` where the window will change"),
    ("any aspect ratio in one model", "`learned2d` or `rope_axial`", "what SigLIP 2, Kimi, Qwen and Pixtral ship"),
    (
        "to move as little as possible with position",
        "`alibi2d`",
        "no direction, no parameters, falls with distance alone",
    ),
    ("a control", "`none`", "what is left without positions; `scalar` and `binary` show what fails"),
]
EVIDENCE = {
    "abs_win": Evidence(
        "Hiera, SAM 2", "made for it: the table of the grid is resized, that of the windows is not", "Hiera's weights"
    ),
    "binary": Evidence("no model", "", "never; it shows what steps do"),
    "factorized": Evidence("NaViT; Gemma 4 has two such tables", "", "grids of many shapes, with tables to learn"),
    "fourier": Evidence("Perceiver; XCiT", "", "XCiT's weights, or coordinates that are no grid"),
    "learned": Evidence(
        "ViT, DeiT",
        "DeiT III S, B, L from 224 to 384: 80.4 to 79.4, 83.4 to 82.8, 84.6 to 84.2 (rope-vit)",
        "weights of ViT or DeiT, and one size of picture",
    ),
    "learned2d": Evidence(
        "SigLIP 2 NaFlex; MoonViT (Kimi) 64 x 64; Qwen3-VL 48 x 48", "", "their weights; any grid from one table"
    ),
    "scalar": Evidence("no model", "", "never; it shows what an unbounded number does"),
    "sincos2d": Evidence(
        "MAE, MoCo v3, SimpleViT",
        "ViT-B/16 from 224 to 384: 78.71 to 77.29 (golden-gate blog, by a third party)",
        "MAE; no parameters, no position in attention",
    ),
    "sinusoidal": Evidence("text models", "", "a comparison with text; rows wrap"),
    "comrope": Evidence("its authors", "", "`rope_mixed` with larger blocks is wanted, and only offsets may matter"),
    "harope": Evidence(
        "DiT, Flux and SD 3, by its authors", "", "a trained `rope_axial` model is to gain freedom, foldable"
    ),
    "liere": Evidence("its authors", "", "more than offsets may matter; the most expensive rotation"),
    "pope": Evidence("a language model; vit-pytorch, x-transformers", "", "content and position are to be kept apart"),
    "rope1d": Evidence("text models", "", "a comparison with text; rows wrap"),
    "rope_axial": Evidence(
        "RoPE-ViT; as presets MoonViT (Kimi), Pixtral, Qwen2-VL, Qwen3-VL, DeepSeek-V4, GenLIP, Gemma 4",
        "DeiT III S, B, L from 224 to 384, run on: 80.9 to 80.0, 83.6 to 83.9, 84.7 to 85.1; Swin T, S, B: 81.3 to "
        "79.2, 83.1 to 80.9, 83.6 to 81.8 (rope-vit). RoPE, ViT-Ti, ImageNet-100, 224 to 1024: falls to 18.9 (TMLR "
        "9150, abstract)",
        "a ViT from scratch; interpolated or linearly scaled on larger pictures: run on or by NTK it lost more, on our "
        "position tasks",
    ),
    "rope_dinov3": Evidence("DINOv3", "", "DINOv3's weights; features on many sizes. Not on grids of a few cells"),
    "rope_eva": Evidence(
        "EVA-02; ViT-5, with registers",
        "ViT-5 B, L at 224 and at 384: 84.2 and 85.4, 84.9 and 86.0 (its README)",
        "weights of EVA-02, or registers that are to have a place",
    ),
    "rope_golden": Evidence(
        "its author",
        "ViT-B/16 from 224 to 384: 79.78 to 80.41, axial 79.58 to 79.57, mixed 79.73 to 79.83 (its blog, by a third "
        "party; at 384 with a softmax temperature)",
        "the freedom of `rope_mixed` is wanted without parameters",
    ),
    "rope_mixed": Evidence(
        "RoPE-ViT",
        "DeiT III S, B, L from 224 to 384, run on: 80.9 to 81.8, 83.8 to 84.4, 84.8 to 85.6; Swin T, S, B: 81.4 to "
        "79.5, 83.0 to 81.4, 83.7 to 82.1 (rope-vit)",
        "a ViT that will see somewhat larger pictures",
    ),
    "rope_spiral": Evidence("DeiT and DiT of its authors", "", "a fixed rotation without a preferred axis"),
    "string": Evidence("its authors", "", "a learned basis that folds into the weights"),
    "alibi": Evidence("text models", "", "a comparison with text; rows wrap"),
    "alibi2d": Evidence(
        "CROMA",
        "fine-tuned in place of a ViT's own encoding, position is less decodable (What DINO saw, abstract)",
        "only distance shall count, or features are to be uniform over the picture",
    ),
    "decomposed": Evidence("MViTv2, ViTDet, SAM", "", "weights of SAM and MViTv2; the query has a say"),
    "fire": Evidence(
        "language models",
        "ViT-Ti, ImageNet-100, 224 to 1024: keeps 63.1, RoPE 18.9 (TMLR 9150, abstract)",
        "pictures far larger",
    ),
    "irpe": Evidence("DeiT of its authors", "", "a bias that asks the query; DeiT-S 81.2 with q, k and v (its README)"),
    "kerple": Evidence("language models", "", "`alibi2d` with a learned shape"),
    "log_cpb": Evidence(
        "Swin V2", "made for it: offsets in logarithmic units", "windows that will grow; Swin V2's weights"
    ),
    "lookhere": Evidence(
        "its authors",
        "ViT-B, 224 to 1024: 21.7 above 2D RoPE, at 224 1.6 above the others on average (abstract)",
        "pictures far larger; heads that look in a direction",
    ),
    "pape": Evidence(
        "its authors",
        "up to 10.5 above the next best where it runs on (abstract)",
        "the query is to choose where to look",
    ),
    "relative_table": Evidence(
        "Swin, BEiT, MaxViT, CoAtNet, LeViT, TinyViT",
        "Swin T, S, B from 224 to 384: 81.2 to 78.9, 82.9 to 81.0, 83.3 to 81.2 (rope-vit)",
        "windows of one size; learns slowly from small values",
    ),
    "shaw": Evidence(
        "text models; a CIFAR ViT",
        "CIFAR-10 at its own size: 90.57, learned 86.52, axial 88.49 (s-chh, README)",
        "small data, and cost matters less",
    ),
    "t5": Evidence("T5", "", "few numbers to learn, near offsets apart"),
    "lepe": Evidence("CSWin; CoaT's is alike", "", "a convolution beside attention is welcome"),
    "peg": Evidence(
        "CPVT, Twins",
        "any size without a table; DeiT-Ti at its own: none 68.2, learned 72.2, relative 70.5 (CPVT, abstract)",
        "whole grids only, of any size",
    ),
    "none": Evidence("", "", "the control of every comparison"),
}


def kept_runs() -> Iterator[dict[str, Any]]:
    """Yield the kept runs on CIFAR-10 of encodings with default options."""
    for file in sorted(STUDY.glob("*-seed*.json")):
        run = json.loads(file.read_text())
        if run["result"]["config"]["encoding"] in list_encodings():
            yield run


def measured_here() -> dict[str, str]:
    """Return, of encodings with kept runs, accuracies in percent in each of `WAYS`; means over seeds."""
    found: dict[str, dict[tuple[str, float], list[float]]] = {}
    for run in kept_runs():
        shares = found.setdefault(run["result"]["config"]["encoding"], {})
        side = run["result"]["data"]["image_size"][0]
        for report in run["evaluations"]:
            for row in report["rows"]:
                if row["how"] == "scale":
                    shares.setdefault((report["coordinates"], row["size"][0] / side), []).append(row["accuracy"])
    numbers = {
        name: [f"{100 * fmean(shares[way]):.1f}" if way in shares else "-" for way in WAYS]
        for name, shares in found.items()
    }
    return {name: " / ".join(each) for name, each in numbers.items()}


def evidence() -> str:
    """Return the section of the page: which encoding to take, and what speaks for each."""
    here = "CIFAR-10 here: trained / 1.5 x interpolated / 1.5 x run on"
    own, rows = measured_here(), [("name", "used by", "on larger pictures", here, "take it for")]
    for name in list_encodings():
        each = EVIDENCE.get(name, Evidence("", "", ""))
        rows.append((f"[`{name}`](#{name})", each.used_by, each.larger, own.get(name, ""), each.when))
    note = textwrap.fill(" ".join(inspect.cleandoc(__doc__).split("\n\n")[1].split()), 120)
    return f"## Which one\n\n{markdown(DECISION)}\n\n## What speaks for each\n\n{note}\n\n{markdown(rows)}"
