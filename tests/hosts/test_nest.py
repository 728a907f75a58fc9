"""NesT as host, of square pictures. timm's factory builds it in its full width alone; here its class builds it."""

import copy
import pickle

import pytest
import torch
from timm.models.nest import Nest

import visionpos as vp
from tests.hosts.same_bits import OWN, check_same_bits
from tests.small import in_turn, pictures, randomised

SIZE = (64, 64)
SMALL = {"embed_dims": (24, 48, 96), "num_heads": (2, 3, 3), "depths": (1, 2, 1), "num_classes": 4}


def nest(size=SIZE, **options):
    torch.manual_seed(0)
    return randomised(Nest(img_size=size, drop_path_rate=0.0, **{**SMALL, **options}))


@pytest.mark.parametrize("size", [SIZE, (96, 96)])
@torch.no_grad()
def test_converting_to_what_the_host_has_changes_no_bit(size):
    ways = ({}, {"norm": True, "indices": [1, 2]}, {"indices": [1], "stop_early": True})
    plain = nest(size)
    model = check_same_bits(plain, pictures(size), ["learned"] * 3, "learned", OWN, ways=ways)
    tables = {f"levels.{level}.pos_embed" for level in range(3)}  # timm before 1.0.31 names others, which are not there
    assert model.no_weight_decay() == plain.no_weight_decay() | tables


@torch.no_grad()
def test_a_table_has_the_rows_of_its_level_and_keeps_timms_layout():
    model = nest()
    table = vp.get_encoding(model)[1]
    rows = table.embed(vp.Positions.grid((8, 8))).view(8, 8, 48)
    blocks = model.levels[1].pos_embed[0].view(2, 2, 4, 4, 48)
    for y, x in ((0, 0), (3, 6), (5, 1)):
        assert torch.equal(rows[y, x], blocks[y // 4, x // 4, y % 4, x % 4])
    before = {key: value.clone() for key, value in model.state_dict().items()}
    vp.set_encoding(model, "learned+peg")
    vp.set_encoding(model, "learned")
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@torch.no_grad()
def test_attention_is_the_formula_in_each_block():
    model = vp.set_encoding(nest().double(), "rope_axial+alibi2d")
    attn = model.levels[1].transformer_encoder[1].attn
    positions = vp.Positions(vp.Positions.grid((4, 4)).coords.double(), (4, 4), is_grid=True)
    rope, alibi = attn.encodings
    x = torch.randn(2, 4, 16, 48, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    q, k, v = attn.qkv(x.flatten(0, 1)).view(8, 16, 3, 3, 16).permute(2, 0, 3, 1, 4)
    q, k = rope(q, k, positions)
    out = (q @ k.mT / 4 + alibi.bias(positions)).softmax(
        -1
    ) @ v  # (8, 3, 16, 16), whose channels timm orders by head last
    assert (attn(x) - attn.proj(out.permute(0, 2, 3, 1).reshape(2, 4, 16, 48))).abs().max() < 1e-10


@torch.no_grad()
def test_a_convolution_between_layers_sees_the_whole_level():
    model = vp.set_encoding(nest(), "peg")
    layer = model.levels[1].transformer_encoder[0]
    x = torch.zeros(1, 4, 16, 48)
    y = x.clone()
    y[0, 0, 7] += torch.randn(48, generator=torch.Generator().manual_seed(0))  # attention changes the whole block
    changed = (layer(y) - layer(x)).abs().amax(-1)[0] > 1e-6
    borders = [[*range(16)], [0, 4, 8, 12], [0, 1, 2, 3], [0]]
    assert [row.nonzero().flatten().tolist() for row in changed] == borders


@pytest.mark.parametrize("name", in_turn([name for name in vp.list_encodings() if name != "none"], 0))
def test_every_encoding_trains(name):
    model = vp.set_encoding(nest((32, 32), num_heads=(3, 3, 3), depths=(1, 1, 1)), name)
    model.train()(pictures((32, 32))).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.unhooked
@pytest.mark.parametrize("spec", ["learned", "sincos2d+relative_table+lepe+peg"])
def test_copies_and_checkpointing(spec):
    model, x = vp.set_encoding(nest(), spec), pictures(SIZE)
    want = model(x)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(copied(x), want)
    gradients = []
    for checkpointing in (False, True):
        model.set_grad_checkpointing(checkpointing)
        model.zero_grad()
        model(x).square().sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    assert all((a - b).abs().max() < 1e-5 for a, b in zip(*gradients, strict=True))
