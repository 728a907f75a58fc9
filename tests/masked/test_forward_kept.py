"""An encoder that runs on some of its patches: what it computes for them is what they are among themselves."""

import pytest
import torch

import visionpos as vp
from tests.small import pictures, randomised
from visionpos.analysis.zoo import ZOO, build
from visionpos.hosts.attention import encoded
from visionpos.hosts.isotropic import keep_tokens

CONDITIONAL = vp.list_encodings(place="conditional")
ENCODINGS = [name for name in vp.list_encodings() if name not in CONDITIONAL]
GRID, PREFIX = (4, 6), 3  # a class token and two registers
FAMILIES = ["DeiT, distilled", "DeiT-III", "EVA-02", "DINOv3", "RoPE-ViT, mixed", "BEiT", "ViT, relative bias"]


def vit(spec):
    model, _ = build("ViT, class token", depth=2, reg_tokens=2)
    return randomised(vp.set_encoding(model, spec))


def mask(batch=3, ratio=0.6):
    return vp.draw_mask(GRID, batch, ratio, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("name", ENCODINGS)
@pytest.mark.parametrize("index", [mask(2).keep, mask(1).keep[0]], ids=["batched", "shared"])
def test_encoding_then_keeping_is_keeping_then_encoding(name, index):
    """With prefix tokens, on what the model's attention gets: queries, keys and bias."""
    model, positions = vit(name), vp.Positions.grid(GRID, PREFIX)
    generator = torch.Generator().manual_seed(3)
    x, tokens = torch.randn(2, PREFIX + 24, 48, generator=generator), index.expand(2, -1)
    qkv = torch.randn(3, 2, 3, PREFIX + 24, 16, generator=generator)

    def kept(values):  # (2, ..., T, C)
        flat = values.reshape(2, -1, *values.shape[-2:])
        return torch.stack([keep_tokens(part, tokens, PREFIX) for part in flat.unbind(1)], 1).view_as(
            values[..., : PREFIX + index.shape[-1], :]
        )

    for encoding in model.pos_embed_input:
        assert (encoding(kept(x), positions.keep(index)) - kept(encoding(x, positions))).abs().max() < 1e-5
    for block in model.blocks:
        encodings = [*model.pos_embed_shared, *block.attn.encodings]
        full = encoded(x, *qkv, [(encoding, encoding.prepare(positions)) for encoding in encodings])
        prepared = [(encoding, encoding.prepare(positions.keep(index))) for encoding in encodings]
        part = encoded(kept(x), *map(kept, qkv), prepared)
        assert (part.q - kept(full.q)).abs().max() < 1e-5
        assert (part.k - kept(full.k)).abs().max() < 1e-5
        if full.bias is not None:
            bias = kept(kept(full.bias.expand(2, 3, -1, -1)).mT).mT
            assert (part.bias - bias).abs().max() < 1e-5


def attended(hidden):
    """(B, 1, T, T) bool: every token sees the prefix tokens and the visible patches."""
    seen = torch.nn.functional.pad(~hidden, (PREFIX, 0), value=True)
    return seen[:, None, None].expand(-1, 1, seen.shape[1], -1)


@pytest.mark.parametrize("name", ENCODINGS)
def test_kept_patches_are_the_full_run_with_the_others_masked_out(name):
    model, (keep, _, hidden) = vit(name), mask()
    with torch.no_grad():
        got = model.forward_kept(pictures((16, 24), 3), keep)
        full = model.forward_features(pictures((16, 24), 3), attn_mask=attended(hidden))
        free = model.forward_features(pictures((16, 24), 3))
    assert got.shape == (3, PREFIX + keep.shape[1], 48)
    assert (got - keep_tokens(full, keep, PREFIX)).abs().max() < 1e-5
    assert (got - keep_tokens(free, keep, PREFIX)).abs().max() > 1e-2


def test_without_position_the_order_of_the_patches_is_all_that_changes():
    """And with one it is not only their set, but where each of them is."""
    keep = mask().keep
    for name in ("none", "sincos2d", "rope_axial", "alibi2d"):
        model = vit(name)
        with torch.no_grad():
            once, flipped = (model.forward_kept(pictures((16, 24), 3), index) for index in (keep, keep.flip(1)))
        assert (once[:, PREFIX:].flip(1) - flipped[:, PREFIX:]).abs().max() < 1e-5
        assert (once[:, :PREFIX] - flipped[:, :PREFIX]).abs().max() < 1e-5


@pytest.mark.parametrize("name", CONDITIONAL)
def test_a_conditional_encoding_takes_zeros_for_the_patches_that_are_not_there(name):
    """Neighbours that are hidden cannot be mixed in: the convolution has zeros in their cells."""
    model, (keep, _, hidden) = vit(name), mask()
    visible = ~hidden.unsqueeze(-1)
    with torch.no_grad():
        got = model.forward_kept(pictures((16, 24), 3), keep)
        ignored = model.forward_features(pictures((16, 24), 3), attn_mask=attended(hidden))
        for encoding in vp.get_encoding(model):
            encode = encoding.encode
            encoding.encode = lambda x, positions, encode=encode: encode(x * visible, positions)
        full = model.forward_features(pictures((16, 24), 3), attn_mask=attended(hidden))
    assert (got - keep_tokens(full, keep, PREFIX)).abs().max() < 1e-5
    assert (got - keep_tokens(ignored, keep, PREFIX)).abs().max() > 1e-2


class Hide(vp.BiasEncoding):
    """No logit but minus infinity for hidden patches, for the models whose forward takes no mask."""

    def __init__(self, num_heads, hidden):
        super().__init__(num_heads)
        self.register_buffer("hidden", hidden)

    def encode(self, queries, keys):
        bias = torch.zeros(self.hidden.shape).masked_fill(self.hidden, float("-inf"))
        return bias[:, None, None].expand(-1, self.num_heads, queries.num_patches, -1)

    def with_prefix(self, bias, queries, keys):
        """Prefix tokens do not see them either."""
        return torch.nn.functional.pad(bias[..., :1, :], (keys, 0)).expand(-1, -1, queries + bias.shape[-2], -1)


SPECS = ["own", "rope_axial", "sincos2d+relative_table", "learned+rope_mixed+alibi2d", "shaw"]


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("family", FAMILIES)
def test_other_hosts(family, spec):
    model, _ = build(family, depth=2)
    if spec != "own":
        vp.set_encoding(model, spec)
    vp.get_encoding(model)  # converted, to what it has
    randomised(model)
    keep, _, hidden = mask()
    with torch.no_grad():
        got = model.forward_kept(pictures((16, 24), 3), keep)
        free = model.forward_features(pictures((16, 24), 3))
        for block in model.blocks:
            block.attn.encodings.append(Hide(3, hidden))
        full = model.forward_features(pictures((16, 24), 3))
    assert (got - keep_tokens(full, keep, model.num_prefix_tokens)).abs().max() < 1e-5
    assert (got - keep_tokens(free, keep, model.num_prefix_tokens)).abs().max() > 1e-3


def test_a_network_for_relative_positions_and_timms_table():
    for options in ({"rel_pos_type": "bias"}, {"rel_pos_type": "mlp", "shared_rel_pos": True}, {"class_token": True}):
        model, _ = build("ViT, relative bias", depth=2, **options)
        vp.get_encoding(model)
        keep, _, hidden = mask()
        with torch.no_grad():
            got = randomised(model).forward_kept(pictures((16, 24), 3), keep)
            for block in model.blocks:
                block.attn.encodings.append(Hide(3, hidden))
            full = model.forward_features(pictures((16, 24), 3))
        assert (got - keep_tokens(full, keep, model.num_prefix_tokens)).abs().max() < 1e-5


def test_every_family_of_the_test_is_in_the_zoo():
    assert set(FAMILIES) < set(ZOO)
