"""Layers for models of one's own: timm's own layers to the bit, and what holds for every encoding in them."""

import copy
import doctest
import inspect

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.layers import RelPosBias as TimmRelPosBias
from timm.layers import RotaryEmbeddingCat, apply_rot_embed_cat, build_sincos2d_pos_embed
from torch import nn

import visionpos as vp
from tests.masked.mae_reference import sincos_table
from tests.small import pictures, vit
from visionpos import layers

GRID, HEADS, HEAD_DIM, DIM = (3, 5), 2, 8, 16
OPTIONS = {"decomposed": ["head_dim"], "irpe": ["head_dim"], "shaw": ["head_dim"], "pape": ["head_dim", "dim"]}
KNOWN = {"head_dim": HEAD_DIM, "dim": DIM}


def build(name, num_prefix_tokens=1):
    options = {key: KNOWN[key] for key in OPTIONS.get(name, [])}
    options |= {"layer": 1, "depth": 4} if name == "lookhere" else {}
    torch.manual_seed(0)
    return {
        "input": lambda: layers.PosEmbed(GRID, DIM, num_prefix_tokens, name, **options),
        "rotary": lambda: layers.Rope2d(GRID, HEADS, HEAD_DIM, num_prefix_tokens, name, **options),
        "bias": lambda: layers.RelPosBias(GRID, HEADS, num_prefix_tokens, name, **options),
        "conditional": lambda: layers.PosConv(GRID, DIM, num_prefix_tokens, name, **options),
    }[vp.encoding_info(name)["place"]]()


def called(layer, tokens, positions=None, batch=4):
    """The layer's result as one tensor, on what its place acts on."""
    draw = torch.Generator().manual_seed(1)
    dtype = next((p.dtype for p in layer.parameters()), torch.get_default_dtype())
    if layer.place in ("input", "conditional"):
        return layer(torch.randn(batch, tokens, DIM, generator=draw).to(dtype), positions)
    q, k = torch.randn(2, batch, HEADS, tokens, HEAD_DIM, generator=draw).to(dtype)
    if layer.place == "rotary":
        return torch.stack(layer(q, k, positions))
    source = getattr(layer.encoding, "content_source", None) if layer.encoding.content_dependent else None
    content = {None: None, "q": q, "x": q.transpose(1, 2).flatten(2)}[source]
    return layer(q @ k.mT, positions, content)


ENCODINGS = [name for name in vp.list_encodings() if name != "none"]


@pytest.mark.parametrize("name", ENCODINGS)
def test_every_encoding_is_a_layer(name):
    """Equal to the encoding called with positions; half, double, copies, state dicts and the meta device keep it."""
    layer, tokens = build(name), 1 + 15
    expected = called(layer, tokens)
    assert torch.equal(called(layer, tokens, vp.Positions.grid(GRID, 1)), expected)
    assert torch.equal(called(copy.deepcopy(layer), tokens), expected)
    assert all(isinstance(key, str) and not key.startswith("encoding.") for key, _ in layer.named_parameters())
    names = {key for key, _ in layer.named_parameters()} - {"proj.weight"}  # a convolution's kernel decays
    assert layer.no_weight_decay() - {"proj.weight"} == names
    assert torch.equal(copy.deepcopy(layer).half().positions.coords, vp.Positions.grid(GRID).coords)
    wide = called(copy.deepcopy(layer).double(), tokens)
    assert torch.allclose(wide.float(), expected, rtol=1e-5, atol=1e-5)
    with torch.device("meta"):
        empty = build(name)
    empty.to_empty(device="cpu")
    for buffer in empty.buffers():
        buffer.zero_()
    empty.reinit_buffers()
    empty.load_state_dict(layer.state_dict())
    assert torch.equal(called(empty, tokens), expected)


@pytest.mark.parametrize("name", ["learned", "sincos2d", "rope_mixed", "rope_axial", "relative_table", "alibi2d"])
def test_tokens_that_are_left_keep_their_places(name):
    layer, index = build(name, 0), torch.tensor([[7, 0, 12], [14, 3, 1]])
    whole = vp.Positions.grid(GRID)
    kept = layer.positions.keep(index)
    if layer.place == "input":
        assert torch.allclose(layer.get_embed(kept), layer.get_embed()[0][index])
    elif layer.place == "rotary":
        angles = layer.get_embed(whole).unsqueeze(0).expand(2, -1, -1, -1)
        rows = index[:, None, :, None].expand(-1, angles.shape[1], -1, angles.shape[-1])
        assert torch.allclose(layer.get_embed(kept), angles.gather(2, rows))
    else:
        bias = layer.get_bias()[0]
        assert torch.allclose(
            layer.get_bias(kept), torch.stack([bias[:, i][:, :, i] for i in index]), rtol=1e-6, atol=1e-7
        )


