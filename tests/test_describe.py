"""The table of what encodes position in a model, converted or not; the model stays as it was."""

import pytest
import timm
import torch

import visionpos as vp
from tests.small import SWIN, VIT, pictures, swin, vit
from visionpos.encoding import PositionEncoding

HOSTS = {
    "vit_tiny_patch16_224": VIT,
    "deit_tiny_distilled_patch16_224": VIT,
    "vit_small_patch16_rope_mixed_224": VIT,
    "vit_small_patch16_dinov3": VIT,
    "beit_base_patch16_224": VIT,
    "vit_relpos_small_patch16_224": VIT,
    "cait_xxs24_224": VIT,
    "swin_tiny_patch4_window7_224": SWIN,
    "swinv2_tiny_window8_256": SWIN,
    "hiera_tiny_224": {"img_size": (64, 96), "stages": (1, 1, 1, 1), "num_classes": 5},
    "samvit_base_patch16_224": {**VIT, "img_size": 32},
}


@pytest.mark.parametrize("name", HOSTS)
def test_a_plain_model_is_described_and_not_changed(name):
    model = timm.create_model(name, **HOSTS[name])
    classes, tensors = [type(m) for m in model.modules()], dict(model.state_dict(keep_vars=True))
    rows = vp.describe(model).rows
    assert [type(m) for m in model.modules()] == classes
    after = model.state_dict(keep_vars=True)
    assert list(after) == list(tensors)
    assert all(after[key] is tensor for key, tensor in tensors.items())
    assert not any(isinstance(module, PositionEncoding) for module in model.modules())
    assert {row[2] for row in rows} == {encoding.name for encoding in vp.get_encoding(model)}
    assert vp.describe(model).rows == rows  # now converted


def test_the_rows():
    spec = ["sincos2d", {"name": "alibi2d", "layers": "1::2"}, {"name": "lookhere", "layers": [0, 1, 3]}]
    model = vit(spec, depth=4)
    before = model(pictures())
    rows = vp.describe(model).rows
    assert rows[0] == ("stem", "input", "sincos2d", "", "8 x 12", "coordinates interpolated into 8 x 12")
    assert [row[:3] for row in rows[1:]] == [
        ("0 - 1, 3", "bias", "lookhere"),
        ("1, 3", "bias", "alibi2d"),
    ]
    assert torch.equal(model(pictures()), before)
    kept = vp.describe(swin()).rows
    assert kept == (("0 - 3", "bias", "relative_table", "", "4 x 4", "the table is resized"),)
    runs = vit({"name": "rope_axial", "temperature": 7.0, "extrapolate": True, "layers": [1, 2, 3]}, depth=5)
    assert vp.describe(runs).rows == (
        ("0", "", "no position at all", "", "", ""),
        ("1 - 3", "rotary", "rope_axial", "temperature=7.0, extrapolate=True", "8 x 12", "coordinates run on"),
    )


def test_nothing_at_all():
    assert vp.describe(vit("none", depth=3)).rows == (("0 - 2", "", "no position at all", "", "", ""),)
    mixed = vp.describe(vit("peg", depth=3)).rows  # behind the first block
    assert [row[:3] for row in mixed] == [("0", "conditional", "peg")]
    assert vp.describe(swin("none")).rows[0][2] == "no position at all"


def test_text_and_notebook():
    described = vp.describe(vit("rope_axial+learned"))
    lines = str(described).splitlines()
    assert repr(described) == str(described)
    assert lines[0] == "VisionTransformer"
    assert lines[1].split() == ["layers", "place", "encoding", "options", "grid", "on", "another", "grid"]
    assert [line.index("8 x 12") for line in lines[2:]] == [lines[1].index("grid")] * 2
    page = described._repr_html_()
    assert page.count("<tr>") == page.count("</tr>") == 3
    assert page.count("<td>") == 12
    described = type(described)("<b>", (("<", *5 * ["&"]),))
    assert "<td>&lt;</td><td>&amp;</td>" in described._repr_html_()
    with pytest.raises(ValueError, match="ResNet is not a supported host"):
        vp.describe(timm.create_model("resnet18"))
