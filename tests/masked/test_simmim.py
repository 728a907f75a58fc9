"""SimMIM for Swin: hidden patches are mask tokens, and nothing of their pixels is seen."""

import copy
import pickle

import pytest
import timm
import torch

import visionpos as vp
from tests import small
from tests.small import pictures
from visionpos.analysis.zoo import build

SIZE, GRID = (32, 64), (4, 8)  # two stages of patches of 4: units of 8 pixels
VERSIONS = ["swin_tiny_patch4_window7_224", "swinv2_tiny_window8_256"]


def swin(name=VERSIONS[0], spec=None, **options):
    return small.swin(spec, name=name, **{"img_size": SIZE, "embed_dim": 24, "depths": (2, 1), **options})


def simmim(name=VERSIONS[0], spec=None, *, mask_ratio=0.6, norm_pix_loss=False, masking="random", **options):
    model = vp.SimMIM(swin(name, spec, **options), mask_ratio, norm_pix_loss, masking)
    with torch.no_grad():  # every weight matters, timm's tables and norms too
        for index, parameter in enumerate(model.parameters()):
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(index)))
    return model.eval()


def drawn(model, images, seed=2):
    return model.draw_mask(images, torch.Generator().manual_seed(seed))


def pixels(hidden, grid=GRID, unit=8):
    """(B, N) -> (B, 1, H, W), True where a pixel is hidden."""
    return hidden.unflatten(1, grid).repeat_interleave(unit, 1).repeat_interleave(unit, 2)[:, None]


@pytest.mark.parametrize(("depths", "unit"), [((1,), 4), ((2, 1), 8), ((1, 1, 1), 16)])
@pytest.mark.parametrize("name", VERSIONS)
def test_the_unit_is_what_a_token_of_the_last_stage_stands_for(name, depths, unit):
    model = simmim(name, depths=depths, num_heads=(2, 4, 4)[: len(depths)])
    assert model.patch_size == (unit, unit)
    result = model(pictures(SIZE))
    patches = SIZE[0] * SIZE[1] // unit**2
    assert result.prediction.shape == (2, patches, 3 * unit**2)
    assert result.mask.hidden.sum() == 2 * (patches - int(patches * 0.4 + 1e-6))


@pytest.mark.parametrize("spec", [None, "learned+rope_axial", "sincos2d+alibi2d", "peg", "none"])
@pytest.mark.parametrize("name", VERSIONS)
def test_hidden_pixels_are_the_target_and_nothing_else(name, spec):
    model, images = simmim(name, spec), pictures(SIZE)
    mask = drawn(model, images)
    hidden = pixels(mask.hidden).expand_as(images)
    with torch.no_grad():
        result, other = model(images, mask), model(torch.where(hidden, pictures(SIZE, seed=5), images), mask)
        moved = model(torch.where(hidden, images, pictures(SIZE, seed=5)), mask)
        again = model(images, generator=torch.Generator().manual_seed(2))
    assert torch.equal(result.prediction, other.prediction)
    assert (result.loss - other.loss).abs() > 1e-3
    assert (result.prediction - moved.prediction).abs().max() > 1e-3
    assert torch.equal(result.prediction, again.prediction)


@pytest.mark.parametrize("norm_pix_loss", [False, True])
def test_the_loss_is_the_mean_absolute_error_of_hidden_pixels(norm_pix_loss):
    model, images = simmim(norm_pix_loss=norm_pix_loss).double(), pictures(SIZE).double()
    loss, prediction, mask = model(images)
    total, count = 0.0, 0
    for sample in range(2):
        for index in mask.hidden[sample].nonzero().flatten().tolist():
            y, x = divmod(index, GRID[1])
            target = images[sample, :, 8 * y : 8 * y + 8, 8 * x : 8 * x + 8].permute(1, 2, 0).flatten()
            if norm_pix_loss:
                target = (target - target.mean()) / (target.var() + 1e-6).sqrt()
            total, count = total + (prediction[sample, index] - target).abs().sum(), count + 192
    assert (loss - total / count).abs() < 1e-12


@pytest.mark.parametrize("name", VERSIONS)
def test_the_mask_token_takes_the_place_of_patches_before_positions_are_added(name):
    """The same by other means: a stem that gives out mask tokens, in the model as timm runs it."""
    model, images = simmim(name, "learned+relative_table"), pictures(SIZE)
    mask = drawn(model, images)
    hidden = pixels(mask.hidden, unit=2).movedim(1, -1)
    stem, token = model.encoder.patch_embed, model.mask_token
    assert stem.norm.weight.ndim == 1  # the mask token is not normalised by it
    with torch.no_grad():
        forward = type(stem).forward
        stem.forward = lambda x: torch.where(hidden, token, forward(stem, x))
        want = model.pred(model.encoder.forward_features(images).flatten(1, 2))
        del stem.forward
        got = model(images, mask).prediction
        assert (got - want).abs().max() < 1e-6
        model.encoder.pos_embed_input[0].pos_embed.mul_(-1)
        assert (model(images, mask).prediction - got).abs().max() > 1e-3


@pytest.mark.parametrize("name", VERSIONS)
def test_without_a_mask_it_is_the_encoder(name):
    model, images = simmim(name, "sincos2d+rope_axial", mask_ratio=0.0), pictures(SIZE)
    result = model(images)
    assert result.loss == 0
    assert torch.equal(result.prediction, model.pred(model.encoder.forward_features(images).flatten(1, 2)))


