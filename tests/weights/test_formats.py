"""State dicts in the formats of the original code; every one here is made up, in the names of that format."""

import pytest
import timm
import torch

import visionpos as vp
from tests.small import VIT, pictures, vit
from tests.weights.tiny_weights import (
    DEPTH,
    DIM,
    HEAD,
    HEADS,
    PLAIN,
    TABLE,
    block,
    checkpoint,
    drawn,
    swin,
)
from visionpos.weights.formats import convert_weights


def test_vit_and_deit():
    weights = checkpoint(PLAIN, **TABLE, **HEAD)
    model = vp.set_encoding(vit(), "learned+rope_axial")
    assert vp.load_weights(model, {"model": weights}).missing_keys == []
    assert torch.equal(model.pos_embed, weights["pos_embed"])
    plain = vit()
    plain.load_state_dict(weights, strict=True)
    assert torch.equal(vp.set_encoding(model, "learned")(pictures()), plain(pictures()))


def test_deit_distilled():
    options = {"img_size": (32, 48), "patch_size": 4, "num_classes": 5}
    source = timm.create_model("deit_tiny_distilled_patch16_224", **options)
    model = vp.create_model("deit_tiny_distilled_patch16_224", encoding="learned+alibi", **options)
    vp.load_weights(model, {"model": source.state_dict()})
    assert torch.equal(model.dist_token, source.dist_token)
    assert torch.equal(model.head_dist.weight, source.head_dist.weight)


def test_deit3_names_its_layer_scale_otherwise():
    weights = checkpoint(block(), pos_embed=(1, 96, DIM), **HEAD)
    model = vp.set_encoding(vit(init_values=1e-5, no_embed_class=True), "learned+rope_axial")
    vp.load_weights(model, weights)
    assert torch.equal(model.blocks[1].ls2.gamma, weights["blocks.1.gamma_2"])


# --- MAE --------------------------------------------------------------------------------------------------------------

DECODER = {
    "mask_token": (1, 1, 16),
    "decoder_pos_embed": (1, 65, 16),
    "decoder_embed__weight": (16, DIM),
    "decoder_embed__bias": (16,),
    "decoder_blocks__0__norm1__weight": (16,),
    "decoder_norm__weight": (16,),
    "decoder_pred__weight": (48, 16),
    "decoder_pred__bias": (48,),
}


def test_mae(caplog):
    weights = checkpoint(PLAIN, pos_embed=(1, 65, DIM), **DECODER)
    model = vp.set_encoding(vit(img_size=32, num_classes=0), "learned")
    vp.load_weights(model, {"model": weights})
    assert "left out, of use in pretraining only: mask_token, decoder_pos_embed" in caplog.text
    assert "and 4 more" in caplog.text
    assert torch.equal(model.pos_embed, weights["pos_embed"])


@pytest.mark.parametrize("preset", ["mae", "big_vision"])
def test_the_fixed_table_of_mae_is_what_sincos2d_computes(preset):
    table = torch.cat([torch.zeros(1, DIM), vp.sincos_2d((8, 8), DIM)])[None]
    weights = checkpoint(PLAIN, pos_embed=table, **DECODER)
    model = vp.set_encoding(vit(img_size=32, num_classes=0), {"name": "sincos2d", "preset": preset})
    if preset == "mae":
        vp.load_weights(model, weights)
        source = vit(img_size=32, num_classes=0)
        source.load_state_dict({k: v for k, v in weights.items() if not k.startswith(("decoder", "mask"))})
        assert (model(pictures((32, 32))) - source(pictures((32, 32)))).abs().max() < 1e-5
    else:
        with pytest.raises(ValueError, match="unknown to the model: pos_embed"):
            vp.load_weights(model, weights)


# --- Swin -------------------------------------------------------------------------------------------------------------


def original_swin(model, drop=("relative_position_index", "relative_coords_table", "attn_mask")):
    """The names of the authors: patch merging at the end of a stage, `head`, and the buffers."""
    weights = {}
    for i, (key, value) in enumerate(model.state_dict().items()):
        for stage in (1, 2):
            key = key.replace(f"layers.{stage}.downsample", f"layers.{stage - 1}.downsample")
        weights[key.replace("head.fc.", "head.")] = drawn(*value.shape, seed=i)
    for i, depth in enumerate((1, 2, 1)):
        for j in range(depth):
            for name in drop:
                weights[f"layers.{i}.blocks.{j}.attn.{name}".replace("attn.attn", "attn")] = torch.zeros(2)
    return weights


