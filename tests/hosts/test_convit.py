"""ConViT as host: positions blended in behind the softmax in the first layers, and a class token behind these."""

import copy

import pytest
import timm
import torch

import visionpos as vp
from tests.hosts.same_bits import OWN, check_same_bits
from tests.small import needs_newer_timm, pictures, randomised
from visionpos.convert import find_host

SQUARE, SIZE = (24, 24), (16, 24)  # timm's own takes squares alone
OPTIONS = {"patch_size": 4, "num_classes": 4, "depth": 4, "local_up_to_layer": 2, "embed_dim": 16, "num_heads": 3}
NATIVE = ["learned", "GPSA", "GPSA"]


def plain_model(size=SQUARE, **options):
    torch.manual_seed(0)
    return randomised(timm.create_model("convit_tiny", img_size=size, **{**OPTIONS, **options}))


@needs_newer_timm
@pytest.mark.parametrize("use_pos_embed", [True, False])
@torch.no_grad()
def test_converting_to_what_the_host_has_changes_no_bit(use_pos_embed):
    plain, x = plain_model(use_pos_embed=use_pos_embed), pictures(SQUARE)
    ways = ({}, {"norm": True, "indices": [1, 2]}, {"indices": [1], "stop_early": True}, {"output_fmt": "NLC"})
    names = NATIVE if use_pos_embed else NATIVE[1:]
    model = check_same_bits(plain, x, names, "+".join(names[:-1]), OWN, ways=ways)
    assert model.no_weight_decay() & set(dict(model.named_parameters())) == (
        plain.no_weight_decay() & set(dict(plain.named_parameters()))
    )


@torch.no_grad()
def test_attention_is_the_formula_on_a_grid_that_is_no_square():
    model = vp.set_encoding(plain_model(SIZE).double(), "GPSA+rope_axial+alibi2d")
    attn, x = model.blocks[0].attn, torch.randn(2, 24, 48, dtype=torch.float64)
    positions = vp.Positions(vp.Positions.grid((4, 6)).coords.double(), (4, 6), is_grid=True)
    rope, alibi = model.pos_embed_shared
    q, k = attn.qk(x).view(2, 24, 2, 3, 16).permute(2, 0, 3, 1, 4)
    v = attn.v(x).view(2, 24, 3, 16).transpose(1, 2)
    q, k = rope(q, k, positions)
    content = (q @ k.mT / 4 + alibi.bias(positions)).softmax(-1)
    y, x_ = (positions.coords[None, :, axis] - positions.coords[:, None, axis] for axis in (0, 1))
    weight, bias = attn.pos_proj.weight, attn.pos_proj.bias
    place = torch.stack([w[0] * x_ + w[1] * y + w[2] * (x_**2 + y**2) + b for w, b in zip(weight, bias, strict=True)])
    gate = attn.gating_param.sigmoid()[:, None, None]
    want = attn.proj((((1 - gate) * content + gate * place.softmax(-1)) @ v).transpose(1, 2).flatten(2))
    assert (attn(x, model.context(positions)) - want).abs().max() < 1e-10


@torch.no_grad()
def test_what_is_taken_away_takes_its_parameters_along():
    plain, x = plain_model(), pictures(SQUARE)
    model = vp.set_encoding(copy.deepcopy(plain), [{"name": "GPSA", "layers": [1]}, "learned"])
    assert set(plain.state_dict()) - set(model.state_dict()) == {
        f"blocks.0.attn.{name}" for name in ("pos_proj.weight", "pos_proj.bias", "gating_param")
    }
    assert (model(x) - plain(x)).abs().max() > 1e-3
    vp.set_encoding(model, "none")
    assert torch.allclose(model(x.roll(4, -1)), model(x), atol=1e-5)
    with pytest.raises(ValueError, match="GPSA needs host"):
        vp.set_encoding(model, "GPSA")


def test_the_class_token_is_in_front_of_the_later_layers_alone():
    model = vp.set_encoding(plain_model(SIZE), "lookhere")
    assert [facts.num_prefix_tokens for facts in find_host(model).layer_facts(model)] == [0, 0, 1, 1]
    features = model.forward_kept(pictures(SIZE), torch.tensor([[5, 0, 7], [1, 2, 23]]))
    assert features.shape == (2, 1 + 3, 48)
    whole = torch.arange(24).expand(2, -1)
    got, want = model.forward_kept(pictures(SIZE), whole), model.forward_features(pictures(SIZE))
    assert (got - want).abs().max() < 1e-5


@needs_newer_timm
def test_saved_and_loaded_with_what_only_the_host_has(tmp_path):
    model = randomised(vp.set_encoding(plain_model(SIZE), ["GPSA", {"name": "rope_axial", "layers": "2:"}]))
    timm.models.save_for_hf(model, tmp_path)
    loaded = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert [encoding.name for encoding in vp.get_encoding(loaded)] == ["GPSA", "GPSA", "rope_axial"]
    assert torch.equal(loaded(pictures(SIZE)), model(pictures(SIZE)))
