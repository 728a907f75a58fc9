"""`features_only=True`: the levels and the layout of the host, with the encodings kept and registered."""

import pickle

import pytest
import timm
import torch

import visionpos as vp
from tests.small import SWIN, VIT, needs_newer_timm, pictures, randomised

SMALL = {**VIT, "depth": 4}
PYRAMID = {**SWIN, "depths": (1, 1, 1), "num_heads": (2, 4, 4)}
HOSTS = {
    "vit_tiny_patch16_224": SMALL,
    "vit_small_patch16_rope_mixed_224": SMALL,
    "beit_base_patch16_224": SMALL,
    "vit_relpos_small_patch16_224": SMALL,
    "cait_xxs24_224": SMALL,
    "samvit_base_patch16_224": SMALL,
    "swin_tiny_patch4_window7_224": PYRAMID,
    "swinv2_tiny_window8_256": PYRAMID,
    "hiera_tiny_224": {"img_size": (64, 96)},
}
ROUTES = {
    "vp": vp.create_model,
    "timm": lambda host, **options: timm.create_model("visionpos", host=host, **options),
}


@pytest.mark.parametrize("levels", [{}, {"out_indices": (0, 2)}], ids=str)
@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("host", HOSTS)
def test_levels_and_layout_are_the_hosts(host, route, levels):
    options = {**HOSTS[host], "features_only": True, **levels}
    x = pictures(options["img_size"])
    want = timm.create_model(host, **options).eval()
    model = randomised(ROUTES[route](host, encoding="learned+rope_mixed", **options))
    found = model(x)
    assert [level.shape for level in found] == [level.shape for level in want(x)]
    assert model.feature_info.channels() == want.feature_info.channels()
    assert model.feature_info.reduction() == want.feature_info.reduction()
    table = [p for name, p in model.named_parameters() if name.endswith("pos_embed")]
    assert len(table) == 1
    sum(level.sum() for level in found).backward()
    assert table[0].grad.abs().sum() > 0
    assert torch.equal(pickle.loads(pickle.dumps(model))(x)[-1], found[-1])


@pytest.mark.parametrize("host", ["vit_tiny_patch16_224", "swin_tiny_patch4_window7_224"])
def test_features_are_those_of_the_whole_model(host):
    """Encodings know the depth of the model, not that of what is left of it."""
    options = {**HOSTS[host], "encoding": "learned+lookhere"}
    whole = randomised(vp.create_model(host, **options))
    features = vp.create_model(host, **options, features_only=True, out_indices=(0, 1)).eval()
    features.model.load_state_dict(whole.state_dict(), strict=False)
    x = pictures(options["img_size"])
    want = whole.forward_intermediates(x, indices=[0, 1], output_fmt="NCHW", intermediates_only=True)
    want = [level.permute(0, 2, 3, 1) if "swin" in host else level for level in want]
    assert all(torch.equal(a, b) for a, b in zip(features(x), want, strict=True))


@needs_newer_timm
@pytest.mark.parametrize("host", ["vit_tiny_patch16_224", "swin_tiny_patch4_window7_224"])
def test_what_timm_records_makes_the_extractor_again(host):
    options = {**HOSTS[host], "encoding": "learned+lookhere"}
    features = randomised(vp.create_model(host, **options, features_only=True, out_indices=(0, 1)))
    x, architecture = pictures(options["img_size"]), features.pretrained_cfg["architecture"]
    again = timm.create_model(architecture, **features._model_args).eval()
    again.load_state_dict(features.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(features(x), again(x), strict=True))


def test_a_wrapper_that_takes_the_model_apart():
    with pytest.raises(ValueError, match=r"feature_cls must be 'getter'.*got 'hook'"):
        vp.create_model("vit_tiny_patch16_224", "learned", features_only=True, feature_cls="hook")
