"""timm's CaiT as host: heads that talk, with encodings in the patch blocks and none in the class attention."""

import copy

import pytest
import timm
import torch
from timm.layers import create_feature_extractor
from timm.models.cait import Cait, ClassAttn

import visionpos as vp
from tests.hosts import isotropic_checks as checks
from tests.hosts.isotropic_checks import ENCODINGS, OTHER, SIZE
from tests.small import in_turn, pictures
from visionpos.hosts.attention import encoded, prepare_encodings

GRID = (8, 12)
BIAS = [name for name in vp.list_encodings(place="bias") if name in ENCODINGS]


def cait(**options):
    return checks.build(Cait, **options)


def drawn(ratio=0.6):
    return vp.draw_mask(GRID, 2, ratio, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("options", [{}, {"global_pool": "avg", "qkv_bias": False}], ids=["token", "avg"])
def test_converting_to_what_the_host_has_changes_nothing(options):
    plain = cait(**options)
    model, untouched = copy.deepcopy(plain), copy.deepcopy(plain)
    assert [encoding.name for encoding in vp.get_encoding(model)] == ["learned"]
    for _ in range(2):
        checks.check_same_names(model, plain)
        assert torch.equal(model(pictures()), untouched(pictures()))
        vp.set_encoding(model, "learned")
    assert (vp.set_encoding(model, "none")(pictures()) - plain(pictures())).abs().max() > 1e-3
    assert model.pos_embed is None


@pytest.mark.parametrize(
    "options",
    [{}, {"norm": True, "output_fmt": "NLC"}, {"indices": [0]}, {"indices": [0], "stop_early": True}],
    ids=["all", "normalised tokens", "first", "first alone"],
)
def test_intermediates_are_timms(options):
    plain = cait()
    model = vp.set_encoding(copy.deepcopy(plain), "learned")
    (last, found), (last_of_timm, found_of_timm) = (
        m.forward_intermediates(pictures(), **options) for m in (model, plain)
    )
    assert torch.equal(last, last_of_timm)
    assert all(torch.equal(a, b) for a, b in zip(found, found_of_timm, strict=True))
    only = model.forward_intermediates(pictures(), intermediates_only=True, **options)
    assert all(torch.equal(a, b) for a, b in zip(found, only, strict=True))


def test_dropouts_are_timms():
    rates = {
        "drop_rate": 0.1,
        "pos_drop_rate": 0.2,
        "proj_drop_rate": 0.1,
        "attn_drop_rate": 0.1,
        "drop_path_rate": 0.2,
    }
    plain = cait(**rates)
    checks.check_dropouts(vp.set_encoding(copy.deepcopy(plain), "learned"), plain)
    model = vp.set_encoding(cait(attn_drop_rate=0.5), "alibi2d")
    assert not torch.equal(model.train()(pictures()), model(pictures()))


def talking_heads(layer, tensors):
    """The formula, head by head: every softmax gets a mixture of all heads' products, and its own bias."""
    heads, scale = range(layer.num_heads), tensors.q.shape[-1] ** -0.5
    before, after = ((linear.weight, linear.bias) for linear in (layer.proj_l, layer.proj_w))
    products = [tensors.q[:, h] @ tensors.k[:, h].mT * scale for h in heads]
    logits = [sum(before[0][h, g] * products[g] for g in heads) + before[1][h] + tensors.bias[:, h] for h in heads]
    seen = [p.exp() / p.exp().sum(-1, keepdim=True) for p in logits]
    mixed = torch.stack([sum(after[0][h, g] * seen[g] for g in heads) + after[1][h] for h in heads], dim=1)
    out = mixed @ tensors.v + sum(term(mixed) for term in tensors.value_terms)
    return layer.proj(torch.cat(list(out.unbind(1)), dim=-1))


@pytest.mark.parametrize("bias", [*BIAS, {"name": "shaw", "values": True}], ids=[*BIAS, "shaw, values"])
def test_rotated_heads_talk_and_then_get_their_bias(bias):
    """Every bias, behind a rotation, against the formula in float64."""
    model = vp.set_encoding(cait(depth=1), ["rope_axial", bias]).double()
    checks.order_matters(model)  # tables that begin at zero are no longer zero
    layer, x = model.blocks[0].attn, torch.randn(2, 96, 48, generator=torch.Generator().manual_seed(1)).double()
    context = model.context(vp.Positions.grid(GRID))
    qkv = layer.qkv(x).unflatten(-1, (3, 3, 16)).permute(2, 0, 3, 1, 4)
    tensors = encoded(x, *qkv, prepare_encodings(layer, context))
    assert tensors.bias.std() > 1e-3
    assert (tensors.q - qkv[0]).abs().max() > 1e-2
    assert (layer(x, context) - talking_heads(layer, tensors)).abs().max() < 1e-9


class Hide(vp.BiasEncoding):
    """No logit but minus infinity for hidden patches."""

    def __init__(self, num_heads, hidden):
        super().__init__(num_heads)
        self.register_buffer("hidden", hidden)

    def encode(self, queries, keys):
        bias = torch.zeros(self.hidden.shape).masked_fill(self.hidden, float("-inf"))
        return bias[:, None, None].expand(-1, self.num_heads, queries.num_patches, -1)


@pytest.mark.parametrize("spec", ["learned", "rope_axial", "relative_table+sincos2d", "rope_mixed+alibi2d", "shaw"])
def test_kept_patches_are_the_full_run_with_the_others_masked_out(spec):
    """Where the mixture of probabilities has no constant: it would give hidden keys a weight, as all others."""
    model, (keep, _, hidden) = vp.set_encoding(cait(), spec), drawn()
    index = keep.unsqueeze(-1).expand(-1, -1, 48)
    with torch.no_grad():
        for block in model.blocks:
            block.attn.proj_w.bias.zero_()
        got = model.forward_kept(pictures(), keep)
        free = model.forward_features(pictures())
        for block in model.blocks:
            block.attn.encodings.append(Hide(3, hidden))
        (full,) = model.forward_intermediates(pictures(), indices=1, output_fmt="NLC", intermediates_only=True)
        full = model.norm(model.forward_cls(full.gather(1, index)))
    assert got.shape == (2, 1 + keep.shape[1], 48)
    assert (got - full).abs().max() < 1e-5
    assert (got[:, 1:] - free[:, 1:].gather(1, index)).abs().max() > 1e-2


@pytest.mark.parametrize("spec", ["learned", "rope_mixed+alibi2d", "sincos2d+peg"])
def test_a_masked_autoencoder(spec):
    """Everything is trained: the decoder reads the class token too."""
    mae = vp.MaskedAutoencoder(vp.set_encoding(cait(), spec), 32, 1, 2).train()
    mae(pictures(), generator=torch.Generator().manual_seed(0)).loss.backward()
    silent = {name for name, p in mae.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())}
    assert {name for name in silent if not name.endswith(("k.bias", "proj_l.bias"))} == {
        "encoder.head.weight",
        "encoder.head.bias",
    }
    mae.set_input_size(OTHER)
    assert mae(pictures(OTHER)).loss.isfinite()


