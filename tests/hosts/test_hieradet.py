"""SAM 2's image encoder as host: windows, whole grids, pooled queries, and tables of timm's names."""

import copy

import pytest
import timm
import torch
from timm.layers import create_feature_extractor

import visionpos as vp
from tests.small import in_turn, needs_newer_timm, pictures, randomised
from visionpos.convert import find_host

SIZE, OTHER = (64, 96), (64, 32)
SMALL = {
    "num_classes": 5,
    "embed_dim": 16,
    "num_heads": 2,
    "stages": (2, 2, 1),
    "q_pool": 1,
    "window_spec": (8, 4, 4),
    "global_att_blocks": (1,),
    "pretrained_cfg_overlay": {"input_size": (3, *SIZE)},
}
ADDS_TO_OUTPUTS = ["lepe", {"name": "shaw", "values": True}, {"name": "irpe", "values": True}]


def hieradet(**options):
    torch.manual_seed(0)
    return randomised(timm.create_model("sam2_hiera_tiny", **{**SMALL, **options}), scale=0.2)


@pytest.mark.parametrize("options", [{}, {"patch_size": (8, 4)}, {"global_pos_size": (5, 6)}], ids=str)
@torch.no_grad()
def test_converting_to_what_the_host_has_changes_nothing_but_rounding(options):
    """timm resizes the table in float32; in float64 nothing is left."""
    plain = hieradet(**options)
    model = copy.deepcopy(plain)
    assert [encoding.name for encoding in vp.get_encoding(model)] == ["abs_win"]
    for _ in range(2):
        assert list(model.state_dict()) == list(plain.state_dict())
        for size in (SIZE, OTHER):
            x = pictures(size)
            assert (model(x) - plain(x)).abs().max() < 1e-5
            exact, want = copy.deepcopy(model).double(), copy.deepcopy(plain).double()
            assert (exact(x.double()) - want(x.double())).abs().max() < 1e-13
            found = (m.forward_intermediates(x.double(), coarse=False)[1] for m in (exact, want))
            assert all((a - b).abs().max() < 1e-12 for a, b in zip(*found, strict=True))
        vp.set_encoding(model, "abs_win")
    model.load_state_dict(plain.state_dict(), strict=True)
    assert model.no_weight_decay() == set(plain.no_weight_decay())
    assert (vp.set_encoding(model, "none")(pictures(SIZE)) - plain(pictures(SIZE))).abs().max() > 1e-3
    assert not [key for key in model.state_dict() if "pos_embed" in key]


def test_a_grid_that_the_window_does_not_divide():
    """Where timm fails, the window is cut off."""
    plain, x = hieradet(), pictures((80, 48))
    with pytest.raises(RuntimeError):
        plain(x)
    assert vp.set_encoding(plain, "abs_win")(x).isfinite().all()


def test_the_table_has_timms_names_where_it_is_timms():
    model = vp.set_encoding(hieradet(), "abs_win+sincos2d+peg")
    assert "pos_embed_window" in model.state_dict()
    vp.set_encoding(model, {"name": "abs_win", "interpolation": "bilinear"})
    assert "pos_embed_input.0.pos_embed_win" in model.state_dict()
    vp.set_encoding(model, {"name": "abs_win", "antialias": False})
    assert model.pos_embed_window.shape == (1, 16, 8, 8)


def test_facts_of_windows_grids_and_pooled_queries():
    model = hieradet()
    vp.get_encoding(model)
    facts = find_host(model).layer_facts(model)
    assert [layer.feat_shape for layer in facts] == [(8, 8), (16, 24), (8, 8), (4, 4), (4, 4)]
    assert [layer.dim_in for layer in facts] == [16, 16, 16, 32, 32]
    assert [layer.dim for layer in facts] == [16, 16, 32, 32, 64]
    assert find_host(model).mixing_layers(model) == [0, 2, 4]


@needs_newer_timm
def test_what_is_pruned_has_no_facts():
    model = hieradet()
    vp.get_encoding(model)
    model.prune_intermediate_layers([1])
    assert len(find_host(model).layer_facts(model)) == 4
    assert vp.set_encoding(model, "alibi2d")(pictures(SIZE)).isfinite().all()


@torch.no_grad()
def test_pooled_queries_against_the_formula():
    """Each query is the maximum of its cells and stands in their middle, in coordinates of its window; in float64."""
    model = vp.set_encoding(hieradet(), "rope_axial+alibi2d").double()
    attn = model.blocks[2].attn
    rope, alibi = attn.encodings
    x = torch.randn(3, 8, 8, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    q, k, v = attn.qkv(x).view(3, 8, 8, 3, 4, 8).unbind(3)  # (B, 8, 8, heads, head_dim)
    q = q.view(3, 4, 2, 4, 2, 4, 8).amax(dim=(2, 4)).view(3, 16, 4, 8).transpose(1, 2)
    k, v = (part.reshape(3, 64, 4, 8).transpose(1, 2) for part in (k, v))
    keys = vp.Positions.grid((8, 8))
    queries = vp.Positions(vp.Positions.grid((4, 4)).coords.double() * 2 + 0.5, (8, 8))
    keys = vp.Positions(keys.coords.double(), (8, 8))
    logits = rope(q, q, queries)[0] @ rope(k, k, keys)[1].mT * 8**-0.5 + alibi.bias(queries, keys)
    want = attn.proj((logits.softmax(-1) @ v).transpose(1, 2).reshape(3, 4, 4, 32))
    assert (attn(x) - want).abs().max() < 1e-10


@pytest.mark.parametrize("spec", ADDS_TO_OUTPUTS, ids=str)
def test_what_adds_to_every_token_has_no_place_where_queries_are_pooled(spec):
    model = hieradet()
    before = vp.get_encoding(model)
    message = (
        r"works on the value of every token, but layer 2 of this HieraDet .* pools its tokens: leave out .* there$"
    )
    with pytest.raises(ValueError, match=message):
        vp.set_encoding(model, spec)
    assert vp.get_encoding(model) == before
    spec = {"name": spec} if isinstance(spec, str) else spec
    assert vp.set_encoding(model, {**spec, "layers": [0, 1, 3]})(pictures(SIZE)).isfinite().all()


@pytest.mark.parametrize("name", in_turn([name for name in vp.list_encodings() if name not in ("none", "lepe")], 1))
def test_every_encoding_trains_at_two_sizes(name):
    model = vp.set_encoding(hieradet(), name).train()
    sum(model(pictures(size)).square().sum() for size in (SIZE, OTHER)).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.unhooked
@pytest.mark.parametrize("spec", ["abs_win", "learned+alibi2d+peg"])
def test_graphs_and_features(spec):
    model = vp.set_encoding(hieradet(), spec)
    extractor = create_feature_extractor(model, ["blocks.3"])
    (want,) = model.forward_intermediates(
        pictures(SIZE), indices=[3], output_fmt="NHWC", intermediates_only=True, coarse=False
    )
    assert torch.equal(extractor(pictures(SIZE))["blocks.3"], want)
    options = {key: value for key, value in SMALL.items() if key != "num_classes"}
    features = vp.create_model("sam2_hiera_tiny", spec, features_only=True, out_indices=(0, 1), **options).eval()
    assert [feature.shape for feature in features(pictures(SIZE))] == [(2, 16, 16, 24), (2, 32, 8, 12)]


@pytest.mark.slow
@pytest.mark.unhooked
def test_torch_compile_makes_one_graph():
    model = vp.set_encoding(hieradet(), "abs_win+rope_axial+peg")
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert (compiled(pictures(SIZE)) - model(pictures(SIZE))).abs().max() < 1e-5
