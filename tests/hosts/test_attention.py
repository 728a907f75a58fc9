"""Attention with positions against a float64 oracle written from the definition, for ViT and for shifted windows."""

import math

import pytest
import torch
from timm.models.vision_transformer import Attention as TimmAttention

import visionpos as vp
from visionpos.hosts.attention import Attention, AttentionContext

DIM, HEADS = 24, 3
HEAD_DIM = DIM // HEADS


def oracle(x, weights, positions, encodings):
    """One image, float64, token by token: input encodings are in x already. x (T, C)."""
    prefix = positions.num_prefix_tokens
    coords = torch.cat([torch.zeros(prefix, 2), positions.coords]).double()
    q, k, v = (x @ weights["qkv"].T).view(-1, 3, HEADS, HEAD_DIM).unbind(1)
    out = torch.zeros(len(x), HEADS, HEAD_DIM, dtype=torch.float64)
    for head in range(HEADS):
        logits = torch.zeros(len(x), len(x), dtype=torch.float64)
        for i in range(len(x)):
            for j in range(len(x)):
                patches = i >= prefix and j >= prefix
                a, b = q[i, head].clone(), k[j, head].clone()
                bias = 0.0
                for encoding in encodings:
                    if encoding.name == "rope_axial":
                        a, b = turn(a, coords[i], i < prefix), turn(b, coords[j], j < prefix)
                    elif encoding.name == "alibi2d" and patches:
                        slope = vp.alibi_slopes(HEADS)[head].item()
                        bias -= slope * math.dist(coords[i].tolist(), coords[j].tolist())
                    elif encoding.name == "relative_table" and patches:
                        h, w = encoding.feat_shape
                        dy, dx = (coords[i] - coords[j]).long().tolist()
                        bias += encoding.relative_position_bias_table[
                            (dy + h - 1) * (2 * w - 1) + dx + w - 1, head
                        ].item()
                logits[i, j] = a @ b / math.sqrt(HEAD_DIM) + bias
        out[:, head] = logits.softmax(-1) @ v[:, head]
    return out.flatten(1) @ weights["proj"].T


