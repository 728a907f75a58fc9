"""TNT as host: encodings of patches in every block, and two tables, of patches and of the pixels in each."""

import pytest
import timm
import torch

import visionpos as vp
from tests.hosts.same_bits import OWN, check_same_bits
from tests.small import pictures, randomised

SIZE = (32, 48)
OPTIONS = {"patch_size": 8, "embed_dim": 48, "inner_dim": 16, "depth": 2, "num_heads_outer": 3, "num_heads_inner": 2}
NAMES = ("tnt_s_patch16_224", "tnt_s_legacy_patch16_224")


def plain_model(name=NAMES[0], size=SIZE):
    torch.manual_seed(0)
    return randomised(timm.create_model(name, img_size=size, num_classes=4, **OPTIONS))


@pytest.mark.parametrize("size", [SIZE, (64, 24)])
@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_converting_to_what_the_host_has_changes_no_bit(name, size):
    ways = ({}, {"norm": True, "indices": [1]}, {"indices": [0], "stop_early": True, "output_fmt": "NLC"})
    plain = plain_model(name, size)
    model = check_same_bits(plain, pictures(size), ["learned", "learned"], "learned", OWN, ways=ways)
    assert model.no_weight_decay() == plain.no_weight_decay()


@torch.no_grad()
def test_pixels_have_a_stem_of_their_own():
    model, x = plain_model(), pictures(SIZE)
    vp.set_encoding(model, [{"name": "learned", "dim": 48}, {"name": "sincos2d", "dim": 16}])
    assert [key for key in model.state_dict() if "pos" in key] == ["patch_pos"]
    pixels = model.pixel_embed(x)
    table = vp.get_encoding(model)[1].embed(vp.Positions.grid((2, 2)))
    vp.set_encoding(model, {"name": "learned", "dim": 48})
    assert (pixels - model.pixel_embed(x) - table).abs().max() < 1e-5
    vp.set_encoding(model, "none")
    branch, tokens = model.blocks[0], torch.randn(1, 25, 48, generator=torch.Generator().manual_seed(0))
    order = torch.cat([torch.zeros(1, dtype=torch.long), 1 + torch.randperm(24)])
    moved = branch(pixels[:24][order[1:] - 1], tokens[:, order])[1]
    assert torch.allclose(moved, branch(pixels[:24], tokens)[1][:, order], atol=1e-5)


@torch.no_grad()
def test_attention_of_patches_is_the_formula():
    model = vp.set_encoding(plain_model().double(), "rope_axial+alibi2d")
    attn = model.blocks[1].attn_out
    positions = vp.Positions(vp.Positions.grid((4, 6)).coords.double(), (4, 6), 1, is_grid=True)
    rope, alibi = attn.encodings
    x = torch.randn(2, 25, 48, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    q, k = attn.qk(x).view(2, 25, 2, 3, 16).permute(2, 0, 3, 1, 4)
    v = attn.v(x).view(2, 25, 3, 16).transpose(1, 2)
    q, k = rope(q, k, positions)
    out = (q @ k.mT / 4 + alibi.bias(positions)).softmax(-1) @ v
    assert (attn(x) - attn.proj(out.transpose(1, 2).flatten(2))).abs().max() < 1e-10


def test_gradients_are_those_of_checkpointing():
    model, gradients = vp.set_encoding(plain_model(), "learned+rope_mixed+peg"), []
    for checkpointing in (False, True):
        model.set_grad_checkpointing(checkpointing)
        model.zero_grad()
        model.train()(pictures(SIZE)).square().sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    assert all((a - b).abs().max() < 1e-5 for a, b in zip(*gradients, strict=True))
