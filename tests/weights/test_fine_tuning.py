"""Weights loaded through timm's entry points into a model of another shape: adapted as timm adapts those of its own.

The second source is plain timm, in the same call with weights of the same values.
"""

import pytest
import timm
import torch
from timm.models import save_for_hf

import visionpos as vp
from tests.small import needs_newer_timm, pictures, randomised
from tests.tiny_timm_models import small

# timm records the arguments of a model since 1.0.31
COLUMN = {"img_size": (32, 64), "patch_size": 8, "embed_dim": 48, "depth": 1, "num_heads": 3, "num_classes": 7}
PYRAMID = {"img_size": (64, 128), "window_size": 4, "embed_dim": 24, "depths": (1, 1), "num_heads": (2, 4)}
HOSTS = {
    "vit_tiny_patch16_224": (COLUMN, "learned"),
    "beit_base_patch16_224": (COLUMN, "relative_table"),
    "eva02_tiny_patch14_224": (COLUMN, "learned+rope_eva"),
    "vit_small_patch16_rope_mixed_224": (COLUMN, "rope_mixed"),
    "cait_xxs24_224": (COLUMN, "learned"),
    "samvit_base_patch16_224": (COLUMN, None),
    "swin_tiny_patch4_window7_224": ({**PYRAMID, "num_classes": 7}, "relative_table"),
    "swinv2_tiny_window8_256": ({**PYRAMID, "num_classes": 7}, "log_cpb"),
    "hiera_tiny_224": ({"img_size": (64, 96), "stages": (1, 1, 1, 1), "num_classes": 7}, None),
}
HALVED = {"patch_size": 4, "img_size": (16, 32)}
CHANGES = {  # of shapes, and the families in which timm itself cannot
    "num_classes=5": ({"num_classes": 5}, ()),
    "num_classes=0": ({"num_classes": 0}, ()),
    "in_chans=1": ({"in_chans": 1}, ()),
    "in_chans=5": ({"in_chans": 5, "num_classes": 3}, ()),
    "patch_size": (HALVED, ("cait", "samvit", "hiera", "swin")),
    "patches of a Swin": ({"patch_size": 2, "img_size": (32, 64)}, ("vit", "beit", "eva", "cait", "sam", "hiera")),
    "img_size": ({"img_size": (96, 128)}, ("beit", "cait", "hiera")),
}
CASES = [(h, c) for h in HOSTS for c, (_, cannot) in CHANGES.items() if not h.startswith(cannot) or h[:4] == "vits"]


def loaded(model, folder, **change):
    save_for_hf(model, folder)
    return timm.create_model(f"local-dir:{folder}", pretrained=True, **change).eval()


@needs_newer_timm
@pytest.mark.parametrize(("host", "change"), CASES, ids=str)
def test_another_shape_gives_what_timm_gives(host, change, tmp_path):
    options, spec = HOSTS[host]
    plain, change = randomised(timm.create_model(host, **options)), CHANGES[change][0]
    own = vp.create_model(host, **options)
    own.load_state_dict(plain.state_dict())
    names = [encoding.name for encoding in vp.get_encoding(own)] if spec is None else spec
    own = vp.set_encoding(own, list(dict.fromkeys(names)) if spec is None else names)
    want, seen = loaded(plain, tmp_path / "plain", **change), loaded(own, tmp_path / "own", **change)
    assert seen.num_classes == change.get("num_classes", 7)
    x = pictures(change.get("img_size", options["img_size"]), channels=change.get("in_chans", 3))
    assert (seen.forward_features(x) - want.forward_features(x)).abs().max() < 2e-5
    if "num_classes" not in change:
        assert (seen(x) - want(x)).abs().max() < 2e-5
    again = loaded(seen, tmp_path / "again")
    assert torch.equal(again(x), seen(x))


@needs_newer_timm
@pytest.mark.parametrize("window", [8, (2, 4)])
def test_another_window(window, tmp_path):
    model = randomised(vp.create_model("swin_tiny_patch4_window7_224", "relative_table+rope_mixed", **PYRAMID))
    found, name = loaded(model, tmp_path, window_size=window), "layers.1.blocks.0.attn.relative_position_bias_table"
    new = (window, window) if isinstance(window, int) else window
    assert torch.equal(found.state_dict()[name], vp.resize_relative_table(model.state_dict()[name], new, (4, 4)))
    assert torch.equal(
        found.state_dict()["layers.1.blocks.0.attn.qkv.weight"], model.layers[1].blocks[0].attn.qkv.weight
    )
    model.set_input_size(window_size=new)
    assert (found(pictures((64, 128))) - model(pictures((64, 128)))).abs().max() < 2e-5


SPECS = ("rope_axial", "learned+rope_mixed", "relative_table+peg")


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize(
    "change", [{"num_classes": 5}, {"in_chans": 1}, {"patch_size": 8, "img_size": (64, 96)}], ids=str
)
def test_an_entry_point_and_a_host_by_name(spec, change):
    """Every tensor of the same shape has the values of the file; the others are timm's."""
    weights = randomised(small(encoding=spec)).state_dict()
    shape = {"depth": 2, "embed_dim": 48, "num_heads": 3, "img_size": (32, 48), "patch_size": 4, "class_token": False}
    shape |= {"global_pool": "avg", "mlp_ratio": 2.0, "encoding": spec, **change}
    overlay = {"state_dict": weights, "num_classes": 10, "input_size": (3, 32, 48)}
    for name, host in (("visionpos_vit_xs_patch4_32", {}), ("visionpos", {"host": "vit_tiny_patch16_224"})):
        known = timm.get_pretrained_cfg("vit_tiny_patch16_224").to_dict() if host else {}
        given = {"pretrained_cfg": {**known, **overlay}} if host else {"pretrained_cfg_overlay": overlay}
        model = timm.create_model(name, pretrained=True, **{"num_classes": 10, **shape}, **host, **given)
        found = model.state_dict()
        assert list(found) == list(weights)
        changed = {key for key, value in found.items() if not torch.equal(value, weights[key])}
        want = {"num_classes": {"head.weight", "head.bias"}}.get(next(iter(change)), {"patch_embed.proj.weight"})
        assert changed == want
