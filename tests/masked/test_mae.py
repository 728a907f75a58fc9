"""What people do to a model, on masked autoencoders around every kind of encoder; pictures; mistakes."""

import copy
import pickle
from functools import partial

import pytest
import timm
import torch
from timm.layers import HybridEmbed
from timm.optim import param_groups_layer_decay

import visionpos as vp
from tests.masked.tiny_mae import OTHER, SIZE, autoencoder, drawn, vit
from tests.small import pictures
from visionpos.analysis.zoo import build

ENCODERS = {
    "class token": {},
    "registers": {"reg_tokens": 2},
    "no prefix": {"class_token": False, "global_pool": "avg"},
    "class token, not encoded": {"no_embed_class": True, "reg_tokens": 1},
    "average with class token": {"global_pool": "avg"},
    "average without fc_norm": {"global_pool": "avg", "fc_norm": False},
}


def unused(mae):
    """The classifier, which reconstruction does not touch."""
    return {f"encoder.{name}" for name, _ in mae.encoder.named_parameters() if name.startswith("head")}


def check_gradients(mae, images):
    mae.train()
    torch.manual_seed(0)
    mae(images).loss.backward()
    for name, parameter in mae.named_parameters():
        assert (parameter.grad is None) == (name in unused(mae)), name
        assert parameter.grad is None or parameter.grad.isfinite().all(), name
    names = mae.no_weight_decay()
    assert {"encoder." + name for name in mae.encoder.no_weight_decay()} < names  # timm names some that are not there
    assert {name for name in names if not name.startswith("encoder.")} <= set(dict(mae.named_parameters()))


@pytest.mark.parametrize("spec", ["sincos2d", "learned", "rope_mixed", "relative_table"])
@pytest.mark.parametrize("options", ENCODERS.values(), ids=list(ENCODERS))
def test_prefix_tokens(options, spec):
    mae, images = autoencoder(vit(spec, **options), spec), pictures(SIZE)
    assert mae(images).prediction.shape == (2, 24, 48)
    features = mae.encode(images, drawn(mae, images).keep)
    assert features.shape == (2, mae.encoder.num_prefix_tokens + 6, 48)
    assert (features.mean(-1).abs() < 1e-5).all()  # normalised, before the weights move
    check_gradients(mae, images)


@pytest.mark.parametrize("spec", vp.list_encodings())
def test_every_encoding_in_encoder_and_decoder(spec):
    check_gradients(autoencoder(vit(spec, depth=1), spec), pictures(SIZE))


@pytest.mark.parametrize("family", ["DeiT, distilled", "EVA-02", "DINOv3", "BEiT", "ViT, relative bias"])
def test_other_hosts_with_their_own_positions(family):
    encoder, size = build(family)
    for module in encoder.modules():
        if hasattr(module, "drop_prob"):
            module.drop_prob = 0.0
    check_gradients(autoencoder(encoder), pictures(size))


@pytest.mark.parametrize("spec", ["none", "learned", "sincos2d", "rope_mixed+alibi2d", "relative_table+peg"])
def test_the_encoder_is_the_timm_model_that_was_given(spec, tmp_path):
    mae = autoencoder(vit(spec))
    mae(pictures(SIZE)).loss.backward()
    torch.optim.SGD(mae.parameters(), lr=0.1).step()
    plain = vit(spec).eval()
    assert isinstance(mae.encoder, timm.models.vision_transformer.VisionTransformer)
    assert list(mae.encoder.state_dict()) == list(plain.state_dict())
    plain.load_state_dict(mae.encoder.state_dict(), strict=True)
    assert torch.equal(plain(pictures(SIZE)), mae.encoder.eval()(pictures(SIZE)))
    size = {"img_size": SIZE, "patch_size": 4, "embed_dim": 48, "depth": 2, "num_heads": 3, "num_classes": 5}
    arguments = {"encoding": spec, "host": "vit_tiny_patch16_224", **size}
    timm.models.save_for_hf(mae.encoder, tmp_path, model_args=arguments)
    loaded = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert torch.equal(loaded(pictures(SIZE)), mae.encoder(pictures(SIZE)))


