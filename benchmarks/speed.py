"""What an encoding costs: attention layers and whole models with it, over the same without any, and timm's beside.

Command   python -m benchmarks.speed [--device cuda] [--rows layer model swin] [--rounds 11] [--output FILE.json]
Clock     one thread and CPU time on a CPU, events on CUDA; medians of the ratios of all rounds
Control   the base a second time; a row counts where this lies within 0.97 to 1.03
"""

from __future__ import annotations

import argparse
import copy
import datetime
import json
import platform
from collections.abc import Callable
from pathlib import Path

import timm
import torch
from timm.layers import AttentionRope
from timm.layers.pos_embed_sincos import RotaryEmbeddingCat
from timm.models.vision_transformer import Attention as TimmAttention
from torch import Tensor, nn

import visionpos as vp
from benchmarks.clock import ratios
from visionpos.attention import Attention, AttentionContext
from visionpos.registry import constructor_parameters, get_encoding_class

ENCODINGS = ["rope_axial", "alibi2d", "relative_table"]
INPUTS = ["learned", "sincos2d"]


def _step(forward: Callable[[Tensor], Tensor], x: Tensor, backward: bool) -> Callable[[], object]:
    def train():
        forward(x).sum().backward()

    def infer():
        with torch.no_grad():
            forward(x)

    return train if backward else infer


def _layer(base: TimmAttention, name: str, grid: tuple[int, int]) -> Callable[[Tensor], Tensor]:
    """A converted copy of an attention layer, with one class token."""
    attn = copy.deepcopy(base)
    facts = {"num_heads": attn.num_heads, "head_dim": attn.head_dim, "feat_shape": grid}
    accepted = constructor_parameters(get_encoding_class(name))
    encoding = vp.create_encoding(name, **{key: value for key, value in facts.items() if key in accepted})
    shared = encoding.shared
    attn.__class__, attn.encodings = Attention, nn.ModuleList([] if shared else [encoding])
    attn.to(base.qkv.weight.device).train(base.training)
    positions = vp.Positions.grid(grid, num_prefix_tokens=1, device=base.qkv.weight.device)
    prepared = ((encoding, encoding.prepare(positions)),) if shared else ()  # once per model, not per layer
    return lambda x: attn(x, AttentionContext(positions, prepared))


def _timm_rope(base: TimmAttention, grid: tuple[int, int]) -> Callable[[Tensor], Tensor]:
    """timm's own rotary layer with the same weights."""
    dim = base.num_heads * base.head_dim
    peer = AttentionRope(dim, num_heads=base.num_heads, qkv_bias=True, num_prefix_tokens=1).to(base.qkv.weight.device)
    peer.load_state_dict(base.state_dict(), strict=False)
    rope = RotaryEmbeddingCat(
        base.head_dim, in_pixels=False, feat_shape=list(grid), temperature=100.0, grid_indexing="xy"
    ).to(base.qkv.weight.device)
    table = rope.get_embed()
    peer.train(base.training)
    return lambda x: peer(x, rope=table)


def layer_row(
    dim: int, heads: int, grid: tuple[int, int], batch: int, backward: bool, device: torch.device, rounds: int
):
    """One attention layer: each encoding over timm's plain attention, timm's RoPE over the same."""
    torch.manual_seed(0)
    base = TimmAttention(dim, heads, qkv_bias=True).to(device).train(backward)
    x = torch.randn(batch, 1 + grid[0] * grid[1], dim, device=device, requires_grad=backward)
    forwards = {"none": base, "none again": copy.deepcopy(base)}
    forwards |= {name: _layer(base, name, grid) for name in ENCODINGS}
    forwards["timm rope"] = _timm_rope(base, grid)
    difference = (forwards["rope_axial"](x) - forwards["timm rope"](x)).abs().max().item()
    assert difference < 1e-5, f"rope_axial and timm's differ by {difference}"
    return ratios({name: _step(forward, x, backward) for name, forward in forwards.items()}, "none", device, rounds)