@pytest.mark.parametrize("name", ["swin_tiny_patch4_window7_224", "swinv2_tiny_window8_256"])
def test_swin(name):
    plain = swin(name)
    weights = original_swin(plain)
    plain.load_state_dict(convert_weights(weights, plain), strict=True)
    assert torch.equal(plain.layers[2].downsample.norm.bias, weights["layers.1.downsample.norm.bias"])
    model = swin(name)
    vp.get_encoding(model)  # converted to what it has
    vp.load_weights(model, {"model": weights})
    tolerance = 1e-6 if "v2" in name else 0
    assert (model(pictures((32, 64))) - plain(pictures((32, 64)))).abs().max() <= tolerance


def test_swin_with_an_absolute_table():
    model = vp.set_encoding(swin(), "learned+relative_table")
    weights = {k: v for k, v in original_swin(model).items() if "pos_embed" not in k}
    weights["absolute_pos_embed"] = drawn(1, 8 * 16, 24)
    vp.load_weights(model, weights)
    assert torch.equal(model.pos_embed_input[0].pos_embed, weights["absolute_pos_embed"])


@pytest.mark.parametrize("encoding", ["rope_mixed", "rope_axial"])
def test_rope_swin(encoding):
    model = vp.set_encoding(swin(), encoding)
    weights = {k: v for k, v in original_swin(model, ("rope_t_x", "attn_mask")).items() if "encodings" not in k}
    for i, depth in enumerate((1, 2, 1)):
        for j in range(depth):
            weights[f"layers.{i}.blocks.{j}.attn.rope_freqs"] = drawn(2, 2 * (i + 1), (12, 12, 16)[i] // 2, seed=9 + i)
    vp.load_weights(model, weights)
    if encoding == "rope_mixed":
        freqs = model.layers[1].blocks[1].attn.encodings[0].freqs
        assert torch.equal(freqs, weights["layers.1.blocks.1.attn.rope_freqs"])


# --- rope-vit, DINOv3, BEiT -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(2, DEPTH, HEADS * 8), (2, DEPTH, HEADS, 8)], ids=["rope-vit", "timm"])
def test_rope_vit_mixed(shape):
    mark = "freqs" if len(shape) == 3 else "rope.freqs"
    others = {"freqs_t_x": (96,), "freqs_t_y": (96,)} | HEAD
    weights = checkpoint(block(), **{mark.replace(".", "__"): shape}, **others)
    model = vp.set_encoding(vit(init_values=1e-5), "rope_mixed")
    vp.load_weights(model, weights)
    for i in range(DEPTH):
        assert torch.equal(model.blocks[i].attn.encodings[0].freqs, weights[mark][:, i].reshape(2, HEADS, 8))
    source = timm.create_model("vit_small_patch16_rope_mixed_224", **VIT).eval()  # another implementation of the same
    source.load_state_dict(convert_weights(weights, source), strict=True)
    assert (model(pictures()) - source(pictures())).abs().max() < 1e-5
    with pytest.raises(ValueError, match="freqs has the frequencies of 2 layers, and the model has 1"):
        vp.load_weights(vp.set_encoding(vit(init_values=1e-5, depth=1), "rope_mixed"), weights)


def test_rope_vit_axial_has_no_tensors_of_its_own():
    weights = checkpoint(block(), **HEAD)
    model = vp.set_encoding(vit(init_values=1e-5), "rope_axial")
    vp.load_weights(model, weights)
    with pytest.raises(ValueError, match=r"new in this encoding: blocks\.0\.attn\.encodings\.0\.freqs, blocks\.1"):
        vp.load_weights(vp.set_encoding(vit(init_values=1e-5), "rope_mixed"), weights)


DINOV3 = {
    "mask_token": (1, DIM),
    "storage_tokens": (1, 4, DIM),
    "rope_embed__periods": (4,),
    **{f"blocks__{i}__attn__qkv__bias_mask": (3 * DIM,) for i in range(DEPTH)},
    "local_cls_norm__weight": (DIM,),
}


@pytest.mark.parametrize("zeros", [False, True], ids=["bias", "zeros"])
def test_dinov3(zeros):
    weights = checkpoint(block(gates=("ls1.gamma", "ls2.gamma")), **DINOV3)
    for i in range(DEPTH):
        weights[f"blocks.{i}.attn.qkv.bias"] *= not zeros
    options = {"reg_tokens": 4, "init_values": 1e-5, "num_classes": 0, "norm_layer": torch.nn.LayerNorm}
    model = vp.set_encoding(vit(**options), "rope_dinov3")
    vp.load_weights(model, weights)
    q, k, v = model.blocks[1].attn.qkv.bias.chunk(3)
    assert torch.equal(q, weights["blocks.1.attn.qkv.bias"][:DIM])
    assert not k.any()
    assert torch.equal(v, weights["blocks.1.attn.qkv.bias"][2 * DIM :])
    name = f"vit_small_patch16_dinov3{'' if zeros else '_qkvb'}"
    source = timm.create_model(name, **{**VIT, "num_classes": 0, "global_pool": "token"}).eval()
    source.load_state_dict(convert_weights(weights, source), strict=True)
    assert (model(pictures()) - source(pictures())).abs().max() < 1e-5


def test_dinov3_with_gated_layers():
    gated = {k: v for k, v in block(("ls1.gamma", "ls2.gamma"), bias=False).items() if not k.startswith("mlp")}
    gated |= {f"mlp.{w}.weight": (64, DIM) for w in ("w1", "w2")} | {f"mlp.{w}.bias": (64,) for w in ("w1", "w2")}
    weights = checkpoint(gated | {"mlp.w3.weight": (DIM, 64), "mlp.w3.bias": (DIM,)}, **DINOV3)
    model = timm.create_model("vit_small_plus_patch16_dinov3", **{**VIT, "num_classes": 0, "mlp_ratio": 64 / DIM})
    names = convert_weights(weights, model)
    assert set(names) == set(model.state_dict())
    assert torch.equal(names["blocks.0.mlp.fc1_x.weight"], weights["blocks.0.mlp.w2.weight"])


def test_beit_in_a_vit():
    parts = {"attn.q_bias": (DIM,), "attn.v_bias": (DIM,), "attn.relative_position_bias_table": (15 * 23 + 3, HEADS)}
    parts |= {"attn.relative_position_index": (97, 97)}
    weights = checkpoint(block(bias=False) | parts, lm_head__weight=(16, DIM), mask_token=(1, 1, DIM), **HEAD)
    model = vp.set_encoding(vit(init_values=0.1), {"name": "relative_table", "preset": "beit"})
    vp.load_weights(model, {"module": weights})
    attn = model.blocks[1].attn
    table = weights["blocks.1.attn.relative_position_bias_table"]
    assert torch.equal(attn.encodings[0].relative_position_bias_table, table)
    q, k, v = attn.qkv.bias.chunk(3)
    assert torch.equal(q, weights["blocks.1.attn.q_bias"])
    assert torch.equal(v, weights["blocks.1.attn.v_bias"])
    assert not k.any()


def same_as_timm(host, weights, **options):
    """The host itself, converted to what it has, with the same weights."""
    plain, model = (timm.create_model(host, **{**VIT, **options}).eval() for _ in range(2))
    plain.load_state_dict(convert_weights(weights, plain), strict=True)
    vp.get_encoding(model)  # converted
    vp.load_weights(model, weights)
    assert (model(pictures()) - plain(pictures())).abs().max() < 1e-6


def test_their_own_hosts():
    same_as_timm("vit_small_patch16_rope_mixed_224", checkpoint(block(), freqs=(2, DEPTH, HEADS * 8), **HEAD))
    weights = checkpoint(block(gates=("ls1.gamma", "ls2.gamma")), **DINOV3)
    same_as_timm("vit_small_patch16_dinov3_qkvb", weights, num_classes=0)
    parts = {"attn.q_bias": (DIM,), "attn.v_bias": (DIM,), "attn.relative_position_bias_table": (15 * 23 + 3, HEADS)}
    weights = checkpoint(block(bias=False) | parts, fc_norm__weight=(DIM,), fc_norm__bias=(DIM,), **HEAD)
    same_as_timm("beit_base_patch16_224", {k: v for k, v in weights.items() if not k.startswith("norm.")})
