"""Rows of attention layers: with an encoding, over timm's `Attention` without any.

Tables that all layers of a model share are computed once per forward pass, so not within a layer's time.
"""

from __future__ import annotations

import copy
from functools import partial

import timm
import torch
from timm.layers import AttentionRope, apply_keep_indices_nlc
from timm.layers.pos_embed_sincos import RotaryEmbeddingCat, RotaryEmbeddingMixed
from timm.models.beit import Attention as BeitAttention
from torch import Tensor, nn

import visionpos as vp
from benchmarks.measure import Case, Row, Setting

BEIT = {"name": "relative_table", "preset": "beit", "init_std": 0.02}
HALF = {"name": "rope_axial", "layout": "half"}
ENCODINGS = {
    "rope_axial": "rope_axial",
    "rope_axial, half": HALF,
    "rope_mixed": "rope_mixed",
    "alibi2d": "alibi2d",
    "lookhere": "lookhere",
}
NEWER = {  # of 2025 and 2026, and options that came with them; timm has none of these layers
    "rope_axial": "rope_axial",
    "rope_axial, moonvit": {"name": "rope_axial", "preset": "moonvit"},
    "rope_axial, half of it still": {"name": "rope_axial", "zero_fraction": 0.5},
    "rope_axial, learned frequencies": {"name": "rope_axial", "learn_frequencies": "per_head"},
    "rope_spiral": "rope_spiral",
    "harope": "harope",
    "pope": "pope",
}


class Layer(nn.Module):
    """The attention layer of a converted model's first block, called as its block calls it."""

    def __init__(self, model: nn.Module, positions: vp.Positions, keep: Tensor | None):
        super().__init__()
        self.attn, self.context = model.blocks[0].attn, model.context(positions, keep)

    def forward(self, x: Tensor) -> Tensor:
        """Return the attention of tokens x (B, prefix + N, C)."""
        return self.attn(x, self.context)


class TimmRope(nn.Module):
    """A rotary layer of timm's with the weights of another; a table without parameters is computed once."""

    def __init__(self, weights: nn.Module, rope: nn.Module, keep: Tensor | None):
        super().__init__()
        dim = weights.num_heads * weights.head_dim
        self.attn = AttentionRope(dim, num_heads=weights.num_heads, qkv_bias=True, num_prefix_tokens=1)
        self.attn.load_state_dict(weights.state_dict(), strict=False)
        self.rope, self.keep = rope, keep
        self.fixed = None if isinstance(rope, RotaryEmbeddingMixed) else self.table()

    def table(self) -> Tensor:
        """Return sines and cosines, ([B, heads or 1,] N, 2 head_dim)."""
        table = self.rope.get_embed()
        table = table[0] if isinstance(self.rope, RotaryEmbeddingMixed) else table.unsqueeze(0)  # of the first layer
        return table if self.keep is None else apply_keep_indices_nlc(self.keep, table, self.keep)

    def forward(self, x: Tensor) -> Tensor:
        """Return the attention of tokens x (B, prefix + N, C)."""
        return self.attn(x, rope=self.table() if self.fixed is None else self.fixed)


def timm_peers(layers: dict[str, Layer], grid: tuple[int, int], keep: Tensor | None) -> dict[str, nn.Module]:
    """Return timm's own layers with the weights of ours, by the name of ours."""
    attn = layers["rope_axial"].attn
    shape = {"in_pixels": False, "feat_shape": list(grid), "temperature": 100.0, "grid_indexing": "xy"}
    peers = {"rope_axial": TimmRope(attn, RotaryEmbeddingCat(attn.head_dim, **shape), keep)}
    rope = RotaryEmbeddingMixed(attn.num_heads * attn.head_dim, 1, attn.num_heads, feat_shape=list(grid))
    rope.freqs.data[:, 0] = layers["rope_mixed"].attn.encodings[0].freqs.data
    peers["rope_mixed"] = TimmRope(attn, rope, keep)
    if keep is None:  # timm's BEiT drops no tokens
        peer = BeitAttention(attn.num_heads * attn.head_dim, attn.num_heads, qkv_bias=True, window_size=grid)
        state, (q_bias, _, v_bias) = attn.state_dict(), attn.qkv.bias.chunk(3)  # a bias of keys changes no softmax
        state |= {"q_bias": q_bias, "v_bias": v_bias}
        state["relative_position_bias_table"] = layers["relative_table"].attn.encodings[0].relative_position_bias_table
        peer.load_state_dict({key: state[key] for key in peer.state_dict()})
        peers["relative_table"] = peer
    return peers


def layer(
    setting: Setting,
    dim: int,
    heads: int,
    grid: tuple[int, int],
    batch: tuple[int, int],
    visible: float | None = None,
    newer: bool = False,
) -> Case:
    """Build the row of one class token and the tokens of a grid, or of their share `visible`, which differs in each.

    With `newer` it is that of the newer encodings, beside no layers of timm's.
    """
    height, width = grid
    plain = timm.create_model(
        "vit_tiny_patch16_224",
        embed_dim=dim,
        num_heads=heads,
        depth=1,
        img_size=(16 * height, 16 * width),
        num_classes=0,
    )
    plain, number = vp.set_encoding(plain, "none"), setting.batch(*batch)
    positions, keep = vp.Positions.grid(grid, num_prefix_tokens=1), None
    if visible is not None:
        keep = torch.rand(number, height * width).argsort(dim=1)[:, : int(visible * height * width)]
    specs = NEWER if newer else ENCODINGS if visible else {**ENCODINGS, "relative_table": BEIT}
    layers = {name: Layer(vp.set_encoding(copy.deepcopy(plain), spec), positions, keep) for name, spec in specs.items()}
    peers = {} if newer else timm_peers(layers, grid, keep)
    base = timm.models.vision_transformer.Attention(dim, heads, qkv_bias=True)
    base.load_state_dict(plain.blocks[0].attn.state_dict())
    modules = {"none": base, **layers, **{f"timm's {name}": peer for name, peer in peers.items()}}
    tokens = layers["rope_axial"].context.positions.num_tokens  # those that are left
    x = torch.randn(number, tokens, dim, requires_grad=setting.backward)
    return Case((x,), modules, {name: f"timm's {name}" for name in peers})


ROWS = [
    Row("layer", "layer S/16", partial(layer, dim=384, heads=6, grid=(14, 14), batch=(8, 256)), quick=True),
    Row("layer", "layer Ti/16", partial(layer, dim=192, heads=3, grid=(14, 14), batch=(8, 256))),
    Row("layer", "layer Ti/4", partial(layer, dim=192, heads=3, grid=(8, 8), batch=(64, 1024)), quick=True),
    Row(
        "layer",
        "layer MAE",
        partial(layer, dim=384, heads=6, grid=(14, 14), batch=(32, 1024), visible=0.25),
        quick=True,
    ),
    Row(
        "layer",
        "layer Ti/4, newer encodings",
        partial(layer, dim=192, heads=3, grid=(8, 8), batch=(64, 1024), newer=True),
        quick=True,
    ),
]
