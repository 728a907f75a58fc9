"""timm's Hiera as host."""

import copy
import pickle

import pytest
import timm
import torch
import torch.nn.functional as F

import visionpos as vp
from tests.small import in_turn, pictures

OUTPUT = ["lepe"]  # adds to the output of each token, and pooled queries have fewer
ENCODINGS = [name for name in vp.list_encodings() if name not in ("none", *OUTPUT)]
SIZE = (32, 64)  # 8 x 16 tokens, 2 x 4 mask units of 4 x 4
STAGES = {"stages": (1, 2, 1), "q_pool": 2, "mask_unit_size": (4, 4), "mask_unit_attn": (True, False, False)}


def hiera(**options):
    torch.manual_seed(0)
    options = {"img_size": SIZE, "embed_dim": 16, "num_heads": 1, "num_classes": 5} | options
    model = timm.create_model("hiera_tiny_224", **{**STAGES, **options}).eval()
    torch.nn.init.normal_(model.head.fc.weight)  # timm begins with zeros
    return model


def some_units():
    """Three of the eight mask units, others in each sample."""
    return torch.tensor([[0, 1, 0, 0, 0, 1, 1, 0], [0, 0, 1, 1, 1, 0, 0, 0]]).bool()


OWN = {
    "learned": ("learned", {}),
    "abs_win": ("abs_win", {"abs_win_pos_embed": True, "global_pos_size": (8, 16)}),
    "abs_win, resized": ("abs_win", {"abs_win_pos_embed": True, "global_pos_size": (5, 7)}),
}


@pytest.mark.parametrize(("name", "options"), OWN.values(), ids=OWN)
def test_converting_to_what_the_host_has_changes_nothing(name, options):
    plain, model = hiera(**options), vp.set_encoding(hiera(**options), name)
    for mask in (None, some_units()):
        want, got = plain(pictures(SIZE), mask), model(pictures(SIZE), mask)
        # timm resizes by interpolate in float32, ours are float64 matrices: the last bit of the table differs
        assert (got - want).abs().max() < 1e-5 if options.get("global_pos_size") == (5, 7) else torch.equal(got, want)
    assert isinstance(model, type(plain))
    assert list(model.state_dict()) == list(plain.state_dict())
    assert [n for n, _ in model.named_parameters()] == [n for n, _ in plain.named_parameters()]
    model.load_state_dict(plain.state_dict(), strict=True)


def test_weight_decay_spares_what_timm_forgets():
    model = hiera(abs_win_pos_embed=True)
    assert "pos_embed_win" not in model.no_weight_decay()
    assert vp.set_encoding(model, "abs_win").no_weight_decay() == {"pos_embed", "pos_embed_win"}
    assert vp.set_encoding(model, "none").no_weight_decay() == set()
    model = vp.set_encoding(model, "sincos2d+relative_table")
    assert "blocks.0.attn.encodings.0.relative_position_bias_table" in model.no_weight_decay()
    assert not any("pos_embed" in name for name in model.state_dict())


@pytest.mark.parametrize("name", in_turn(ENCODINGS, 0))
def test_every_encoding_trains(name):
    model = vp.set_encoding(hiera(), name).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for step in range(2):
        optimizer.zero_grad()
        F.cross_entropy(model(pictures(SIZE, seed=step)), torch.tensor([1, 3])).backward()
        optimizer.step()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert {encoding.name for encoding in vp.get_encoding(model)} == {name}
    assert model(pictures(SIZE), some_units()).isfinite().all()


@pytest.mark.parametrize("spec", ["lepe", {"name": "shaw", "values": True}, {"name": "irpe", "values": True}])
def test_outputs_of_pooled_queries_are_refused(spec):
    model = hiera()
    before = model(pictures(SIZE))
    with pytest.raises(ValueError, match=r"layer 1 of this Hiera pools its tokens"):
        vp.set_encoding(model, spec)
    assert torch.equal(model(pictures(SIZE)), before)


def test_video_is_refused():
    options = {"img_size": (4, 32, 64), "q_stride": (1, 2, 2), "mask_unit_size": (1, 4, 4), "sep_pos_embed": True}
    patches = {"patch_kernel": (3, 7, 7), "patch_stride": (2, 4, 4), "patch_padding": (1, 3, 3)}
    model = timm.models.Hiera(**{**STAGES, **options, **patches}, embed_dim=16, num_classes=5)
    with pytest.raises(ValueError, match=r"only Hiera on pictures takes encodings; this one has tokens \[2, 8, 16\]"):
        vp.set_encoding(model, "none")


def tokens_in_rows(model, block, positions):
    """Where the tokens of a block are in the row-major grid of its stage, by timm's own reroll."""
    index = torch.arange(positions.num_patches).view(1, -1, 1).float()
    return model.reroll(index, block).flatten().long()