@pytest.mark.parametrize("name", in_turn(ENCODINGS, 0))
def test_every_encoding_trains(name):
    model = vp.set_encoding(cait(depth=1), name)
    checks.check_training(model)
    assert {encoding.name for encoding in vp.get_encoding(model)} == {name}


@pytest.mark.parametrize("name", [*in_turn(ENCODINGS, 1), "none"])
def test_patch_order_matters_only_with_an_encoding(name):
    difference = checks.order_matters(vp.set_encoding(cait(depth=1), name))
    assert difference < 1e-12 if name == "none" else difference > 1e-7


@pytest.mark.parametrize("spec", ["learned", "relative_table", "sincos2d+peg"])
def test_copies_are_independent_and_equal(spec):
    checks.check_copies(vp.set_encoding(cait(), spec))


@pytest.mark.parametrize("spec", ["learned", "relative_table", "learned+rope_mixed+alibi2d", "sincos2d+peg"])
def test_gradient_checkpointing(spec):
    checks.check_checkpointing(vp.set_encoding(cait(), spec), pictures(SIZE), pictures(SIZE))


@pytest.mark.parametrize("name", in_turn(ENCODINGS, 0))
def test_other_resolutions(name):
    """Which timm's own has not: its table is for one size."""
    model = vp.set_encoding(cait(depth=1), name)
    model.set_input_size(OTHER)
    assert model(pictures(OTHER)).isfinite().all()
    (_, features) = model.forward_intermediates(pictures(OTHER))
    assert features[-1].shape == (2, 48, 10, 6)