def test_layer_decay_of_the_encoder():
    encoder = autoencoder(vit("rope_mixed")).encoder
    groups = param_groups_layer_decay(
        encoder, 0.05, no_weight_decay_list=encoder.no_weight_decay(), layer_decay=0.5, min_scale=0.0
    )
    scale = {id(parameter): group["lr_scale"] for group in groups for parameter in group["params"]}
    named = dict(encoder.named_parameters())
    assert [scale[id(named[f"blocks.{i}.attn.encodings.0.freqs"])] for i in range(2)] == [0.25, 0.5]
    assert scale[id(named["cls_token"])] == 0.125
    assert scale[id(named["head.weight"])] == 1


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda mae: pickle.loads(pickle.dumps(mae))], ids=["deep", "pickle"])
@pytest.mark.parametrize("spec", ["sincos2d", "learned+rope_mixed", "relative_table+peg"])
def test_copies(spec, copied):
    mae, images = autoencoder(vit(spec), spec), pictures(SIZE)
    mask = drawn(mae, images)
    want = mae(images, mask)
    want.loss.backward()
    other = copied(mae)
    assert torch.equal(other(images, mask).prediction, want.prediction)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(-3)
    assert not torch.equal(other(images, mask).prediction, want.prediction)
    assert torch.equal(mae(images, mask).prediction, want.prediction)


@pytest.mark.parametrize("family", ["ViT, class token", "EVA-02", "BEiT"])
def test_gradient_checkpointing_of_the_encoder(family):
    encoder, size = build(family, depth=2, drop_path_rate=0.0)
    mae = autoencoder(vp.set_encoding(encoder, "learned+rope_mixed+relative_table")).train()
    images = pictures(size)
    masks = [drawn(mae, images, seed) for seed in (2, 3)]

    def gradients():
        mae.zero_grad()
        sum(mae(images, mask).loss for mask in masks).backward()
        return [parameter.grad for parameter in mae.parameters() if parameter.grad is not None]

    want = [gradient.clone() for gradient in gradients()]
    mae.encoder.set_grad_checkpointing()
    assert all((a - b).abs().max() < 1e-6 for a, b in zip(want, gradients(), strict=True))