ROTARY = [
    *((name, {}) for name in vp.list_encodings(place="rotary")),
    ("rope_axial", {"scaling": "yarn"}),
    ("rope_axial", {"layout": "half_per_axis", "zero_fraction": 0.5}),
    ("rope_eva", {"register_temperature": 100.0}),
]


@pytest.mark.parametrize("grid", [(2, 3), (3, 5)])
@pytest.mark.parametrize(("name", "options"), ROTARY)
def test_angles_turn_as_the_layer_does_or_are_refused(name, options, grid):
    layer = layers.Rope2d((2, 3), 2, 16, num_prefix_tokens=5, encoding=name, **options)
    positions = vp.Positions.grid(grid, 5)
    q, k = torch.randn(2, 1, 2, positions.num_tokens, 16)
    more = name in ("comrope", "liere", "string", "harope", "pope")
    if more or ("yarn" in options.values() and grid != (2, 3)):
        with pytest.raises(ValueError, match=f"^{name} does more here than turn by angles"):
            layer.get_embed(positions)
        return
    angles = layer.get_embed(positions)
    for x, turned in zip((q, k), layer(q, k, positions), strict=True):
        assert torch.allclose(vp.apply_rotary(x, angles, layer.encoding.layout), turned, atol=1e-5)


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_mask_in_the_dtype_of_the_queries_fits_torchs_attention(dtype, need_weights):
    bias, attention = layers.RelPosBias((2, 3), 2, 1, encoding="alibi2d"), nn.MultiheadAttention(8, 2, batch_first=True)
    x = torch.randn(3, 7, 8, dtype=dtype)
    mask = bias.to(dtype).as_attn_mask(3).to(dtype)
    assert attention.to(dtype)(x, x, x, attn_mask=mask, need_weights=need_weights)[0].dtype == dtype


@pytest.mark.unhooked  # wrong types on purpose
def test_only_a_name_is_taken():
    for encoding in ({"name": "learned"}, vp.create_encoding("sincos2d", dim=8), None, ["learned"]):
        with pytest.raises(ValueError, match="^here an encoding is a name, one of .* got "):
            layers.PosEmbed((2, 3), 8, encoding=encoding)
    for call in (vp.create_encoding, vp.encoding_info, vp.check_encoding):
        for encoding in (None, ["learned"]):
            with pytest.raises(ValueError, match="^here an encoding is a name, one of .* got "):
                call(encoding)


def test_the_table_of_timms_vit():
    model = vit().requires_grad_(False)
    nn.init.normal_(model.pos_embed)
    layer = layers.PosEmbed((8, 12), dim=48, num_prefix_tokens=1)
    layer.load_state_dict({"pos_embed": model.pos_embed})
    patches = model.patch_embed(pictures())
    tokens = torch.cat([model.cls_token.expand(2, -1, -1), patches], dim=1)
    assert torch.equal(layer(tokens), model._pos_embed(patches))
    assert torch.equal(layer.get_embed(), model.pos_embed)
    layer.set_feat_shape((4, 6))
    expected = timm.layers.resample_abs_pos_embed(model.pos_embed, (4, 6), (8, 12), num_prefix_tokens=1)
    assert torch.allclose(layer.pos_embed, expected, atol=1e-5)
    assert layer.positions.feat_shape == (4, 6)
    assert layer(torch.zeros(1, 25, 48)).shape == (1, 25, 48)


@pytest.mark.parametrize("prefix", [0, 1])
def test_the_bias_of_timm(prefix):
    """timm's rows for a class token are those of BEiT."""
    theirs = TimmRelPosBias((3, 5), num_heads=2, prefix_tokens=prefix)
    layer = layers.RelPosBias((3, 5), num_heads=2, num_prefix_tokens=prefix, preset="beit" if prefix else "swin")
    assert list(layer.state_dict()) == list(theirs.state_dict()) == ["relative_position_bias_table"]
    layer.load_state_dict(theirs.state_dict())
    attn = torch.randn(4, 2, 15 + prefix, 15 + prefix)
    assert torch.equal(layer.get_bias(), theirs.get_bias())
    assert torch.equal(layer(attn), theirs(attn))