def turn(vector, place, is_prefix):
    if is_prefix:
        return vector
    theta = [100.0 ** (-4 * i / HEAD_DIM) for i in range(HEAD_DIM // 4)]
    angles = [place[1].item() * t for t in theta] + [place[0].item() * t for t in theta]
    out = vector.clone()
    for i, angle in enumerate(angles):
        a, b = vector[2 * i], vector[2 * i + 1]
        out[2 * i], out[2 * i + 1] = (
            a * math.cos(angle) - b * math.sin(angle),
            a * math.sin(angle) + b * math.cos(angle),
        )
    return out


def layer(encodings, fused):
    attn = TimmAttention(DIM, HEADS, qkv_bias=False, proj_bias=False)
    attn.__class__, attn.encodings = Attention, torch.nn.ModuleList(encodings)
    attn.fused_attn = fused
    return attn


def build(names, grid):
    facts = {"num_heads": HEADS, "head_dim": HEAD_DIM, "feat_shape": grid, "init_std": 1.0}
    parts = [(name, vp.encoding_info(name)) for name in names]
    return [
        vp.create_encoding(name, **{k: v for k, v in facts.items() if k in [*info["required"], *info["options"]]})
        for name, info in parts
    ]


@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize("prefix", [0, 2])
@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("names", [["rope_axial"], ["alibi2d"], ["relative_table"], ["rope_axial", "relative_table"]])
def test_attention_against_the_oracle(names, fused, prefix, kept):
    torch.manual_seed(0)
    positions = vp.Positions.grid((2, 3), num_prefix_tokens=prefix)
    encodings = build(names, (2, 3))
    if kept:
        positions = positions.keep(torch.tensor([[4, 1, 0, 5]]))
    attn = layer(encodings, fused)
    x = torch.randn(1, positions.num_tokens, DIM)
    weights = {"qkv": attn.qkv.weight.double(), "proj": attn.proj.weight.double()}
    single = vp.Positions(positions.coords[0], (2, 3), prefix) if kept else positions
    want = oracle(x[0].double(), weights, single, encodings)
    got = attn(x, AttentionContext(positions))
    assert (got[0].double() - want).abs().max() < 2e-6


@pytest.mark.parametrize("fused", [True, False])
def test_masks_of_the_caller_are_kept(fused):
    attn = layer(build(["alibi2d"], (2, 3)), fused)
    plain = layer([], fused)
    plain.load_state_dict(attn.state_dict())
    positions = vp.Positions.grid((2, 3))
    x, bias = torch.randn(2, 6, DIM), attn.encodings[0].bias(positions)
    allowed = torch.rand(6, 6) > 0.3
    allowed |= torch.eye(6, dtype=torch.bool)
    additive = torch.zeros(6, 6).masked_fill(~allowed, float("-inf"))
    want = plain(x, attn_mask=(bias + additive)[None])
    assert (attn(x, AttentionContext(positions, (), allowed)) - want).abs().max() < 1e-6
    assert (attn(x, AttentionContext(positions, (), additive)) - want).abs().max() < 1e-6
    causal = torch.zeros(6, 6).masked_fill(torch.ones(6, 6, dtype=torch.bool).triu(1), float("-inf"))
    got = attn(x, AttentionContext(positions), is_causal=True)
    assert (got - plain(x, attn_mask=(bias + causal)[None])).abs().max() < 1e-6


def test_a_layer_without_positions_says_so():
    with pytest.raises(RuntimeError, match="needs positions: call it through the model"):
        layer(build(["alibi2d"], (2, 3)), True)(torch.randn(1, 6, DIM))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_in_low_precision_out(dtype):
    attn = layer(build(["rope_axial", "alibi2d"], (2, 3)), True).to(dtype)
    out = attn(torch.randn(1, 6, DIM, dtype=dtype), AttentionContext(vp.Positions.grid((2, 3))))
    assert out.dtype == dtype
    assert out.isfinite().all()


@pytest.mark.parametrize("fused", [True, False])
def test_nothing_is_kept_from_one_forward_to_the_next(fused):
    attn = layer(build(["relative_table"], (2, 3)), fused)
    x, positions = torch.randn(1, 6, DIM), vp.Positions.grid((2, 3))
    moved = positions.keep(torch.tensor([3, 1, 5, 0, 4, 2]))
    before = attn(x, AttentionContext(positions))
    assert (attn(x, AttentionContext(moved)) - before).abs().max() > 1e-3
    with torch.no_grad():
        attn.encodings[0].relative_position_bias_table.zero_()
    plain = layer([], fused)
    plain.qkv, plain.proj = attn.qkv, attn.proj
    assert (attn(x, AttentionContext(positions)) - plain(x)).abs().max() < 1e-6


def test_outputs_of_several_encodings_add_up():
    attn = layer([vp.create_encoding("lepe", dim=DIM) for _ in range(2)], True)
    alone = [layer([encoding], True) for encoding in attn.encodings]
    plain = layer([], True)
    for other in (*alone, plain):
        other.qkv, other.proj = attn.qkv, attn.proj
    x, context = torch.randn(2, 6, DIM), AttentionContext(vp.Positions.grid((2, 3)))
    first, second = (other(x, context) for other in alone)
    assert (attn(x, context) - (first + second - plain(x))).abs().max() < 1e-6


@pytest.mark.parametrize("fused", [True, False])
def test_dropout_of_attention_in_training_alone(fused):
    attn = layer(build(["alibi2d"], (2, 3)), fused)
    x, context = torch.randn(64, 6, DIM), AttentionContext(vp.Positions.grid((2, 3)))
    want = attn.eval()(x, context)
    attn.attn_drop.p = 0.5
    assert torch.equal(attn(x, context), want)
    dropped = attn.train()(x, context)
    assert (dropped - want).abs().mean() > 0.3 * want.abs().mean()
    assert (dropped.mean(0) - want.mean(0)).abs().mean() < 0.5 * (dropped - want).abs().mean()