@pytest.mark.parametrize("spec", ["sincos2d", "learned", "rope_axial", "alibi2d", "relative_table", "peg"])
def test_pictures_of_any_size(spec):
    mae = autoencoder(vit(spec, dynamic_img_size=True), spec)
    for size in (SIZE, OTHER, (32, 8)):
        result, patches = mae(pictures(size)), size[0] * size[1] // 16
        assert result.prediction.shape == (2, patches, 48)
        assert (~result.mask.hidden).sum() == 2 * (patches // 4)
        assert result.loss.isfinite()
        assert mae.reconstruct(pictures(size), result).shape == (2, 3, *size)


@pytest.mark.parametrize("spec", ["sincos2d", "learned", "rope_axial", "relative_table"])
def test_set_input_size(spec):
    mae = autoencoder(vit(spec), spec).eval()
    dynamic = autoencoder(vit(spec, dynamic_img_size=True), spec).eval()
    dynamic.load_state_dict(mae.state_dict(), strict=True)
    mae.set_input_size(OTHER)
    images = pictures(OTHER)
    mask = drawn(mae, images)
    assert (mae(images, mask).prediction - dynamic(images, mask).prediction).abs().max() < 1e-5
    with pytest.raises(ValueError, match="pictures of \\(16, 24\\) pixels, but the encoder takes \\(24, 32\\)"):
        mae(pictures(SIZE))


@pytest.mark.parametrize("spec", ["sincos2d", "learned+rope_axial", "relative_table+lepe"])
def test_bfloat16(spec):
    mae, images = autoencoder(vit(spec), spec), pictures(SIZE)
    mask = drawn(mae, images)
    want = mae(images, mask)
    with torch.autocast("cpu", torch.bfloat16):
        got = mae(images, mask)
    assert got.loss.dtype == torch.float32
    assert got.prediction.dtype == torch.bfloat16
    assert (got.loss - want.loss).abs() < 0.02 * want.loss
    got.loss.backward()
    half = copy.deepcopy(mae).bfloat16()(images.bfloat16(), mask)
    assert (half.loss - want.loss).abs() < 0.03 * want.loss
    assert mae.reconstruct(images.bfloat16(), half).dtype == torch.bfloat16


@pytest.mark.unhooked
@pytest.mark.parametrize(
    "spec", [pytest.param("sincos2d", marks=pytest.mark.slow), "learned+rope_mixed+relative_table"]
)
def test_compiled(spec):
    torch._dynamo.reset()
    mae, images = autoencoder(vit(spec, depth=1), spec), pictures(SIZE)
    mask = drawn(mae, images)
    compiled = torch.compile(mae, fullgraph=True, backend="aot_eager")
    want, got = mae(images, mask), compiled(images, mask)
    assert (want.prediction - got.prediction).abs().max() < 1e-5
    assert (want.loss - got.loss).abs() < 1e-5
    got.loss.backward()


# --- pictures ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm_pix_loss", [True, False])
def test_reconstruct_and_visible(norm_pix_loss):
    mae, images = autoencoder(norm_pix_loss=norm_pix_loss), pictures(SIZE)
    result = mae(images)
    seen = ~result.mask.hidden.unflatten(1, (4, 6)).repeat_interleave(4, 1).repeat_interleave(4, 2)[:, None]
    seen = seen.expand_as(images)
    picture, visible = mae.reconstruct(images, result), mae.visible(images, result.mask)
    assert torch.equal(picture[seen], images[seen])  # bit by bit
    assert torch.equal(visible[seen], images[seen])
    assert not visible[~seen].any()
    assert (picture[~seen] - images[~seen]).abs().mean() > 0.1
    patches = images.unflatten(3, (6, 4)).unflatten(2, (4, 4)).permute(0, 2, 4, 3, 5, 1).flatten(1, 2).flatten(2)
    if norm_pix_loss:
        patches = (patches - patches.mean(-1, keepdim=True)) / (patches.var(-1, keepdim=True) + 1e-6).sqrt()
    perfect = result._replace(prediction=patches)
    assert (mae.reconstruct(images, perfect) - images).abs().max() < 1e-6
    assert mae.loss(images, patches, result.mask.hidden) < 1e-12
    unseen = images.masked_fill(~seen, float("nan"))
    assert torch.equal(mae.visible(unseen, result.mask), visible)


# --- mistakes ---------------------------------------------------------------------------------------------------------

SWIN = {"img_size": (32, 64), "window_size": 4, "embed_dim": 24, "depths": (1, 1), "num_heads": (2, 2)}
OVERLAPPING = partial(HybridEmbed, backbone=torch.nn.Conv2d(3, 8, 3, stride=2, padding=1))
WRONG = [
    (lambda: autoencoder(mask_ratio=1.0), "mask_ratio must lie between 0 and 0.95, got 1.0"),
    (lambda: autoencoder(masking="blocks"), "masking must be one of random, block, grid, got 'blocks'"),
    (lambda: autoencoder(decoder_depth=0), "decoder_depth must be a positive multiple of 1 (blocks), got 0"),
    (lambda: autoencoder(decoder_num_heads=3), "decoder_dim must be a positive multiple of 3"),
    (lambda: autoencoder(decoder_dim=18), "dim must be a positive multiple of 4"),
    (lambda: autoencoder(decoder_encoding="sincos"), "unknown encoding 'sincos'"),
    (lambda: autoencoder(vit(patch_drop_rate=0.5)), "build the encoder with patch_drop_rate=0"),
    (lambda: autoencoder(torch.nn.Linear(2, 2)), "Linear is not a supported host"),
    (lambda: autoencoder(timm.create_model("swin_tiny_patch4_window7_224", **SWIN)), "for Swin there is SimMIM"),
    (lambda: autoencoder(build("Hiera")[0]), "takes an encoder that can run on a subset of its patches"),
    (lambda: autoencoder(build("SAM")[0]), "takes an encoder that can run on a subset of its patches"),
    (lambda: autoencoder(vit(embed_layer=OVERLAPPING)), "not HybridEmbed"),
    (lambda: autoencoder()(pictures((24, 16))), "pictures of (24, 16) pixels, but the encoder takes (16, 24)"),
    (
        lambda: autoencoder(vit(dynamic_img_size=True))(pictures((18, 24))),
        "pictures of (18, 24) pixels are not whole patches of (4, 4) pixels",
    ),
    (lambda: autoencoder()(torch.randn(2, 1, 16, 24)), "pictures (B, 3, H, W) are needed, got (2, 1, 16, 24)"),
    (
        lambda: autoencoder()(pictures(SIZE), vp.draw_mask((6, 4), 3)),
        "a mask of (3, 24) patches for 2 pictures of 4 x 6 patches",
    ),
]


@pytest.mark.parametrize(("mistake", "line"), WRONG, ids=[line for _, line in WRONG])
def test_mistakes_are_one_line(mistake, line):
    with pytest.raises(ValueError) as error:  # noqa: PT011
        mistake()
    assert line in str(error.value)
    assert "\n" not in str(error.value)