def model_row(options: dict, batch: int, backward: bool, device: torch.device, rounds: int):
    """A whole ViT: each encoding over the same model with none."""
    torch.manual_seed(0)
    plain = timm.create_model("vit_tiny_patch16_224", pos_embed="none", num_classes=10, **options)
    height, width = plain.patch_embed.img_size
    x = torch.randn(batch, 3, height, width, device=device)
    models = {"none": plain, "none again": copy.deepcopy(plain)}
    for name in [*INPUTS, *ENCODINGS]:
        models[name] = vp.set_encoding(copy.deepcopy(plain), name)
    for model in models.values():
        model.to(device).train(backward)
    return ratios({name: _step(model, x, backward) for name, model in models.items()}, "none", device, rounds)


def swin_row(options: dict, batch: int, backward: bool, device: torch.device, rounds: int):
    """A whole Swin: timm's, ours with timm's table, and with other encodings."""
    torch.manual_seed(0)
    plain = timm.create_model("swin_tiny_patch4_window7_224", num_classes=10, drop_path_rate=0.0, **options)
    height, width = plain.patch_embed.img_size
    x = torch.randn(batch, 3, height, width, device=device)
    models = {"timm": plain, "timm again": copy.deepcopy(plain)}
    for name in ["relative_table", "rope_axial", "none"]:
        models[name] = vp.set_encoding(copy.deepcopy(plain), name)
    for model in models.values():
        model.to(device).train(backward)
    difference = (models["relative_table"](x) - plain(x)).abs().max().item()
    assert difference < 1e-4, f"relative_table and timm's differ by {difference}"
    return ratios({name: _step(model, x, backward) for name, model in models.items()}, "timm", device, rounds)


ROWS = {
    "layer": {
        "ViT-S layer, 197 tokens, batch 8": lambda *run: layer_row(384, 6, (14, 14), 8, *run),
        "ViT-Ti/4 layer at 32 pixels, 65 tokens, batch 64": lambda *run: layer_row(192, 3, (8, 8), 64, *run),
    },
    "model": {
        "ViT-Ti/4 at 32 pixels, batch 32": lambda *run: model_row({"img_size": 32, "patch_size": 4}, 32, *run),
    },
    "swin": {"Swin-T at 224 pixels, batch 2": lambda *run: swin_row({}, 2, *run)},
}


def main() -> None:
    """Measure, print a Markdown table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), default=["layer", "model"])
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--output", type=Path, default=Path("runs/speed.json"))
    args = parser.parse_args()
    device = torch.device(args.device)
    torch.set_num_threads(1)
    facts = {
        "date": datetime.date.today().isoformat(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "CPU",
        "torch": torch.__version__,
        "timm": timm.__version__,
        "command": f"python -m benchmarks.speed --device {args.device} --rows {' '.join(args.rows)}",
        "rows": [],
    }
    print("| row | pass | base ms | " + "ratio to the first: median (quartiles) |\n| --- | --- | --- | --- |")
    for kind in args.rows:
        for title, measure in ROWS[kind].items():
            for backward in (False, True):
                found, seconds = measure(backward, device, args.rounds)
                control = next(ratio for name, ratio in found.items() if name.endswith("again"))
                row = {"row": title, "backward": backward, "base_ms": 1000 * seconds}
                row |= {"valid": 0.97 <= control.median <= 1.03, "ratios": {k: vars(v) for k, v in found.items()}}
                facts["rows"].append(row)
                cells = ", ".join(f"{k} {v.median:.2f} ({v.q1:.2f}-{v.q3:.2f})" for k, v in found.items())
                doubt = "" if row["valid"] else " *(control outside 0.97-1.03)*"
                print(
                    f"| {title} | {'f+b' if backward else 'fwd'} | {1000 * seconds:.1f} | {cells}{doubt} |", flush=True
                )
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(facts, indent=1))
    print(f"\nwritten to {args.output}")


if __name__ == "__main__":
    main()
