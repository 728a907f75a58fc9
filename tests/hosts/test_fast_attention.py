"""Which path attention takes on a CPU, seen from what runs, and that both paths compute the same."""

import pytest
import timm
import torch
from torch.nn import functional

import visionpos as vp

HOSTS = {
    "vit_tiny_patch16_224": {"embed_dim": 32, "depth": 1, "num_heads": 2, "patch_size": 4},
    "beit_base_patch16_224": {"embed_dim": 32, "depth": 1, "num_heads": 2, "patch_size": 4, "use_abs_pos_emb": False},
    "eva02_tiny_patch14_224": {"embed_dim": 32, "depth": 1, "num_heads": 2, "patch_size": 4},
    "vit_relpos_small_patch16_224": {"embed_dim": 32, "depth": 1, "num_heads": 2, "patch_size": 4},
}


def model(name, encoding):
    torch.manual_seed(0)
    return vp.set_encoding(timm.create_model(name, img_size=(8, 12), num_classes=3, **HOSTS[name]), encoding)


@pytest.fixture
def fused(monkeypatch):
    """How often torch's fused attention was called, in a list that grows."""
    calls, function = [], functional.scaled_dot_product_attention
    count = lambda *args, **kwargs: calls.append(1) or function(*args, **kwargs)  # noqa: E731
    monkeypatch.setattr(functional, "scaled_dot_product_attention", count)
    return calls


@pytest.mark.parametrize("encoding", ["none", "rope_axial", "alibi2d"])
@pytest.mark.parametrize("host", HOSTS)
def test_training_in_bfloat16_is_not_fused(host, encoding, fused):
    net, x = model(host, encoding), torch.randn(2, 3, 8, 12)
    with torch.autocast("cpu", torch.bfloat16):
        out = net(x)
        assert not fused
        with torch.no_grad():
            want = net(x)
    assert fused
    assert (out - want).abs().max() < 0.05 * want.abs().max()
    fused.clear()
    net.bfloat16()(x.bfloat16()).sum().backward()
    assert not fused
    assert all(parameter.grad.isfinite().all() for parameter in net.parameters())


@pytest.mark.parametrize("host", HOSTS)
def test_a_learned_bias_is_fused_where_it_needs_no_gradient(host, fused):
    net, x = model(host, "relative_table"), torch.randn(2, 3, 8, 12)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    out = net(x)
    assert not fused
    with torch.no_grad():
        assert (net(x) - out).abs().max() < 1e-5
    assert fused
    fused.clear()
    for encoding in vp.get_encoding(net):
        encoding.owner.requires_grad_(False)
    net(x).sum().backward()
    assert fused


@pytest.mark.parametrize("encoding", ["none", "rope_axial", "alibi2d"])
def test_training_in_float32_is_fused(encoding, fused):
    model("vit_tiny_patch16_224", encoding)(torch.randn(2, 3, 8, 12)).sum().backward()
    assert fused