SPECS = ["learned+relative_table", "sincos2d+rope_mixed", "log_cpb", "peg+lepe", "none"]


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("name", VERSIONS)
def test_every_parameter_learns(name, spec):
    model = simmim(name, spec, drop_path_rate=0.0).train()
    model(pictures(SIZE)).loss.backward()
    for key, parameter in model.named_parameters():
        assert (parameter.grad is None) == key.startswith("encoder.head"), key
        assert parameter.grad is None or parameter.grad.isfinite().all()
    assert model.mask_token.grad.abs().max() > 0
    names = model.no_weight_decay()
    assert "mask_token" in names
    assert {f"encoder.{key}" for key in model.encoder.no_weight_decay()} == names - {"mask_token"}


@pytest.mark.parametrize("name", VERSIONS)
def test_the_encoder_is_the_timm_model_that_was_given(name):
    shape = {"img_size": SIZE, "window_size": 4, "embed_dim": 24, "depths": (2, 1), "num_heads": (2, 4)}
    model, plain = simmim(name), timm.create_model(name, **shape, num_classes=5)
    model(pictures(SIZE)).loss.backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    assert isinstance(model.encoder, type(plain))
    plain.load_state_dict(model.encoder.state_dict(), strict=True)
    assert (plain.eval()(pictures(SIZE)) - model.encoder.eval()(pictures(SIZE))).abs().max() < 1e-5


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deep", "pickle"])
def test_copies(copied):
    model, images = simmim(spec="learned+rope_mixed"), pictures(SIZE)
    mask = drawn(model, images)
    want = model(images, mask).prediction
    other = copied(model)
    assert torch.equal(other(images, mask).prediction, want)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(-3)
    assert not torch.equal(other(images, mask).prediction, want)
    assert torch.equal(model(images, mask).prediction, want)


@pytest.mark.parametrize("name", VERSIONS)
def test_gradient_checkpointing(name):
    model = simmim(name, "learned+relative_table", drop_path_rate=0.0).train()
    mask = drawn(model, pictures(SIZE))

    def gradients():
        model.zero_grad()
        model(pictures(SIZE), mask).loss.backward()
        return [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]

    want = gradients()
    model.encoder.set_grad_checkpointing()
    assert all((a - b).abs().max() < 1e-6 for a, b in zip(want, gradients(), strict=True))


def test_other_sizes():
    model = simmim(strict_img_size=False)
    for size in (SIZE, (48, 32)):
        assert model(pictures(size)).prediction.shape == (2, size[0] * size[1] // 64, 192)
    model = simmim(spec="learned+relative_table")
    model.set_input_size((64, 32))
    assert model(pictures((64, 32))).loss.isfinite()
    with pytest.raises(ValueError, match=r"pictures of \(32, 64\) pixels, but the encoder takes \(64, 32\)"):
        model(pictures(SIZE))


@pytest.mark.parametrize("masking", ["random", "block", "grid"])
def test_reconstruct_and_visible(masking):
    model, images = simmim(masking=masking), pictures(SIZE)
    with torch.no_grad():
        result = model(images)
        picture, visible = model.reconstruct(images, result), model.visible(images, result.mask)
    hidden = pixels(result.mask.hidden).expand_as(images)
    assert torch.equal(picture[~hidden], images[~hidden])
    assert torch.equal(visible[~hidden], images[~hidden])
    assert not visible[hidden].any()
    at = result.mask.hidden[0].nonzero()[0].item()
    y, x = divmod(at, GRID[1])
    patch = picture[0, :, 8 * y : 8 * y + 8, 8 * x : 8 * x + 8]
    assert torch.equal(patch, result.prediction[0, at].view(8, 8, 3).permute(2, 0, 1))


def test_bfloat16():
    model, images = simmim(spec="learned+rope_axial"), pictures(SIZE)
    mask = drawn(model, images)
    with torch.autocast("cpu", torch.bfloat16):
        loss, prediction, _ = model(images, mask)
    assert loss.dtype == torch.float32
    assert prediction.isfinite().all()
    assert (loss - model(images, mask).loss).abs() < 0.02 * loss


@pytest.mark.unhooked
def test_compiled():
    torch._dynamo.reset()
    model, images = simmim(spec="learned+rope_axial", depths=(1,), num_heads=(2,)), pictures(SIZE)
    mask = drawn(model, images)
    got = torch.compile(model, fullgraph=True, backend="aot_eager")(images, mask)
    assert (got.prediction - model(images, mask).prediction).abs().max() < 1e-5


WRONG = [
    (lambda: vp.SimMIM(build("BEiT")[0]), "for ViT-like models there is MaskedAutoencoder"),
    (lambda: vp.SimMIM(build("Hiera")[0]), "SimMIM takes a Swin or Swin v2, not EncodedHiera"),
    (lambda: vp.SimMIM(torch.nn.Linear(2, 2)), "Linear is not a supported host"),
    (lambda: simmim(mask_ratio=-0.1), "mask_ratio must lie between 0 and 0.95, got -0.1"),
    (lambda: simmim(masking="blocks"), "masking must be one of random, block, grid, got 'blocks'"),
    (lambda: simmim()(pictures((64, 32))), "pictures of (64, 32) pixels, but the encoder takes (32, 64)"),
    (
        lambda: simmim(strict_img_size=False)(pictures((36, 64))),
        "pictures of (36, 64) pixels are not whole patches of (8, 8) pixels",
    ),
    (
        lambda: simmim()(pictures(SIZE), vp.draw_mask((8, 16), 2)),
        "a mask of (2, 128) patches for 2 pictures of 4 x 8 patches",
    ),
]


@pytest.mark.parametrize(("mistake", "line"), WRONG, ids=[line for _, line in WRONG])
def test_mistakes_are_one_line(mistake, line):
    with pytest.raises(ValueError) as error:  # noqa: PT011
        mistake()
    assert line in str(error.value)
    assert "\n" not in str(error.value)
