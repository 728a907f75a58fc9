"""timm's other blocks of ViT: parallel ones, differential attention, and norms behind attention and MLP."""

import copy
from functools import partial

import pytest
import timm
import torch
from timm.layers import create_feature_extractor

import visionpos as vp
from tests.hosts import isotropic_checks as checks
from tests.hosts.isotropic_checks import ENCODINGS, OTHER, SIZE
from tests.small import VIT, in_turn, pictures, randomised

KINDS = {
    "parallel": ("vit_base_patch16_xp_224", {}),
    "parallel, one projection, a bias": (
        "vit_pwee_patch16_reg1_gap_256",
        {"qkv_bias": True, "block_fn": "fuse_out_proj", "mlp_ratio": 2},
    ),
    "parallel attention": ("vit_small_patch16_18x2_224", {}),
    "differential": ("vit_dwee_patch16_reg1_gap_256", {"qk_norm": True}),
    "differential, two lambdas": ("vit_dwee_patch16_reg1_gap_256", {"attn_layer": "dual_lambda"}),
    "parallel, differential": ("vit_dpwee_patch16_reg1_gap_256", {}),
    "norms behind": ("vit_base_patch16_rpn_224", {}),
    "parallel attention, differential": ("vit_small_patch16_18x2_224", {"attn_layer": "diff"}),
}
SOME = ["parallel", "parallel attention", "differential", "parallel, differential"]


def plain_model(kind, fused=True, **more):
    name, options = KINDS[kind]
    torch.manual_seed(0)
    options = {**VIT, "init_values": 0.5, **options, **more}
    if options.get("block_fn") == "fuse_out_proj":
        options["block_fn"] = partial(timm.models.vision_transformer.ParallelScalingBlock, fuse_out_proj=True)
    if options.get("attn_layer") == "dual_lambda":
        options["attn_layer"] = "diff"
    model = randomised(timm.create_model(name, **options))
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = fused
        if "two lambdas" in kind and hasattr(module, "lambda_q1"):
            module.lambda_a, module.lambda_b = (torch.nn.Parameter(torch.tensor(each)) for each in (0.3, -0.2))
            module.lambda_q1 = module.lambda_k1 = module.lambda_q2 = module.lambda_k2 = None
    return model


def layers_of(model):
    """The modules with the encodings of each attention layer."""
    return [module for module in model.modules() if "encodings" in module._modules]


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_converting_to_what_the_host_has_changes_nothing(kind, fused):
    plain = plain_model(kind, fused)
    model = vp.set_encoding(copy.deepcopy(plain), "learned")
    checks.check_same_names(model, plain)
    mask = torch.rand(1, 1, *2 * (96 + plain.num_prefix_tokens,), generator=torch.Generator().manual_seed(5)) > 0.4
    mask = mask | torch.eye(mask.shape[-1]).bool()
    for dtype in (torch.float32, torch.float64):
        both, x = [each.to(dtype) for each in (model, plain)], pictures().to(dtype)
        for options in ({}, {"attn_mask": mask}, {"is_causal": True}):
            got, want = (each.forward_features(x, **options) for each in both)
            assert torch.equal(got, want)
    gradients = [torch.autograd.grad(each(x).square().sum(), list(each.parameters())) for each in both]
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_dropout_and_intermediates_are_timms(kind):
    rates = {"attn_drop_rate": 0.2, "proj_drop_rate": 0.1, "drop_path_rate": 0.1, "pos_drop_rate": 0.1}
    plain = plain_model(kind, **rates)
    model = vp.set_encoding(copy.deepcopy(plain), "learned")
    checks.check_intermediates(model, plain)
    checks.check_dropouts(model, plain)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_a_bias_is_what_timm_adds_by_a_mask(kind, fused):
    """timm's differential attention takes another bias for each of its maps where it is not fused."""
    plain = plain_model(kind, fused=False).double()
    model = vp.set_encoding(plain_model(kind, fused).double(), {"name": "relative_table", "init_std": 1.0})
    layers, (first, *others) = layers_of(model), vp.get_encoding(model)
    for encoding in others:  # a mask is the same in all layers
        encoding.relative_position_bias_table.copy_(first.relative_position_bias_table)
    assert len(layers) == 1 + len(others) == (4 if "parallel attention" in kind else 2)
    assert first.num_heads == (6 if "differential" in kind else 3)
    plain = vp.set_encoding(plain, "none")  # without the table at the input
    bias = first.bias(vp.Positions.grid((8, 12), plain.num_prefix_tokens).promote(torch.float64)).unsqueeze(0)
    seen = torch.rand(bias.shape[-2:], generator=torch.Generator().manual_seed(5)) > 0.4
    seen = seen | torch.eye(len(seen)).bool()
    x = pictures().double()
    want = plain.forward_features(x, attn_mask=bias)
    assert (model.forward_features(x) - want).abs().max() < 1e-10
    assert (plain.forward_features(x) - want).abs().max() > 1e-3
    masked = model.forward_features(x, attn_mask=seen)
    assert (masked - plain.forward_features(x, attn_mask=bias.masked_fill(~seen, -torch.inf))).abs().max() < 1e-10
    causal = bias.masked_fill(torch.ones_like(seen).triu(1), -torch.inf)
    assert (model.forward_features(x, is_causal=True) - plain.forward_features(x, attn_mask=causal)).abs().max() < 1e-10