def test_a_resized_table_is_the_table_resized():
    plain, model = cait(depth=1), cait(depth=1)
    vp.get_encoding(model)
    model.set_input_size(OTHER)
    assert (model.pos_embed - vp.resize_position_table(plain.pos_embed, (10, 6), GRID)).abs().max() == 0
    built = cait(depth=1, img_size=OTHER)
    built.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(built(pictures(OTHER)), model(pictures(OTHER)))


@pytest.mark.parametrize("spec", ["learned", "rope_axial+relative_table"])
def test_pruning_keeps_the_features(spec):
    model = vp.set_encoding(cait(), spec)
    (want,) = model.forward_intermediates(pictures(), indices=[0], intermediates_only=True)
    model.prune_intermediate_layers([0])
    assert len(model.blocks) == 1
    (got,) = model.forward_intermediates(pictures(), indices=[0], intermediates_only=True)
    assert torch.equal(got, want)
    assert torch.equal(model.forward_features(pictures())[:, -96:], model.norm(got.flatten(2).mT))


def test_models_and_features_of_timm():
    options = {"patch_size": 4, "embed_dim": 48, "depth": 2, "num_heads": 3, "img_size": SIZE}
    plain = timm.create_model("cait_xxs24_224", **options).eval()
    model = vp.set_encoding(copy.deepcopy(plain), "learned")
    assert torch.equal(model(pictures()), plain(pictures()))
    features = timm.create_model("cait_xxs24_224", features_only=True, out_indices=(0, 1), **options).eval()
    vp.set_encoding(features.model, "rope_axial")
    assert [feature.shape for feature in features(pictures())] == [(2, 48, *GRID)] * 2


SPECS = ["learned", "sincos2d+rope_axial", "learned+relative_table+peg+lepe"]


@pytest.mark.unhooked
@pytest.mark.parametrize("spec", SPECS)
def test_fx_extraction(spec):
    model = vp.set_encoding(cait(), spec)
    extractor = create_feature_extractor(model, ["blocks.1"])
    for trained in (False, True):
        model.train(trained), extractor.train(trained)
        (want,) = model.forward_intermediates(pictures(), indices=[1], output_fmt="NLC", intermediates_only=True)
        assert torch.equal(extractor(pictures())["blocks.1"], want)


@pytest.mark.unhooked
@pytest.mark.parametrize("spec", [SPECS[-1], *(pytest.param(spec, marks=pytest.mark.slow) for spec in SPECS[:-1])])
def test_torch_compile_makes_one_graph(spec):
    torch._dynamo.reset()
    model = vp.set_encoding(cait(), spec)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert (compiled(pictures()) - model(pictures())).abs().max() < 1e-5


def test_coordinates_can_be_augmented():
    model = vp.set_encoding(cait(), "rope_axial+learned")
    model.coordinate_augmentation = vp.CoordinateAugmentation(rescale=2.0)
    assert not torch.equal(model.train()(pictures()), model(pictures()))
    assert torch.equal(model.eval()(pictures()), model(pictures()))


def test_errors():
    other = cait()
    other.blocks[1].attn = ClassAttn(48, 3)
    with pytest.raises(ValueError, match="only timm's LayerScaleBlock with TalkingHeadAttn takes encodings"):
        vp.set_encoding(other, "none")
    model = vp.set_encoding(cait(), "alibi2d")
    with pytest.raises(ValueError, match="output_fmt must be 'NCHW' or 'NLC', got 'NHWC'"):
        model.forward_intermediates(pictures(), output_fmt="NHWC")
    with pytest.raises(RuntimeError, match="call it through the model's forward"):
        vp.set_encoding(model, "relative_table").blocks[0](torch.zeros(1, 96, 48))