def test_the_table_and_the_index_of_timms_window_attention():
    theirs = timm.models.swin_transformer.WindowAttention(16, num_heads=2, window_size=(3, 5))
    nn.init.normal_(theirs.relative_position_bias_table)
    layer = layers.RelPosBias((3, 5), num_heads=2)
    table = {k: v for k, v in theirs.state_dict().items() if k in layer.state_dict()}
    layer.load_state_dict(table, strict=True)
    assert torch.equal(layer.get_bias(), theirs._get_rel_pos_bias())
    assert torch.equal(layer.relative_position_index.flatten(), theirs.relative_position_index.flatten())
    moved = layer.to("meta")
    assert {b.device.type for b in moved.buffers()} == {"meta"}


def test_sincos_is_that_of_mae_and_that_of_timm():
    mae = layers.SinCos2d((3, 5), dim=16, num_prefix_tokens=1)
    assert torch.equal(mae.get_embed()[0], sincos_table(3, 5, 16).float())
    theirs = build_sincos2d_pos_embed([3, 5], 16)
    assert (layers.SinCos2d((3, 5), dim=16, preset="timm").get_embed()[0] - theirs).abs().max() < 1e-6


def test_rope_is_that_of_timm():
    theirs = RotaryEmbeddingCat(16, in_pixels=False, feat_shape=[3, 5], temperature=50.0, grid_indexing="ij")
    layer = layers.Rope2d((3, 5), num_heads=2, head_dim=16, encoding="rope_eva", temperature=50.0)
    q, k = torch.randn(2, 4, 2, 15, 16)
    for ours, x in zip(layer(q, k), (q, k), strict=True):
        assert (ours - apply_rot_embed_cat(x, theirs.get_embed())).abs().max() < 1e-5
        assert torch.allclose(ours, vp.apply_rotary(x, layer.get_embed()), atol=1e-5)


def test_multihead_attention_gets_the_bias_of_every_head():
    attn = nn.MultiheadAttention(16, 2, batch_first=True).double()
    layer = layers.RelPosBias((3, 5), num_heads=2, init_std=1.0).double()
    x = torch.randn(4, 15, 16, dtype=torch.float64)
    q, k, v = F.linear(x, attn.in_proj_weight, attn.in_proj_bias).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
    expected = layer(q @ k.mT / 8**0.5).softmax(dim=-1) @ v
    expected = attn.out_proj(expected.transpose(1, 2).flatten(2))
    assert torch.allclose(attn(x, x, x, attn_mask=layer.as_attn_mask(4), need_weights=False)[0], expected, atol=1e-12)


WRONG = [
    (
        lambda: layers.PosEmbed(GRID, DIM, encoding="alibi2d"),
        "PosEmbed takes one of .*learned.*'alibi2d' acts in .*bias",
    ),
    (lambda: layers.Rope2d(GRID, 2, 8, encoding="rope_axal"), "did you mean 'rope_axial'"),
    (lambda: layers.RelPosBias(GRID, 2, encoding="none"), "'none' acts in the place 'none'"),
    (lambda: layers.RelPosBias(GRID, 2, encoding="shaw"), "shaw needs head_dim"),
    (lambda: layers.RelPosBias(GRID, 2, encoding="shaw", head_dim=8, values=True), "more than a bias"),
    (lambda: layers.RelPosBias(GRID, 2, layers=[0]), "no option 'layers'"),
    (lambda: layers.PosEmbed((3, 0), DIM), "feat_shape must be 2 positive integers"),
    (lambda: layers.PosEmbed(GRID, DIM, -1), "num_prefix_tokens must be 0 or more"),
    (lambda: layers.SinCos2d(GRID, 6), "dim"),
    (lambda: layers.PosEmbed(GRID, DIM)(torch.zeros(1, 14, DIM)), "x has 14 tokens, but the positions describe 15"),
    (lambda: layers.RelPosBias(GRID, 2)(torch.zeros(1, 3, 15, 15)), "logits have 3 heads"),
]


@pytest.mark.parametrize(("call", "match"), WRONG)
def test_what_does_not_fit_is_one_line(call, match):
    with pytest.raises(ValueError, match=match) as error:
        call()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", layers.__all__)
def test_examples_run(name):
    parser, names = doctest.DocTestParser(), {"vp": vp, "torch": torch}
    example = parser.get_doctest(inspect.getdoc(getattr(layers, name)), names, name, None, None)
    assert example.examples
    report = []
    doctest.DocTestRunner(verbose=False).run(example, out=report.append)
    assert not report, "".join(report)