@torch.no_grad()
def test_both_maps_of_differential_attention_turn_and_values_are_mixed_once():
    """The definition: out = (softmax(r(q1) r(k1)^T s) - lambda softmax(r(q2) r(k2)^T s)) v + conv(v), normalised."""
    model = vp.set_encoding(plain_model("differential").double(), "rope_mixed+lepe")
    attn = model.blocks[1].attn
    rope, lepe = attn.encodings
    seen = {}
    attn.register_forward_hook(lambda module, args, out: seen.update(x=args[0], out=out))
    model(pictures().double())
    positions = vp.Positions.grid((8, 12), num_prefix_tokens=1).promote(torch.float64)
    qkv = attn.qkv(seen["x"])
    q, k = (qkv[..., i * 48 : i * 48 + 48].view(2, 97, 6, 8).transpose(1, 2) for i in (0, 1))
    v = qkv[..., 96:].view(2, 97, 3, 16).transpose(1, 2)
    q, k = rope(attn.q_norm(q), attn.k_norm(k), positions)
    a = (q @ k.mT * 8**-0.5).softmax(dim=-1)
    vectors = (attn.lambda_q1, attn.lambda_k1), (attn.lambda_q2, attn.lambda_k2)
    one, two = (torch.dot(*pair).float().exp() for pair in vectors)
    lam = one - two + attn.lambda_init  # in float32, as timm has it
    mixed = lepe.mix(qkv[..., 96:], positions).view(2, 97, 3, 16).transpose(1, 2)
    out = attn.sub_norm((a[:, 0::2] - lam * a[:, 1::2]) @ v + mixed) * (1 - attn.lambda_init)
    out = attn.proj(out.transpose(1, 2).flatten(2))
    assert (out - seen["out"]).abs().max() < 1e-10
    assert lepe.dim == 48


@pytest.mark.parametrize("name", [*in_turn(ENCODINGS, 2), "none"])
@pytest.mark.parametrize("kind", SOME)
def test_patch_order_matters_only_with_an_encoding(kind, name):
    difference = checks.order_matters(vp.set_encoding(plain_model(kind), name))
    assert difference < 1e-12 if name == "none" else difference > 1e-7


@pytest.mark.parametrize("spec", ["learned+rope_mixed", "relative_table+lepe", "sincos2d+alibi2d+peg"])
@pytest.mark.parametrize("kind", SOME)
def test_training_copies_checkpointing_and_kept_patches(kind, spec):
    model = vp.set_encoding(plain_model(kind, dynamic_img_size=True), spec)
    checks.check_copies(model)
    keep = torch.stack([torch.randperm(96, generator=torch.Generator().manual_seed(i)) for i in (0, 1)])
    with torch.no_grad():
        whole = model.forward_features(pictures()).tensor_split([model.num_prefix_tokens], dim=1)[1]
        kept = model.forward_kept(pictures(), keep)[:, model.num_prefix_tokens :]
    if "peg" not in spec and "lepe" not in spec:  # which add up neighbours in another order
        assert (kept - whole.gather(1, keep.unsqueeze(-1).expand(-1, -1, 48))).abs().max() < 1e-5
    checks.check_training(model)
    checks.check_checkpointing(model, pictures(SIZE), pictures(OTHER))


@pytest.mark.parametrize("layers", [[1], [0, 3]])
def test_parallel_attention_layers_are_layers_of_their_own(layers):
    """Two blocks of two layers are four, in order, and a mixer behind one of them is read back from there."""
    model = plain_model("parallel attention")
    vp.set_encoding(model, [{"name": "rope_mixed", "layers": layers}, {"name": "peg", "layers": layers}])
    branches = [branch for block in model.blocks for branch in block.attns]
    has = [layer in layers for layer in range(4)]
    assert [len(branch.attn.encodings) for branch in branches] == [len(branch.mixers) for branch in branches] == has
    before = vp.get_encoding(model)
    want = model(pictures())
    vp.set_encoding(model, before)
    assert vp.get_encoding(model) == before
    assert torch.equal(model(pictures()), want)


def test_what_cannot_act_is_one_line_and_changes_nothing():
    for kind in ("differential", "parallel, differential", "parallel attention, differential"):
        model = vp.set_encoding(plain_model(kind), "alibi2d")
        want, before = model(pictures()), vp.get_encoding(model)
        with pytest.raises(
            ValueError, match="shaw has value vectors of 8 channels.*values of 16: leave out values=True"
        ):
            vp.set_encoding(model, {"name": "shaw", "values": True})
        assert torch.equal(model(pictures()), want)
        assert vp.get_encoding(model) == before
    model = vp.set_encoding(plain_model("parallel"), {"name": "shaw", "values": True})
    assert checks.order_matters(model) > 1e-7


@pytest.mark.slow
@pytest.mark.unhooked
@pytest.mark.parametrize("spec", ["learned", "learned+rope_axial+relative_table"])
@pytest.mark.parametrize("kind", SOME)
def test_graphs(kind, spec):
    model = vp.set_encoding(plain_model(kind), spec)
    (want,) = model.forward_intermediates(pictures(), indices=[1], output_fmt="NLC", intermediates_only=True)
    out = create_feature_extractor(model, ["blocks.1"])(pictures())["blocks.1"]
    assert (out[:, model.num_prefix_tokens :] - want).abs().max() < 1e-6
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert (compiled(pictures()) - model(pictures())).abs().max() < 1e-5
