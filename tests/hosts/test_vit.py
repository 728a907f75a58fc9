"""timm's ViT and DeiT as hosts."""

import copy
import pickle

import pytest
import timm
import torch
from timm.optim import param_groups_weight_decay
from timm.utils import ModelEmaV3

import visionpos as vp
from tests.small import pictures, vit

ENCODINGS = [name for name in vp.list_encodings() if name != "none"]
SIZE = (32, 48)


def same(a, b):
    return torch.equal(a, b)


HOSTS = {
    "class token": {},
    "registers": {"reg_tokens": 4},
    "no class token": {"class_token": False, "global_pool": "avg"},
    "no_embed_class": {"no_embed_class": True, "reg_tokens": 1},
    "pre_norm, qk_norm": {"pre_norm": True, "qk_norm": True, "init_values": 1e-5},
    "dynamic": {"dynamic_img_size": True},
}


@pytest.mark.parametrize("options", HOSTS.values(), ids=HOSTS)
def test_converting_to_what_the_host_has_changes_nothing(options):
    plain, model = vit(**options), vit(**options)
    vp.set_encoding(model, "learned")
    assert isinstance(model, type(plain))
    assert list(model.state_dict()) == list(plain.state_dict())
    assert [n for n, _ in model.named_parameters()] == [n for n, _ in plain.named_parameters()]
    assert model.no_weight_decay() == plain.no_weight_decay()
    assert same(model(pictures()), plain(pictures()))
    model.load_state_dict(plain.state_dict(), strict=True)
    plain.load_state_dict(model.state_dict(), strict=True)


def test_a_neutral_encoding_changes_no_bit():
    plain = vit(pos_embed="none")
    model = vp.set_encoding(vit(pos_embed="none"), "none")
    assert same(model(pictures()), plain(pictures()))
    assert list(model.state_dict()) == list(plain.state_dict())


def test_deit_distilled():
    options = {"img_size": SIZE, "patch_size": 4, "num_classes": 5}
    plain = timm.create_model("deit_tiny_distilled_patch16_224", **options).eval()
    model = copy.deepcopy(plain)
    vp.set_encoding(model, "learned")
    assert same(model(pictures()), plain(pictures()))
    vp.set_encoding(model, "sincos2d+rope_axial")
    assert model(pictures()).shape == (2, 5)
    assert vp.set_encoding(model, "none")(pictures()).isfinite().all()


@pytest.mark.parametrize("name", ENCODINGS)
@pytest.mark.parametrize("options", [HOSTS["registers"], HOSTS["no class token"]], ids=["registers", "no class token"])
def test_every_encoding_trains(name, options):
    model = vp.set_encoding(vit(**options), name).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for step in range(3):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(pictures(seed=step)), torch.tensor([1, 3])).backward()
        optimizer.step()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    for encoding in vp.get_encoding(model):
        assert all(n.split(".")[-1] and p.requires_grad for n, p in encoding.named_parameters())


@pytest.mark.parametrize("name", [*ENCODINGS, "none"])
def test_patch_order_matters_only_with_an_encoding(name):
    """Moving whole patches changes the output of a model that knows positions, and of no other; in float64."""
    model = vp.set_encoding(vit(), name).double()
    with torch.no_grad():
        for encoding in vp.get_encoding(model):  # tables that begin at zero
            for parameter in encoding.parameters():
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    x = pictures().double()
    difference = (model(torch.cat([x[..., 16:], x[..., :16]], dim=-1)) - model(x)).abs().max()
    assert difference < 1e-12 if name == "none" else difference > 1e-7


def test_none_keeps_prefix_tokens_and_permutes_features():
    model = vp.set_encoding(vit(reg_tokens=2), "none")
    x = pictures()
    features = model.forward_features(x)
    moved = model.forward_features(torch.cat([x[..., 16:], x[..., :16]], dim=-1))
    assert features.shape == (2, 3 + 96, 48)
    grid = moved[:, 3:].view(2, 8, 12, 48)
    back = torch.cat([grid[:, :, 8:], grid[:, :, :8]], dim=2).flatten(1, 2)
    assert (back - features[:, 3:]).abs().max() < 1e-5
    assert (moved[:, :3] - features[:, :3]).abs().max() < 1e-5


