"""The census of timm's classes: what converts, what is refused and why, what is no host, without any weights."""

import timm
import torch

from tests.small import needs_newer_timm
from visionpos.__main__ import main
from visionpos.analysis import census as module
from visionpos.analysis.census import OTHERS, Row, census, coverage, share


def tags_of(pattern):
    return len(timm.list_pretrained(pattern))


def test_an_architecture_counts_with_all_its_weights():
    rows = census("swin_s3*")
    assert list(rows) == ["SwinTransformer"]
    assert rows["SwinTransformer"].architectures == len(timm.list_models("swin_s3*")) == 3
    assert rows["SwinTransformer"].tags == rows["SwinTransformer"].converted == tags_of("swin_s3*") == 3


@needs_newer_timm
def test_what_a_host_refuses_is_counted_and_said():
    row = census("maxvit_tiny_p*")["MaxxVit"]
    assert (row.architectures, row.converted) == (1, 0)
    assert row.reasons == ["a MaxxVit with blocks that attend to windows and grids in parallel takes no encodings"]


def test_a_class_that_is_no_host_says_what_it_has():
    row = census("csatv2*")["CSATv2"]
    assert row == Row("", 2, 3, 0, [OTHERS["CSATv2"]])


def test_networks_without_positions_are_not_counted_and_timm_is_left_as_it_was():
    build = timm.models.resnet.build_model_with_cfg
    assert census("resnet1?") == {}
    assert timm.models.resnet.build_model_with_cfg is build
    with torch.device("meta"):
        assert isinstance(timm.create_model("resnet18"), timm.models.resnet.ResNet)


@needs_newer_timm
def test_blocks_with_options_of_their_own_and_hybrids_are_built_as_they_can_be():
    assert census("vit_5b_patch16_sapiens2*")["Eva"].converted == tags_of("vit_5b_patch16_sapiens2*")
    assert census("vit_base_mci_224")["VisionTransformer"].converted == tags_of("vit_base_mci_224*")


def test_the_share_is_of_all_classes(capsys, monkeypatch):
    rows = {"A": Row("A", 3, 6, 5, ["B is not"]), "C": Row("", 1, 2, 0, ["tables"])}
    assert share(rows).startswith("5 of the 8 pretrained weights (62%)")
    assert coverage(rows).splitlines()[-2:] == ["| A | A | 3 | 6 | 5 | B is not |", "| C | - | 1 | 2 | 0 | tables |"]
    monkeypatch.setattr(module, "census", lambda: rows)
    assert main(["hosts", "--coverage"]) == 0
    assert capsys.readouterr().out == coverage(rows)
