"""VOLO as host. timm's factory builds it in its full depth alone; the small ones here are built by its class."""

import copy
import pickle

import pytest
import torch
from timm.layers import create_feature_extractor
from timm.models.volo import VOLO

import visionpos as vp
from tests.small import in_turn, needs_newer_timm, pictures, randomised
from visionpos.convert import find_host

pytestmark = needs_newer_timm
SIZE, OTHER = (64, 96), (96, 32)
SMALL = {
    "layers": (1, 2, 1),
    "img_size": SIZE,
    "num_classes": 5,
    "embed_dims": (24, 48, 48),
    "num_heads": (2, 3, 6),
    "downsamples": (True, False, False),
    "outlook_attention": (True, False, False),
    "stem_hidden_dim": 16,
}


def volo(**options):
    torch.manual_seed(0)
    return randomised(VOLO(**{**SMALL, **options}))


@pytest.mark.parametrize("options", [{}, {"global_pool": "avg", "post_layers": None, "use_aux_head": False}], ids=str)
@torch.no_grad()
def test_converting_to_what_the_host_has_changes_nothing(options):
    plain = volo(**options)
    model = copy.deepcopy(plain)
    assert [encoding.name for encoding in vp.get_encoding(model)] == ["learned"]
    for _ in range(2):
        assert list(model.state_dict()) == list(plain.state_dict())
        for x in (pictures(SIZE), pictures(SIZE).double()):
            ours, theirs = (copy.deepcopy(each).to(x.dtype) for each in (model, plain))
            assert torch.equal(ours(x), theirs(x))
            for got, want in zip(ours.forward_intermediates(x)[1], theirs.forward_intermediates(x)[1], strict=True):
                assert torch.equal(got, want)
        vp.set_encoding(model, "learned")
    model.load_state_dict(plain.state_dict(), strict=True)
    assert model.no_weight_decay() == plain.no_weight_decay()
    vp.set_encoding(model, "learned+peg+alibi2d")
    assert torch.equal(model.pos_embed, plain.pos_embed)
    vp.set_encoding(model, "none")
    assert model.pos_embed is None
    assert (model(pictures(SIZE)) - plain(pictures(SIZE))).abs().max() > 1e-3
    assert model(pictures(OTHER)).shape == (2, 5)  # where timm's table has one size


def test_what_timm_adds_is_what_the_encoding_computes():
    model, x = volo(), torch.zeros(1, 24, 48)
    (table,) = vp.get_encoding(model)
    assert torch.equal(table(x, vp.Positions.grid((4, 6))).view(1, 4, 6, 48), model.pos_embed)


@torch.no_grad()
def test_attention_is_the_formula():
    """Rotated, with a bias of the offsets of the grid; in float64."""
    model = vp.set_encoding(volo().double(), "rope_axial+alibi2d")
    attn = model.network[2][0].attn
    positions = vp.Positions(vp.Positions.grid((4, 6)).coords.double(), (4, 6), is_grid=True)
    rope, alibi = attn.encodings
    x = torch.randn(2, 4, 6, 48, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    q, k, v = attn.qkv(x).view(2, 24, 3, 3, 16).permute(2, 0, 3, 1, 4)
    q, k = rope(q, k, positions)
    p = (q @ k.mT / 4 + alibi.bias(positions)).softmax(-1)
    assert (attn(x) - attn.proj((p @ v).transpose(1, 2).reshape(2, 4, 6, 48))).abs().max() < 1e-10


def test_layers_are_the_transformer_blocks():
    model = volo()
    vp.get_encoding(model)
    facts = find_host(model).layer_facts(model)
    assert [layer.num_heads for layer in facts] == [3, 3, 6]
    assert {layer.feat_shape for layer in facts} == {(4, 6)}
    assert find_host(model).mixing_layers(model) == [0, 2]


@pytest.mark.parametrize("name", in_turn([name for name in vp.list_encodings() if name != "none"], 2))
def test_every_encoding_trains(name):
    model = vp.set_encoding(volo(), name).train()
    model(pictures(SIZE)).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert {encoding.name for encoding in vp.get_encoding(model)} == {name}


@pytest.mark.unhooked
@pytest.mark.parametrize("spec", ["learned", "sincos2d+relative_table+lepe+peg"])
def test_copies_checkpointing_and_graphs(spec):
    model, x = vp.set_encoding(volo(), spec), pictures(SIZE)
    want = model(x)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(copied(x), want)
    (last,) = model.forward_intermediates(x, indices=[1], intermediates_only=True)
    got = create_feature_extractor(model, ["network.2"])(x)["network.2"]
    assert torch.equal(got.permute(0, 3, 1, 2), last)
    gradients = []
    for checkpointing in (False, True):
        model.set_grad_checkpointing(checkpointing)
        model.zero_grad()
        model(x).square().sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    assert all((a - b).abs().max() < 1e-5 for a, b in zip(*gradients, strict=True))


def test_what_is_built_otherwise_is_one_line():
    model = volo(downsamples=(False, True, False), outlook_attention=(True, True, False), embed_dims=(24, 24, 48))
    with pytest.raises(ValueError, match="only a VOLO that downsamples once, after its first stage, takes encodings"):
        vp.set_encoding(model, "none")
    assert type(model) is VOLO