def test_get_encoding():
    model = vit()
    (learned,) = vp.get_encoding(model)
    assert learned.pos_embed is model.pos_embed
    vp.set_encoding(model, ["learned", {"name": "rope_axial", "temperature": 10.0}, "relative_table"])
    found = vp.get_encoding(model)
    assert [encoding.name for encoding in found] == ["learned", "rope_axial", "relative_table", "relative_table"]
    assert found[0] is learned
    assert found[1].temperature == 10.0
    assert found[1].reference_shape == (8, 12)
    assert vp.get_encoding(vp.set_encoding(model, "none")) == []


def test_an_encoding_asked_for_by_name_keeps_its_weights_and_with_options_is_new():
    model = vit()
    table = model.pos_embed
    vp.set_encoding(model, "rope_axial+learned")
    assert model.pos_embed is table
    vp.set_encoding(model, {"name": "learned", "init_std": 0.5})
    assert model.pos_embed.std().item() == pytest.approx(0.5, rel=0.1)
    vp.set_encoding(model, "relative_table")
    assert model.pos_embed is None
    tables = [block.attn.encodings[0].relative_position_bias_table for block in model.blocks]
    vp.set_encoding(model, "sincos2d+relative_table")
    assert all(a is b.attn.encodings[0].relative_position_bias_table for a, b in zip(tables, model.blocks, strict=True))


def test_an_instance_serves_all_layers():
    table = vp.create_encoding("relative_table", num_heads=3, feat_shape=(8, 12), init_std=0.5)
    model = vp.set_encoding(vit(), table)
    assert vp.get_encoding(model) == [table]
    names = [name for name, _ in model.named_parameters() if "relative" in name]
    assert names == ["pos_embed_shared.0.relative_position_bias_table"]
    model(pictures()).sum().backward()
    assert table.relative_position_bias_table.grad.abs().sum() > 0


def test_a_failed_conversion_leaves_the_model_as_it_was():
    model = vit()
    want = model(pictures())
    with pytest.raises(ValueError, match="head_dim"):
        vp.set_encoding(vit(embed_dim=42, num_heads=3), "rope_axial")
    for bad in ["ropee", {"name": "learned", "std": 1}, vp.create_encoding("alibi", num_heads=7)]:
        with pytest.raises(ValueError, match="unknown encoding|no option|num_heads=7, but the model has 3"):
            vp.set_encoding(model, bad)
    assert same(model(pictures()), want)
    with pytest.raises(ValueError, match="ResNet is not a supported host; supported: .*Swin"):
        vp.set_encoding(timm.create_model("resnet18"), "learned")
    with pytest.raises(ValueError, match="blocks.0 is a OtherBlock with Attention; only timm's Block or ResPostBlock"):
        vp.set_encoding(timm.create_model("vit_tiny_patch16_224", block_fn=OtherBlock, depth=1), "learned")
    with pytest.raises(ValueError, match="unknown encoding 'leraned'; did you mean 'learned'"):
        vp.create_model("vit_tiny_patch16_224", encoding="leraned")


class OtherBlock(timm.models.vision_transformer.Block):
    """A block of one's own, which may do with positions what it likes."""


@pytest.mark.parametrize("name", ENCODINGS)
def test_copies_are_independent_and_equal(name):
    model = vp.set_encoding(vit(), f"learned+{name}" if name != "learned" else name)
    want = model(pictures())
    want.sum().backward()
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), ModelEmaV3(model).module):
        assert same(copied(pictures()), want)
        with torch.no_grad():
            copied.pos_embed.mul_(-3)
        assert not same(copied(pictures()), want)
    assert same(model(pictures()), want)