def test_coordinates_are_those_of_the_tokens():
    """timm's `reroll` puts the tokens of every stage back in order; so it must the coordinates."""
    model, seen = vp.set_encoding(hiera(), "none"), []
    for block in model.blocks:
        block.register_forward_pre_hook(lambda module, args: seen.append(module.pooled(args[1]).positions))
    model(pictures(SIZE))
    for level, block in enumerate((0, 2, 3)):
        positions = seen[block]  # after it, as timm's `reroll` takes the tokens
        assert positions.feat_shape == (8 // 2**level, 16 // 2**level)
        order = tokens_in_rows(model, block, positions)
        assert torch.equal(positions.coords[order], vp.Positions.grid(positions.feat_shape).coords)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("block", [1, 3], ids=["mask units", "all tokens"])
def test_pooled_queries_against_the_formula(block, masked):
    """Queries in the middle of the four that they come from; softmax over each unit's tokens, in float64."""
    model = vp.set_encoding(hiera(), "rope_axial+alibi2d").double()
    attn, seen = model.blocks[block].attn, {}
    attn.register_forward_hook(lambda module, args, out: seen.update(x=args[0], out=out, keys=args[1].positions))
    model(pictures(SIZE).double(), some_units() if masked else None)
    x, keys, rope, alibi = seen["x"], seen["keys"], *attn.encodings
    units = 1 if block == 3 else 3 if masked else 8
    assert keys.feat_shape == ((4, 8) if block == 3 else (4, 4))
    assert (keys.coords < torch.tensor(keys.feat_shape)).all()  # also where the first mask unit was dropped
    middle = vp.Positions(keys.coords.unflatten(-2, (4, -1)).mean(-3), keys.feat_shape)
    assert (middle.coords % 2 == 0.5).all()
    for unit in range(units):
        tokens = x[:, unit::units]
        q, k, v = attn.qkv(tokens).unflatten(-1, (3, attn.heads, -1)).permute(2, 0, 3, 1, 4)
        q = q.unflatten(2, (4, -1)).amax(2)
        logits = rope(q, q, middle)[0] @ rope(k, k, keys)[1].mT * attn.scale + alibi.bias(middle, keys)
        want = attn.proj((logits.softmax(-1) @ v).transpose(1, 2).flatten(2))
        assert (seen["out"][:, unit::units] - want).abs().max() < 1e-6  # the tables are float32


def test_a_masked_model_sees_the_tokens_where_they_are():
    """Without units to keep apart: dropping every mask unit but some equals a batch of one sample each."""
    model = vp.set_encoding(hiera(), "rope_axial+relative_table+learned")
    together = model(pictures(SIZE), some_units())
    alone = torch.cat([model(pictures(SIZE)[i : i + 1], some_units()[i : i + 1]) for i in range(2)])
    assert (together - alone).abs().max() < 1e-5
    everything = model(pictures(SIZE), torch.ones(2, 8).bool())
    assert (everything - model.forward_features(pictures(SIZE))).abs().max() < 1e-5


def test_none_removes_every_position():
    """Global attention only, and mask units moved as a whole: pooling sees no borders."""
    model = hiera(patch_kernel=(4, 4), patch_padding=(0, 0), mask_unit_attn=(False, False, False))
    x = pictures(SIZE)
    moved = torch.cat([x[..., 16:], x[..., :16]], -1)
    assert (model(moved) - model(x)).abs().max() > 1e-4
    vp.set_encoding(model, "none")
    assert (model(moved) - model(x)).abs().max() < 1e-5
    vp.set_encoding(model, "alibi2d")
    assert (model(moved) - model(x)).abs().max() > 1e-5


def test_mask_units_have_their_own_grid_and_global_layers_the_stage():
    model = vp.set_encoding(hiera(), "relative_table+rope_axial")
    shapes = [block.attn.encodings[0].feat_shape for block in model.blocks]
    assert shapes == [(4, 4), (4, 4), (4, 8), (4, 8)]
    assert [block.attn.encodings[1].head_dim for block in model.blocks] == [16] * 4


def test_copies_are_independent():
    model = vp.set_encoding(hiera(abs_win_pos_embed=True), "abs_win+relative_table")
    want = model(pictures(SIZE))
    want.sum().backward()
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(copied(pictures(SIZE)), want)
        with torch.no_grad():
            copied.pos_embed_win.normal_()
        assert not torch.equal(copied(pictures(SIZE)), want)
    assert torch.equal(model(pictures(SIZE)), want)


def test_gradient_checkpointing_with_two_masks_in_one_backward():
    model = vp.set_encoding(hiera(), "learned+rope_axial+relative_table+peg").train()

    def gradients():
        model.zero_grad()
        first, second = some_units(), some_units().flip(0)
        (model(pictures(SIZE), first).square().sum() + model(pictures(SIZE, seed=2), second).square().sum()).backward()
        return [p.grad.clone() for n, p in model.named_parameters() if not n.startswith("head")]

    plain = gradients()
    model.set_grad_checkpointing()
    assert all((a - b).abs().max() < 1e-6 * a.abs().max().clamp(min=1) for a, b in zip(plain, gradients(), strict=True))


def test_forward_intermediates():
    plain, model = hiera(), vp.set_encoding(hiera(), "learned")
    wanted, got = (
        plain.forward_intermediates(pictures(SIZE))[1],
        model.forward_intermediates(pictures(SIZE))[1],
    )
    assert all(torch.equal(a, b) for a, b in zip(wanted, got, strict=True))
    vp.set_encoding(model, "rope_axial+sincos2d")
    last, taken = model.forward_intermediates(pictures(SIZE))
    assert [tuple(t.shape) for t in taken] == [(2, 16, 8, 16), (2, 32, 4, 8), (2, 64, 2, 4)]
    assert torch.equal(last, model.forward_features(pictures(SIZE)))


def test_a_block_alone_says_what_is_missing():
    model = vp.set_encoding(hiera(), "rope_axial")
    with pytest.raises(RuntimeError, match="through the model's forward"):
        model.blocks[0](torch.zeros(1, 128, 16))


def test_patch_drop():
    model = vp.set_encoding(hiera(patch_drop_rate=0.5), "learned+rope_axial").train()
    assert model.forward_features(pictures(SIZE)).shape == (2, 4, 64)
