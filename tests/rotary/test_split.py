"""Queries, keys and values in one pass over their buffer: equal to the rotation of q and of k by themselves."""

import pytest
import torch
from timm.models.vision_transformer import Attention as TimmAttention

import visionpos as vp
from visionpos.hosts.attention import Attention, AttentionContext, self_attention, split_heads
from visionpos.rotary.split import MIN_BATCH_TO_EXPAND, split_qkv
from visionpos.rotation import rotate

B, T, HEADS, D = 3, 7, 2, 8


def table(heads, batch, dtype=torch.float32, tokens=T, pairs=D // 2):
    angles = torch.randn(*([batch] if batch else []), heads, tokens, pairs, dtype=torch.float64).mul(2)
    angles[..., : tokens - 5, :] = 0  # prefix tokens
    return angles.requires_grad_(), lambda: torch.stack([angles.cos(), angles.sin()]).to(dtype)


def plain(qkv, table, layout):
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    return (q, k, v) if table is None else (rotate(q, *table, layout), rotate(k, *table, layout), v)


@pytest.mark.parametrize("layout", ["interleaved", "half"])
@pytest.mark.parametrize(
    ("samples", "batch"),
    [(B, None), (B, 1), (B, B), (MIN_BATCH_TO_EXPAND, None), (MIN_BATCH_TO_EXPAND, MIN_BATCH_TO_EXPAND)],
)
@pytest.mark.parametrize("heads", [1, HEADS])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12), (torch.bfloat16, 0.1)], ids=str
)
def test_values_and_gradients_are_those_of_the_definition(dtype, tolerance, heads, samples, batch, layout):
    torch.manual_seed(0)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    angles, turn = table(heads, batch, wide)
    qkv = torch.randn(samples, T, 3, HEADS, D).to(dtype).requires_grad_()
    grads = torch.randn(3, samples, HEADS, T, D).to(dtype)
    found = []
    for function in (split_qkv, plain):
        parts = function(qkv, turn(), layout)
        assert all(part.dtype == dtype and part.shape == (samples, HEADS, T, D) for part in parts)
        found.append([*parts, *torch.autograd.grad(parts, (qkv, angles), tuple(grads))])
    for got, want in zip(*found, strict=True):
        assert got.dtype == want.dtype
        assert (got - want).abs().max() <= tolerance * want.abs().max().clamp(min=1)
    q, k, v = found[0][:3]
    for part, index in ((q, 0), (k, 1)):
        assert torch.equal(part[:, :, :2], qkv[:, :2, index].transpose(1, 2))  # prefix tokens, bit for bit
    assert torch.equal(v, qkv[:, :, 2].transpose(1, 2))


def test_the_split_alone():
    qkv, grads = torch.randn(B, T, 3, HEADS, D, requires_grad=True), torch.randn(3, B, HEADS, T, D)
    for got, want in zip(split_qkv(qkv), plain(qkv, None, None), strict=True):
        assert torch.equal(got, want)
    (got,) = torch.autograd.grad(split_qkv(qkv), qkv, tuple(grads))
    assert torch.equal(got, grads.permute(1, 3, 0, 2, 4))
    (got,) = torch.autograd.grad(split_qkv(qkv)[1].sum(), qkv)  # a gradient for keys alone, expanded from a number
    assert torch.equal(got, torch.tensor([0.0, 1, 0]).view(3, 1, 1).expand_as(got))


@pytest.mark.parametrize("layout", ["interleaved", "half"])
@pytest.mark.parametrize("batch", [None, B])
def test_gradcheck(batch, layout):
    angles, _ = table(HEADS, batch, tokens=2, pairs=2)
    qkv = torch.randn(B, 2, 3, HEADS, 4, dtype=torch.float64, requires_grad=True)

    def function(qkv, angles):
        return split_qkv(qkv, torch.stack([angles.cos(), angles.sin()]), layout)

    assert torch.autograd.gradcheck(function, (qkv, angles))
    assert torch.autograd.gradcheck(split_qkv, (qkv,))