@pytest.mark.parametrize("spec", ["learned+rope_axial", "sincos2d+alibi2d", "relative_table"])
def test_gradient_checkpointing_with_two_sizes_in_one_backward(spec):
    model = vp.set_encoding(vit(dynamic_img_size=True), spec).train()
    batches = [pictures(), pictures((40, 24)), pictures((24, 40))]

    def gradients():
        model.zero_grad()
        sum(model(batch).square().sum() for batch in batches).backward()
        return [parameter.grad.clone() for parameter in model.parameters()]

    plain = gradients()
    model.set_grad_checkpointing()
    assert all((a - b).abs().max() < 1e-6 for a, b in zip(plain, gradients(), strict=True))


@pytest.mark.parametrize("spec", ["learned", "rope_axial+relative_table", "sincos2d+alibi2d"])
def test_patch_dropout_equals_the_full_model_with_dropped_tokens_masked_out(spec):
    model = vp.set_encoding(vit(patch_drop_rate=0.5, class_token=True), spec).train()
    torch.manual_seed(3)
    dropped = model.forward_features(pictures())
    torch.manual_seed(3)
    index = torch.argsort(torch.randn(2, 96), dim=-1)[:, :48]
    model.eval()
    full = []
    for sample in range(2):
        seen = torch.zeros(97, dtype=torch.bool)
        seen[0] = True
        seen[1 + index[sample]] = True
        features = model.forward_features(pictures()[sample : sample + 1], attn_mask=seen.expand(97, 97))
        full.append(features[0, torch.cat([torch.zeros(1, dtype=torch.long), 1 + index[sample]])])
    assert (torch.stack(full) - dropped).abs().max() < 1e-5


@pytest.mark.parametrize("name", ENCODINGS)
def test_other_resolutions(name):
    """A forward of another size, set_input_size and a model made for that size agree; shapes are not square."""
    model = vp.set_encoding(vit(dynamic_img_size=True), name)
    x = pictures((40, 24))
    want = model(x)
    resized = copy.deepcopy(model)
    resized.set_input_size((40, 24))
    assert (resized(x) - want).abs().max() < 2e-5
    (_, features) = model.forward_intermediates(x)
    assert features[-1].shape == (2, 48, 10, 6)


def test_coordinates_are_interpolated_by_default_and_extrapolated_on_request():
    model = vp.set_encoding(vit(dynamic_img_size=True), "sincos2d")
    (encoding,) = vp.get_encoding(model)
    corner = vp.Positions.grid((16, 24)).keep(torch.tensor([16 * 24 - 1]))
    assert (encoding.embed(corner) - encoding.embed(vp.Positions.grid((8, 12)))[-1]).abs().max() < 1e-6
    run_on = vp.set_encoding(vit(dynamic_img_size=True), {"name": "sincos2d", "extrapolate": True})
    (encoding,) = vp.get_encoding(run_on)
    assert (encoding.embed(corner) - vp.sincos_2d((16, 24), 48)[-1]).abs().max() < 1e-6
    x = pictures((64, 96))
    assert (model(x) - run_on(x)).abs().max() > 1e-4


def leaves(value):
    """The tensors of nested lists, tuples and dicts, with their keys."""
    if isinstance(value, torch.Tensor):
        return [value]
    items = value.items() if isinstance(value, dict) else enumerate(value)
    return [type(value), *(leaf for key, part in items for leaf in (key, *leaves(part)))]


INTERMEDIATES = {
    "as it is": {},
    "prefix tokens apart": {"return_prefix_tokens": True},
    "some, normalised": {"indices": [0, 2], "norm": True, "output_fmt": "NLC"},
    "stopped early": {"indices": [1], "stop_early": True, "intermediates_only": True},
    "a dict": {"output_dict": True, "return_prefix_tokens": True},
    "a dict without features": {"output_dict": True, "intermediates_only": True, "indices": 2},
    "causal": {"is_causal": True},
    "a mask": {"attn_mask": torch.rand(1, 1, 98, 98, generator=torch.Generator().manual_seed(5)) > 0.4},
}


