"""Attention layers call the kernels where they run, and compute the same with and without them."""

import pytest
import torch

import visionpos as vp
from visionpos import kernels
from visionpos.hosts import attention, window_attention

SIZE = {"img_size": (24, 40), "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 3}


def vit(encoding):
    torch.manual_seed(0)
    return vp.create_model("vit_tiny_patch16_224", encoding=encoding, **SIZE).eval()


@pytest.fixture
def images():
    return torch.randn(2, 3, 24, 40, generator=torch.Generator().manual_seed(1))


def test_a_rotation_goes_to_the_kernel_where_it_runs(images, monkeypatch):
    model, calls = vit("rope_axial"), []
    with torch.no_grad():
        expected = model(images)
        assert kernels.report()["rotate_qkv"].startswith("plain: ")

        class Fused:
            @staticmethod
            def runs(*args):
                return True

            @staticmethod
            def fused(qkv, table, layout):
                calls.append((qkv.shape, layout))
                return attention.split_qkv(qkv, table, layout)

        monkeypatch.setattr(attention, "rotate_qkv", Fused)
        assert torch.allclose(model(images), expected, atol=1e-6)
    assert calls == [((2, 16, 3, 2, 16), "interleaved")] * 2


@pytest.mark.parametrize("encoding", ["alibi2d", "alibi", "lookhere", "rope_axial+alibi2d", "peg+alibi2d"])
def test_a_formula_goes_to_the_kernel_where_it_runs(encoding, images, monkeypatch):
    model = vit(encoding)
    calls = []
    with torch.no_grad():
        expected = model(images)
        monkeypatch.setattr(attention, "takes_coordinates", kernels.coordinates.has_formula)

        def plain(q, k, v, encoding, positions, scale):
            calls.append(encoding.name)
            return kernels.coordinates.reference(q, k, v, encoding, positions, scale)

        monkeypatch.setattr(attention, "coordinate_attention", plain)
        assert torch.allclose(model(images), expected, atol=1e-6)
    assert len(calls) == 2


@pytest.mark.parametrize("encoding", ["alibi2d+relative_table", "alibi2d+alibi", "shaw+alibi2d"])
def test_a_formula_beside_another_bias_becomes_a_bias(encoding, images, monkeypatch):
    model = vit(encoding)
    with torch.no_grad():
        expected = model(images)
        monkeypatch.setattr(attention, "takes_coordinates", kernels.coordinates.has_formula)
        monkeypatch.setattr(attention, "coordinate_attention", lambda *args: 1 / 0)
        assert torch.allclose(model(images), expected, atol=1e-6)


def test_a_formula_with_a_mask_or_dropout_becomes_a_bias(images, monkeypatch):
    model = vit("alibi2d")
    mask = torch.rand(16, 16, generator=torch.Generator().manual_seed(2)) > 0.3
    mask.fill_diagonal_(True)
    with torch.no_grad():
        expected = model.forward_features(images, attn_mask=mask)
        monkeypatch.setattr(attention, "takes_coordinates", kernels.coordinates.has_formula)
        monkeypatch.setattr(attention, "coordinate_attention", lambda *args: 1 / 0)
        assert torch.allclose(model.forward_features(images, attn_mask=mask), expected, atol=1e-6)
    dropping = vp.create_model("vit_tiny_patch16_224", encoding="alibi2d", attn_drop_rate=0.5, **SIZE).train()
    assert dropping(images).isfinite().all()


def swin(encoding):
    torch.manual_seed(0)
    model = vp.create_model(
        "swin_tiny_patch4_window7_224", encoding=encoding, img_size=(32, 48), patch_size=2, window_size=4,
        embed_dim=32, depths=(2, 2), num_heads=(1, 2), num_classes=3,
    ).eval()  # fmt: skip
    return model, torch.randn(2, 3, 32, 48)


@pytest.mark.parametrize("encoding", ["relative_table", "alibi2d", "relative_table+alibi2d"])
def test_windows_go_to_the_kernel_where_it_runs(encoding, monkeypatch):
    model, images = swin(encoding)
    calls = []
    with torch.no_grad():
        expected = model(images)

        class Fused:
            @staticmethod
            def runs(qkv, bias, window, shift, scale):
                calls.append((tuple(qkv.shape), window, shift))
                return True

            fused = staticmethod(kernels.window.reference)

        monkeypatch.setattr(window_attention, "considered", lambda x: True)
        monkeypatch.setattr(window_attention, "window_attention", Fused)
        assert torch.allclose(model(images), expected, atol=1e-5)
    assert calls[:2] == [((2, 16, 24, 3, 1, 32), (4, 4), (0, 0)), ((2, 16, 24, 3, 1, 32), (4, 4), (2, 2))]
    assert len(calls) == 4


@pytest.mark.parametrize("encoding", ["none", "rope_axial", "relative_table+rope_axial", "shaw"])
def test_windows_without_a_plain_bias_do_not(encoding, monkeypatch):
    model, images = swin(encoding)
    with torch.no_grad():
        expected = model(images)
        monkeypatch.setattr(window_attention, "considered", lambda x: True)
        monkeypatch.setattr(window_attention, "window_attention", None)
        assert torch.equal(model(images), expected)


def test_a_window_kernel_that_does_not_fit_leaves_the_plain_path(monkeypatch):
    model, images = swin("relative_table")
    with torch.no_grad():
        expected = model(images)
        monkeypatch.setattr(window_attention, "considered", lambda x: True)
        monkeypatch.setattr(kernels.window_attention.__class__, "runs", lambda *args: False)
        assert torch.equal(model(images), expected)
