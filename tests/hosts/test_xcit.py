"""XCiT as host: attention over channels, to which input and conditional encodings are added, and nothing else."""

import copy

import pytest
import timm
import torch
from timm.layers import create_feature_extractor

import visionpos as vp
from tests.hosts import isotropic_checks as checks
from tests.small import pictures, randomised

SMALL = {"img_size": (32, 48), "embed_dim": 48, "depth": 2, "num_heads": 3, "num_classes": 5}
OTHER = (40, 24)
TAKEN = [*vp.list_encodings(place="input"), *vp.list_encodings(place="conditional")]
REFUSED = [*vp.list_encodings(place="rotary"), *vp.list_encodings(place="bias")]


def xcit(name="xcit_nano_12_p8_224", **options):
    torch.manual_seed(0)
    return randomised(timm.create_model(name, **{**SMALL, **options}))


@pytest.mark.parametrize("options", [{}, {"name": "xcit_tiny_12_p16_224"}, {"use_pos_embed": False}], ids=str)
@torch.no_grad()
def test_converting_to_what_the_host_has_changes_nothing(options):
    plain = xcit(**options)
    model, native = copy.deepcopy(plain), [] if "use_pos_embed" in options else ["fourier"]
    assert [encoding.name for encoding in vp.get_encoding(model)] == native
    for _ in range(2):
        assert list(model.state_dict()) == list(plain.state_dict())
        for x in (pictures(), pictures(OTHER).double() if "name" not in options else pictures((48, 16)).double()):
            ours, theirs = (copy.deepcopy(each).to(x.dtype) for each in (model, plain))
            assert torch.equal(ours(x), theirs(x))
            for got, want in zip(ours.forward_intermediates(x)[1], theirs.forward_intermediates(x)[1], strict=True):
                assert torch.equal(got, want)
        vp.set_encoding(model, "+".join(native) or "none")
    model.load_state_dict(plain.state_dict(), strict=True)
    assert plain.no_weight_decay() <= model.no_weight_decay()


@torch.no_grad()
def test_timms_own_beside_others_keeps_names_values_and_bits():
    plain = xcit()
    model = vp.set_encoding(copy.deepcopy(plain), "fourier+sincos2d+peg+lepe")
    keys = set(plain.state_dict())
    assert keys <= set(model.state_dict())
    assert all(torch.equal(model.state_dict()[key], plain.state_dict()[key]) for key in keys)
    vp.set_encoding(model, "fourier")
    assert torch.equal(model(pictures()), plain(pictures()))
    vp.set_encoding(model, "none")
    assert not [key for key in model.state_dict() if "pos_embed" in key]
    vp.set_encoding(model, {"name": "fourier", "preset": "xcit"})
    assert set(model.state_dict()) == keys
    vp.set_encoding(model, "none")
    vp.set_encoding(model, {"name": "fourier", "preset": "perceiver"})
    assert model.pos_embed is None
    assert model(pictures()).isfinite().all()


@torch.no_grad()
def test_what_timm_adds_by_itself_is_what_the_encoding_computes():
    model = vp.set_encoding(xcit().double(), "none")
    x, bare = pictures().double(), model.patch_embed(pictures().double())
    vp.set_encoding(model, {"name": "fourier", "preset": "xcit", "num_bands": 8})
    (encoding,) = vp.get_encoding(model)
    assert (model.pos_embed(1, 4, 6)[0].flatten(1).T - encoding.embed(vp.Positions.grid((4, 6)))).abs().max() < 1e-6
    assert torch.equal(model.patch_embed(x)[0], bare[0])
    vp.set_encoding(model, "learned")
    (table,) = vp.get_encoding(model)
    assert (model.patch_embed(x)[0] - bare[0] - table.pos_embed).abs().max() < 1e-12


@torch.no_grad()
def test_lepe_is_a_convolution_of_the_values_added_to_what_attention_returns():
    model = vp.set_encoding(xcit().double(), "lepe")
    attn, x = model.blocks[0].attn, torch.randn(2, 24, 48, dtype=torch.float64)
    (lepe,) = attn.encodings
    lepe.proj.weight.copy_(torch.randn(lepe.proj.weight.shape))
    values = attn.qkv(x)[..., 96:]
    maps = values.mT.unflatten(2, (4, 6))
    added = torch.nn.functional.conv2d(maps, lepe.proj.weight, lepe.proj.bias, padding=1, groups=48).flatten(2).mT
    got = attn(x, 4, 6)
    vp.set_encoding(model, "none")
    want = attn(x) + torch.nn.functional.linear(added, attn.proj.weight)
    assert (got - want).abs().max() < 1e-10


@pytest.mark.parametrize("name", TAKEN)
def test_what_it_takes_trains_at_two_sizes(name):
    model = vp.set_encoding(xcit(depth=1), name).train()
    sum(model(pictures(size)).square().sum() for size in (SMALL["img_size"], OTHER)).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    plain = vp.set_encoding(xcit(depth=1), "none")
    assert not torch.allclose(model.eval()(pictures()), plain(pictures()))


@pytest.mark.parametrize("name", REFUSED)
def test_what_acts_on_pairs_of_patches_is_one_line(name):
    model = xcit()
    before, keys = vp.get_encoding(model), list(model.state_dict())
    with pytest.raises(
        ValueError, match=f"^{name} acts on pairs of patches, but the attention of Xcit is over channel"
    ):
        vp.set_encoding(model, f"{name}+sincos2d")
    assert vp.get_encoding(model) == before
    assert list(model.state_dict()) == keys


@pytest.mark.unhooked
@pytest.mark.parametrize("spec", ["fourier", "learned+peg+lepe"])
def test_copies_checkpointing_and_graphs(spec):
    model = vp.set_encoding(xcit(), spec)
    checks.check_copies(model)
    extractor = create_feature_extractor(model, ["blocks.1"])
    (want,) = model.forward_intermediates(pictures(), indices=[1], output_fmt="NLC", intermediates_only=True)
    assert torch.equal(extractor(pictures())["blocks.1"], want)


@pytest.mark.slow
@pytest.mark.unhooked
def test_torch_compile_makes_one_graph():
    model = vp.set_encoding(xcit(), "fourier+peg+lepe")
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert (compiled(pictures()) - model(pictures())).abs().max() < 1e-5