@pytest.mark.parametrize("options", INTERMEDIATES.values(), ids=INTERMEDIATES)
@pytest.mark.parametrize(
    "tokens", [{"reg_tokens": 1}, {"class_token": False, "global_pool": "avg"}, {"pre_norm": True}]
)
def test_intermediates_are_those_of_timm(options, tokens):
    """Bit for bit, and in the same containers."""
    plain = vit(depth=3, **tokens)
    model = vp.set_encoding(copy.deepcopy(plain), "learned")
    if "attn_mask" in options:
        size = 96 + plain.num_prefix_tokens
        mask = options["attn_mask"][..., :size, :size] | torch.eye(size).bool()
        options = {**options, "attn_mask": mask}
        assert same(model(pictures(), attn_mask=mask), plain(pictures(), attn_mask=mask))
        assert not same(model(pictures(), attn_mask=mask), model(pictures()))
    for method in ("forward_intermediates", "get_intermediate_layers"):
        keywords = {"reshape": options.get("output_fmt") != "NLC", "n": options.get("indices", 1)}
        if method == "get_intermediate_layers":
            shared = ("return_prefix_tokens", "norm", "attn_mask")
            options = {**keywords, **{key: value for key, value in options.items() if key in shared}}
        want, got = (leaves(getattr(each, method)(pictures(), **options)) for each in (plain, model))
        assert len(want) == len(got) > 2
        assert all(same(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in zip(want, got, strict=True))


@pytest.mark.parametrize("arguments", [{"indices": [0]}, {"indices": 2, "prune_norm": True, "prune_head": False}])
def test_pruned_layers_are_those_of_timm(arguments):
    plain = vit(depth=3)
    model = vp.set_encoding(copy.deepcopy(plain), "learned")
    assert model.prune_intermediate_layers(**arguments) == plain.prune_intermediate_layers(**arguments)
    assert list(model.state_dict()) == list(plain.state_dict())
    assert same(model(pictures()), plain(pictures()))


def test_weight_decay_and_layer_groups():
    model = vp.set_encoding(vit(), "learned+relative_table")
    spared = {"pos_embed", "cls_token", *(f"blocks.{i}.attn.encodings.0.relative_position_bias_table" for i in (0, 1))}
    assert spared <= model.no_weight_decay()
    no_decay, decay = param_groups_weight_decay(model, 0.05, no_weight_decay_list=model.no_weight_decay())
    ids = {id(parameter) for parameter in decay["params"]}
    assert not any(id(p) in ids for n, p in model.named_parameters() if n in spared)
    assert len(no_decay["params"]) + len(decay["params"]) == len(list(model.parameters()))


def test_same_seed_same_shared_weights():
    models = [vp.set_encoding(vit(), name) for name in ENCODINGS]
    for name, parameter in models[0].named_parameters():
        if name != "pos_embed" and "encodings" not in name and "mixers" not in name and "pos_embed_" not in name:
            assert all(same(dict(model.named_parameters())[name], parameter) for model in models[1:]), name


def test_create_model():
    model = vp.create_model(
        "vit_tiny_patch16_224", encoding="rope_axial", img_size=32, patch_size=4, num_classes=10, depth=1
    )
    assert model(torch.randn(1, 3, 32, 32)).shape == (1, 10)
    assert [encoding.name for encoding in vp.get_encoding(model)] == ["rope_axial"]
    plain = vp.create_model("vit_tiny_patch16_224", depth=1)
    assert type(plain) is timm.models.vision_transformer.VisionTransformer


@pytest.mark.parametrize("encoding", ["none", "learned", "rope_axial", "relative_table+peg"])
@pytest.mark.parametrize("name", ["vitamin_small_224", "vit_tiny_r_s16_p8_224"])
def test_a_hybrid_stem_is_told_of_pictures_that_the_model_was_not_built_for(name, encoding):
    model = vp.create_model(name, encoding=encoding, num_classes=3, depth=1).eval()
    grid = " x ".join(map(str, model.patch_embed.grid_size))
    with pytest.raises(ValueError, match=f"the pictures have .* patches, but the model was built for {grid}: build it"):
        model(torch.randn(1, 3, 256, 192))
