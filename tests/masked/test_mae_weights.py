"""Checkpoints in the format of MAE's code; every one here is made up, in the names and shapes of that format."""

import pytest
import torch

import visionpos as vp
from tests.masked.mae_reference import sincos_table
from tests.small import pictures, vit
from tests.weights.tiny_weights import DEPTH, DIM, GRID, PLAIN, block, checkpoint, drawn

OPTIONS = {"decoder_dim": 16, "decoder_depth": 1, "decoder_num_heads": 2}
DECODER_BLOCK = {name: tuple(size * 16 // DIM for size in shape) for name, shape in block(gates=()).items()}
PATCHES = GRID[0] * GRID[1]


def original():
    """The state dict of the paper's models, on a grid of 8 x 12: encoder, decoder, and both frozen tables."""
    tables = {"pos_embed": sincos_table(*GRID, DIM), "decoder_pos_embed": sincos_table(*GRID, 16)}
    decoder = {f"decoder_blocks.0.{name}": shape for name, shape in DECODER_BLOCK.items()}
    decoder |= {"mask_token": (1, 1, 16), "decoder_embed.weight": (16, DIM), "decoder_embed.bias": (16,)}
    decoder |= {"decoder_norm.weight": (16,), "decoder_norm.bias": (16,)}
    decoder |= {"decoder_pred.weight": (48, 16), "decoder_pred.bias": (48,)}
    return checkpoint(PLAIN, **{name: table[None].float() for name, table in tables.items()}, **decoder)


def autoencoder(spec="sincos2d", decoder_spec="sincos2d", **options):
    return vp.MaskedAutoencoder(vp.set_encoding(vit(**options), spec), decoder_encoding=decoder_spec, **OPTIONS)


def same(a, b):
    return sorted(a) == sorted(b) and all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize("wrap", [lambda w: w, lambda w: {"model": w, "epoch": 3}], ids=["plain", "model"])
def test_a_whole_checkpoint_there_and_back(wrap):
    mae, weights = autoencoder(), original()
    mae.load_original_state_dict(wrap(weights))
    assert torch.equal(mae.encoder.cls_token, weights["cls_token"])
    assert torch.equal(mae.encoder.norm.bias, weights["norm.bias"])
    assert torch.equal(mae.decoder.embed_tokens.weight, weights["decoder_embed.weight"])
    assert torch.equal(mae.decoder.blocks[0].mlp.fc1.weight, weights["decoder_blocks.0.mlp.fc1.weight"])
    assert torch.equal(mae.decoder.pred.bias, weights["decoder_pred.bias"])
    back = mae.original_state_dict()
    tables = [back.pop(name) - weights.pop(name) for name in ("pos_embed", "decoder_pos_embed")]
    assert all(difference.abs().max() < 1e-6 for difference in tables)
    assert same(back, weights)
    other = autoencoder()
    other.load_original_state_dict(mae.original_state_dict())
    assert same(other.original_state_dict(), mae.original_state_dict())
    mask = mae.draw_mask(pictures(), torch.Generator().manual_seed(0))
    assert torch.equal(other(pictures(), mask).prediction, mae(pictures(), mask).prediction)


def test_the_classifier_stays():
    mae = autoencoder()
    head = mae.encoder.head.weight.clone()
    mae.load_original_state_dict(original())
    assert torch.equal(mae.encoder.head.weight, head)
    assert not any(name.startswith("head") for name in mae.original_state_dict())


def test_learned_tables_take_any_values():
    mae, weights = autoencoder("learned", "learned"), original()
    weights["pos_embed"], weights["decoder_pos_embed"] = drawn(1, 1 + PATCHES, DIM), drawn(1, 1 + PATCHES, 16)
    mae.load_original_state_dict(weights)
    assert torch.equal(mae.encoder.pos_embed, weights["pos_embed"])
    assert torch.equal(mae.decoder.pos_embed, weights["decoder_pos_embed"])
    assert same(mae.original_state_dict(), weights)


@pytest.mark.parametrize("spec", ["sincos2d", "learned"])
@pytest.mark.parametrize(
    "options",
    [
        {"global_pool": "avg"},
        {"reg_tokens": 2},
        {"class_token": False, "global_pool": "avg"},
        {"no_embed_class": True},
        {"init_values": 0.1, "qk_norm": True},
    ],
    ids=str,
)
def test_variations_of_the_encoder_come_back(options, spec):
    """The format has no more than names: what an encoder has besides keeps timm's. `norm` is the one that is used."""
    mae, other = autoencoder(spec, spec, **options), autoencoder(spec, spec, **options)
    with torch.no_grad():
        for index, parameter in enumerate(mae.parameters()):
            parameter.add_(drawn(*parameter.shape, seed=index))
    weights = mae.original_state_dict()
    assert {"norm.weight", "pos_embed", "decoder_pos_embed", "decoder_norm.bias"} < set(weights)
    assert "fc_norm.weight" not in weights
    used = mae.encoder.fc_norm if options.get("global_pool") else mae.encoder.norm
    assert torch.equal(weights["norm.weight"], used.weight)
    other.load_original_state_dict(weights)
    assert same(other.original_state_dict(), weights)
    mask = mae.draw_mask(pictures())
    assert torch.equal(other(pictures(), mask).prediction, mae(pictures(), mask).prediction)


def released():
    """The published checkpoints for fine-tuning: the encoder alone, with its frozen table."""
    weights = original()
    return {"model": {k: v for k, v in weights.items() if not k.startswith("decoder") and k != "mask_token"}}


@pytest.mark.parametrize("weights", [released, original], ids=["encoder", "whole"])
def test_an_encoder_takes_a_checkpoint(weights):
    mae, whole = autoencoder(num_classes=0), original()
    decoder = {key: value.clone() for key, value in mae.decoder.state_dict().items()}
    assert vp.load_weights(mae.encoder, weights()).missing_keys == []
    assert torch.equal(mae.encoder.blocks[DEPTH - 1].attn.qkv.weight, whole["blocks.1.attn.qkv.weight"])
    assert same(mae.decoder.state_dict(), decoder)
    plain = vit(num_classes=0)  # with its table, as timm's own model has it
    vp.load_weights(plain, weights())
    assert (plain(pictures()) - mae.encoder(pictures())).abs().max() < 1e-5
    learned = autoencoder("learned", num_classes=0).encoder
    vp.load_weights(learned, weights())
    assert torch.equal(learned.pos_embed, whole["pos_embed"])


def test_a_table_of_another_grid_can_be_left_out_of_an_encoder():
    weights = released()["model"]
    weights["pos_embed"] = torch.cat([torch.zeros(1, DIM), vp.sincos_2d((12, 8), DIM)])[None]
    encoder = autoencoder(num_classes=0).encoder
    with pytest.raises(ValueError, match="unknown to the model: pos_embed"):
        vp.load_weights(encoder, weights)
    assert vp.load_weights(encoder, weights, strict=False).unexpected_keys == ["pos_embed"]


def without(name):
    return {key: value for key, value in original().items() if key != name}


LARGER = torch.zeros(1, 197, DIM)
TURNED = torch.cat([torch.zeros(1, 16), vp.sincos_2d((12, 8), 16)])[None]
COMPUTED = "must be what sincos2d computes for the grid 8 x 12, (1, 97, "
WRONG = [
    (lambda: without("mask_token"), "missing in the weights: decoder.mask_token"),
    (lambda: without("blocks.1.mlp.fc2.bias"), "missing in the weights: encoder.blocks.1.mlp.fc2.bias"),
    (lambda: without("pos_embed"), f"pos_embed {COMPUTED}{DIM}); the weights have none"),
    (lambda: {**original(), "head.weight": drawn(5, DIM)}, "unknown to the model: head.weight"),
    (lambda: {**original(), "decoder_blocks.1.norm1.bias": drawn(16)}, "unknown to the model: decoder_blocks.1.norm1"),
    (lambda: {**original(), "cls_token": drawn(1, 1, 8)}, "encoder.cls_token is (1, 1, 8) in the weights and (1, 1,"),
    (lambda: {**original(), "decoder_pred.bias": drawn(27)}, "decoder.pred.bias is (27,) in the weights and (48,)"),
    (
        lambda: {**original(), "pos_embed": LARGER},
        f"pos_embed {COMPUTED}{DIM}); the weights have (1, 197,",
    ),
    (
        lambda: {**original(), "decoder_pos_embed": TURNED},
        f"decoder_pos_embed {COMPUTED}16); the weights have (1, 97, 16) with other",
    ),
    (released, f"decoder_pos_embed {COMPUTED}16); the weights have none"),
    (lambda: {"state_dict": {}}, f"pos_embed {COMPUTED}{DIM}); the weights have none"),
]


@pytest.mark.parametrize(("weights", "line"), WRONG, ids=[line[:50] for _, line in WRONG])
def test_what_does_not_fit_changes_nothing(weights, line):
    mae = autoencoder()
    before = {key: value.clone() for key, value in mae.state_dict().items()}
    with pytest.raises(ValueError) as error:  # noqa: PT011
        mae.load_original_state_dict(weights())
    assert line in str(error.value)
    assert "\n" not in str(error.value)
    assert same(mae.state_dict(), before)


@pytest.mark.parametrize(
    ("spec", "decoder_spec", "found"),
    [
        ("rope_axial", "sincos2d", "rope_axial"),
        ("sincos2d", "none", "none"),
        ("sincos2d+alibi2d", "sincos2d", "sincos2d, alibi2d"),
        ("learned", "sincos2d+peg", "sincos2d, peg"),
    ],
)
def test_encodings_without_a_place_in_the_format(spec, decoder_spec, found):
    mae = autoencoder(spec, decoder_spec)
    line = f"the original format of MAE has one table, sincos2d or learned; this model has: {found}"
    for attempt in (mae.original_state_dict, lambda: mae.load_original_state_dict(original())):
        with pytest.raises(ValueError, match="original format") as error:
            attempt()
        assert str(error.value) == line


def test_a_learned_table_of_another_grid():
    weights = {**original(), "pos_embed": drawn(1, 65, DIM)}
    with pytest.raises(ValueError, match=r"encoder\.pos_embed is \(1, 65, 48\) in the weights and \(1, 97, 48\)"):
        autoencoder("learned").load_original_state_dict(weights)
    weights["pos_embed"] = vp.resize_position_table(weights["pos_embed"], GRID, (8, 8), 1)
    mae = autoencoder("learned")
    mae.load_original_state_dict(weights)
    assert torch.equal(mae.encoder.pos_embed, weights["pos_embed"])