@pytest.mark.parametrize("layout", ["interleaved", pytest.param("half", marks=pytest.mark.slow)])
@pytest.mark.parametrize(("heads", "batch"), [(HEADS, None), (1, None), (1, 2), (HEADS, 2)])
def test_the_gradient_of_the_gradient(heads, batch, layout):
    """By the buffer, by the angles and by both; the plain operations say what is right as well."""
    angles, _ = table(heads, batch, tokens=2, pairs=2)
    qkv = torch.randn(2, 2, 3, HEADS, 4, dtype=torch.float64, requires_grad=True)

    def function(qkv, angles, split=split_qkv):
        return split(qkv, torch.stack([angles.cos(), angles.sin()]), layout)

    assert torch.autograd.gradgradcheck(function, (qkv, angles))
    assert torch.autograd.gradgradcheck(lambda qkv: function(qkv, angles.detach()), (qkv,))
    assert torch.autograd.gradgradcheck(split_qkv, (qkv,))
    seconds = []
    for split in (split_qkv, plain):
        q, k, v = function(qkv, angles, split)
        first = torch.autograd.grad((q @ k.mT @ v).sin().sum(), (qkv, angles), create_graph=True)
        seconds.append(torch.autograd.grad(sum(x.square().sum() for x in first), (qkv, angles)))
    for got, want in zip(*seconds, strict=True):
        assert (got - want).abs().max() < 1e-12 * want.abs().max()


@pytest.mark.parametrize("layout", ["interleaved", "half"])
def test_many_gradients_at_once(layout):
    angles, turn = table(HEADS, None, torch.float64)
    qkv = torch.randn(B, T, 3, HEADS, D, dtype=torch.float64, requires_grad=True)
    grads = torch.randn(5, B, HEADS, T, D, dtype=torch.float64)
    q, k, _ = split_qkv(qkv, turn(), layout)
    got = torch.autograd.grad((q, k), (qkv, angles), (grads, grads), is_grads_batched=True, retain_graph=True)
    for index, grad in enumerate(grads):
        want = torch.autograd.grad((q, k), (qkv, angles), (grad, grad), retain_graph=True)
        for batch, one in zip(got, want, strict=True):
            assert (batch[index] - one).abs().max() < 1e-12


def test_any_memory_layout():
    """Buffers with odd strides or offsets, which cannot be seen as complex numbers in place."""
    _, turn = table(HEADS, None)
    odd = torch.randn(B * T * 3 * HEADS * (D + 1) + 1)[1:].view(B, T, 3, HEADS, D + 1)[..., :D]
    for qkv in (odd, torch.randn(3, T, B, D, HEADS).permute(2, 1, 0, 4, 3)):
        for layout in ("interleaved", "half"):
            for overwrite in (False, True):
                with torch.no_grad():
                    want = plain(qkv, turn(), layout)
                    for got, part in zip(split_qkv(qkv.clone(), turn(), layout, overwrite), want, strict=True):
                        assert (got - part).abs().max() < 1e-6


def attention(norm=False):
    torch.manual_seed(0)
    attn = TimmAttention(HEADS * D, HEADS, qkv_bias=True, qk_norm=norm, norm_layer=torch.nn.LayerNorm)
    attn.__class__, attn.encodings = Attention, torch.nn.ModuleList()
    return attn


def by_definition(attn, x, prepared):
    q, k, v = attn.qkv(x).unflatten(-1, (3, HEADS, D)).permute(2, 0, 3, 1, 4).unbind(0)
    return self_attention(attn, x, attn.q_norm(q), attn.k_norm(k), v, prepared)


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize(
    "names",
    [["rope_axial"], ["rope_mixed"], ["alibi2d", "rope_axial"], ["rope_axial", "string"], ["liere"], ["string"]],
)
def test_attention_layers_with_and_without_norms(names, kept, norm):
    attn, positions = attention(norm), vp.Positions.grid((2, 3), 1)
    if kept:
        positions = positions.keep(torch.tensor([[4, 1, 0], [2, 5, 3], [0, 5, 1]]))
    for name in names:
        facts = {"num_heads": HEADS} if name == "alibi2d" else {"num_heads": HEADS, "head_dim": D}
        attn.encodings.append(vp.create_encoding(name, **facts))
    x = torch.randn(B, positions.num_tokens, HEADS * D, requires_grad=True)
    variables, upstream = [x, *attn.parameters()], torch.randn(B, positions.num_tokens, HEADS * D)
    prepared = tuple((encoding, encoding.prepare(positions)) for encoding in attn.encodings)
    got, want = attn(x, AttentionContext(positions)), by_definition(attn, x, prepared)
    assert (got - want).abs().max() < 1e-6
    wanted = torch.autograd.grad(want, variables, upstream)
    for mine, other in zip(torch.autograd.grad(got, variables, upstream), wanted, strict=True):
        assert (mine - other).abs().max() < 1e-5 * other.abs().max().clamp(min=1)
    with torch.no_grad():  # there the buffer is written in place
        assert (attn.eval()(x, AttentionContext(positions)) - want).abs().max() < 1e-6


def test_hooks_see_what_the_layers_returned():
    attn, positions, seen = attention(), vp.Positions.grid((2, 3), 1), []
    attn.encodings.append(vp.create_encoding("rope_axial", num_heads=HEADS, head_dim=D))
    attn.qkv.register_forward_hook(lambda module, args, out: seen.append(out))
    attn.q_norm.register_forward_hook(lambda module, args, out: seen.append(out))
    x = torch.randn(B, T, HEADS * D)
    with torch.no_grad():
        attn(x, AttentionContext(positions))
        del attn.q_norm._forward_hooks[next(iter(attn.q_norm._forward_hooks))]
        attn(x, AttentionContext(positions))
        want = torch.nn.functional.linear(x, attn.qkv.weight, attn.qkv.bias)
    first, q, second = seen
    assert torch.equal(first, want)
    assert torch.equal(second, want)
    assert torch.equal(q, want.unflatten(-1, (3, HEADS, D))[:, :, 0].transpose(1, 2))


def test_hooks_of_all_modules_see_what_the_layers_returned():
    attn, positions, seen = attention(), vp.Positions.grid((2, 3), 1), []
    attn.encodings.append(vp.create_encoding("rope_axial", num_heads=HEADS, head_dim=D))
    x = torch.randn(B, T, HEADS * D)
    hook = torch.nn.modules.module.register_module_forward_hook(
        lambda module, args, out: seen.append(out) if module is attn.qkv else None
    )
    with hook, torch.no_grad():
        attn(x, AttentionContext(positions))
    assert torch.equal(seen[0], torch.nn.functional.linear(x, attn.qkv.weight, attn.qkv.bias))


def test_a_subclass_that_turns_otherwise_is_heard():
    class Still(type(vp.create_encoding("rope_axial", num_heads=HEADS, head_dim=D))):
        def rotate(self, x, prepared):
            return x

    layer, qkv = attention(), torch.randn(B, T, 3, HEADS, D)
    still, positions = Still(HEADS, D), vp.Positions.grid((2, 3), 1)
    q, k, v, rest = split_heads(layer, qkv, ((still, still.prepare(positions)),))
    assert len(rest) == 1
    for got, want in zip((q, k, v), plain(qkv, None, None), strict=True):
        assert torch.equal(got, want)


def test_transformations_of_functions_take_the_definition():
    _, turn = table(HEADS, None)
    qkv = torch.randn(B, T, 3, HEADS, D)
    want = plain(qkv, turn(), "half")
    mapped = torch.func.vmap(lambda one: split_qkv(one[None], turn().detach(), "half"))(qkv)
    for got, part in zip(mapped, want, strict=True):
        assert (got[:, 0] - part).abs().max() < 1e-6
    _, tangents = torch.func.jvp(lambda one: split_qkv(one, turn().detach(), "half"), (qkv,), (qkv,))
    for got, part in zip(tangents, want, strict=True):
        assert (got - part).abs().max() < 1e-6


def test_rotation_of_a_mapped_axis_whose_strides_are_odd():
    """`vmap` hides it, and complex numbers cannot be read from every second real one."""
    x, angles = torch.randn(3, 33)[:, :32].view(3, 4, 8), torch.randn(4, 4)
    want = torch.stack([vp.apply_rotary(each, angles) for each in x])
    assert torch.equal(torch.vmap(lambda each: vp.apply_rotary(each, angles))(x), want)
