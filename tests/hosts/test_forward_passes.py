"""Nothing of a forward pass lives in the model: threads, recomputation from outside, a pass that failed."""

import copy
import inspect
import pickle
import threading
from functools import partial

import pytest
import torch
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    CheckpointImpl,
    apply_activation_checkpointing,
    checkpoint_wrapper,
)

import visionpos as vp
from tests.hosts.families import CHANNELS, GRIDS, deeper, everywhere, fitting
from tests.small import randomised
from visionpos.analysis.zoo import ZOO, build

OWN, ALL_PLACES = "own", "sincos2d+rope_axial+alibi2d+peg"
ONE_SIZE = (
    "BEiT",
    "ViT, relative bias",
    "CaiT",
    "Hiera",
    "CoAtNet",
    "LeViT",
    "EfficientFormer",
    "EfficientFormerV2",
    "GCViT",
    "CrossViT",
    "CoaT",
    "ConViT",
    "Visformer",
    "TNT",
)
ALWAYS = ("Qwen3-ViT", "DeepSeek-ViT", "Gemma 4", "NaFlexViT")  # pictures of any size, without being asked
ANY_SIZE = {
    "Swin": {"strict_img_size": False},
    "Swin v2": {"strict_img_size": False},
    "Swin v2-CR": {"strict_img_size": False},
    "SAM": {},
    "MaxViT": {},
    "XCiT": {},
    "HieraDet": {},
    "TinyViT": {},
    "EfficientViT": {},
    "PiT": {},
    "PVT v2": {},
    "Twins": {},
    "DaViT": {},
}


def converted(family, spec):
    """A model of two blocks or more whose every weight matters, unlike timm's at the start."""
    any_size = {} if family in (*ONE_SIZE, *ALWAYS) else ANY_SIZE.get(family, {"dynamic_img_size": True})
    model, size = build(family, **deeper(family), **any_size)
    vp.get_encoding(model) if spec == OWN else vp.set_encoding(model, fitting(family, spec))
    return randomised(model), size


def inputs(family, size):
    """Arguments of two calls that must not be taken for one another: other sizes or masks, and other pictures."""
    (height, width), draw = size, torch.Generator().manual_seed(1)
    other = (height, width) if family in ONE_SIZE else (2 * height, width)
    first, second = (torch.randn(2, 3, *shape, generator=draw) for shape in ((height, width), other))
    if family != "Hiera":
        return (first,), (second,)
    masks = torch.tensor([[1, 0, 0, 1, 1, 0], [0, 1, 1, 0, 0, 1]]).bool()
    return (first, masks), (second, ~masks)


def blocks_of(model):
    """Every block that takes encodings, by its name."""
    return {name: module for name, module in model.named_modules() if "mixers" in module._modules}


def block_of(model, path):
    """The block that has such a part: the part itself, unless it is one of several attention layers of the block."""
    return model.get_submodule(path.split(".attns.")[0])


def meet_before_every_block(model, blocks, calls):
    """What the calls return when two threads make them, each waiting for the other before every block."""
    gate, found = threading.Barrier(2, timeout=120), [None, None]
    for block in blocks:
        block.register_forward_pre_hook(lambda *_: gate.wait() * 0 or None)

    def call(index):
        try:
            with torch.no_grad():
                found[index] = model(*calls[index])
        except Exception as error:
            found[index] = error
            gate.abort()

    threads = [threading.Thread(target=call, args=(index,)) for index in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


@everywhere(spec=[OWN, ALL_PLACES])
def test_two_threads_get_what_each_gets_alone(family, spec):
    model, size = converted(family, spec)
    calls = inputs(family, size)
    with torch.no_grad():
        want = [model(*call) for call in calls]
    found = meet_before_every_block(model, blocks_of(model).values(), calls)
    assert all(isinstance(out, torch.Tensor) for out in found), found
    assert all(torch.equal(a, b) for a, b in zip(found, want, strict=True))


@pytest.mark.parametrize("family", ["ViT, registers", "EVA-02", "BEiT", "ViT, relative bias", "CaiT"])
def test_two_threads_pretrain_one_masked_autoencoder(family):
    model, size = converted(family, "rope_axial")
    mae = vp.MaskedAutoencoder(model, 32, 2, 2).eval()
    images = torch.randn(2, 2, 3, *size, generator=torch.Generator().manual_seed(1))
    calls = [(x, mae.draw_mask(x, torch.Generator().manual_seed(seed))) for seed, x in enumerate(images)]
    with torch.no_grad():
        want = [mae(*call).prediction for call in calls]
    found = meet_before_every_block(mae, [*model.blocks, *mae.decoder.blocks], calls)
    assert all(torch.equal(a.prediction, b) for a, b in zip(found, want, strict=True))


def test_two_threads_pretrain_one_simmim():
    model, size = converted("Swin", "sincos2d+rope_axial")
    simmim = vp.SimMIM(model).eval()
    images = torch.randn(2, 2, 3, *size, generator=torch.Generator().manual_seed(1))
    calls = [(x, simmim.draw_mask(x, torch.Generator().manual_seed(seed))) for seed, x in enumerate(images)]
    with torch.no_grad():
        want = [simmim(*call).prediction for call in calls]
    found = meet_before_every_block(simmim, blocks_of(model).values(), calls)
    assert all(torch.equal(a.prediction, b) for a, b in zip(found, want, strict=True))


def gradients(model, calls):
    """Of several calls in one backward pass."""
    model.zero_grad()
    sum(model(*call).square().mean() for call in calls).backward()
    return {
        name.replace("_checkpoint_wrapped_module.", ""): parameter.grad.clone()
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }


@everywhere(spec=[OWN, ALL_PLACES], implementation=list(CheckpointImpl))
def test_activation_checkpointing_from_outside_changes_no_gradient(family, spec, implementation):
    model, size = converted(family, spec)
    calls, kinds = inputs(family, size), {type(block) for block in blocks_of(model).values()}
    want = gradients(model, calls)
    wrapper = partial(checkpoint_wrapper, checkpoint_impl=implementation)
    apply_activation_checkpointing(model, checkpoint_wrapper_fn=wrapper, check_fn=lambda m: type(m) in kinds)
    found = gradients(model, calls)
    assert want.keys() == found.keys()
    assert all((found[name] - g).abs().max() <= 1e-6 * g.abs().max().clamp(min=1) for name, g in want.items())


def state_of(model):
    """What every module has, its hooks apart: no attribute may come, go or be another one."""
    hooks = ("_forward_hooks", "_forward_pre_hooks")
    return {
        path: {name: value for name, value in vars(module).items() if not name.startswith(hooks)}
        for path, module in model.named_modules()
    }


def same_state(a, b):
    return a.keys() == b.keys() and all(
        a[path].keys() == b[path].keys() and all(a[path][name] is b[path][name] for name in a[path]) for path in a
    )


@everywhere(where=["attn", "mlp"])
def test_a_pass_that_fails_in_the_middle_leaves_nothing_behind(family, where):
    model, size = converted(family, ALL_PLACES)
    (first, second), blocks = inputs(family, size), list(blocks_of(model).values())
    with torch.no_grad():
        want = model(*second)
        before = state_of(model)
        broken = getattr(blocks[-1], where, blocks[-1]).register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model(*first)
        broken.remove()
        assert same_state(state_of(model), before)
        if family not in GRIDS:
            block, tokens = block_of(model, next(iter(blocks_of(model)))), 384 if family == "Hiera" else 25
            rope = [None, None][: 2 * (family == "Gemma 4")]  # which has no default in timm
            with pytest.raises(RuntimeError, match="needs positions: call it through the model's forward"):
                block(torch.zeros(1, tokens, 48), *rope)
        assert torch.equal(model(*second), want)
        assert same_state(state_of(model), before)


@pytest.mark.parametrize("family", ZOO)
def test_no_module_is_hooked_and_copies_have_their_own_input_encodings(family):
    model, size = converted(family, "sincos2d+rope_axial")
    assert not any(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks for m in model.modules())
    x = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(1))
    modules, paths = (
        dict(model.named_modules()),
        (
            "patch_embed.proj.4",
            "encoder.patch_embed.input_proj",
            "embeds.proj",
            "patch_embed.0",
            "patch_embed1",
            "pixel_embed",
            "patch_embed",
            "encoder.patch_embed",
            "patch_embeds.0.proj",
            "stem.conv",
            "stem.conv2",
            "stem.conv1",
        ),
    )
    patches, stem = [], next(modules[path] for path in paths if path in modules)
    hook = stem.register_forward_hook(lambda module, args, out: patches.append((*args, out)))
    want = model(x)
    hook.remove()
    tokens, out = patches[0]
    assert torch.equal(out, type(stem).forward(stem, tokens))  # without positions
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        vp.set_encoding(copied, "none" if family in CHANNELS else "rope_axial")
        assert not torch.equal(copied(x), want)
    assert torch.equal(model(x), want)


@pytest.mark.parametrize("family", ["ViT, class token", "DeiT, distilled", "CaiT", "SAM"])
def test_hooks_hear_the_sequence_of_blocks_as_in_timm(family):
    plain, size = build(family)
    model = vp.set_encoding(copy.deepcopy(plain), fitting(family, "rope_axial"))
    heard = []
    for each in (plain, model):
        each.blocks.register_forward_hook(lambda module, args, out: heard.append((len(module), out.shape)))
        each.eval()(torch.randn(2, 3, *size))
    assert len(heard) == 2
    assert heard[0] == heard[1]
    assert type(model.blocks[:1]) is type(model.blocks)
    x = torch.randn(2, 3, *size)
    want = model(x)
    model.blocks = checkpoint_wrapper(model.blocks)
    model.blocks.register_forward_hook(lambda *_: heard.append(True))
    assert torch.equal(model(x), want)
    assert heard[-1] is True
    model.blocks = torch.nn.Sequential(*model.blocks)  # surgery
    assert torch.equal(model(x), want)


METHODS = (
    "forward",
    "forward_features",
    "forward_intermediates",
    "get_intermediate_layers",
    "prune_intermediate_layers",
)


@pytest.mark.parametrize("family", ZOO)
def test_methods_take_what_those_of_timm_take(family):
    """In the same order, with the same defaults: timm is free to add some, and this test sees it."""
    plain, _ = build(family)
    model = vp.set_encoding(copy.deepcopy(plain), fitting(family, "rope_axial"))
    pairs = [(getattr(plain, name), getattr(model, name)) for name in METHODS if hasattr(plain, name)]
    for name in blocks_of(model):
        block = model.get_submodule(name)
        attn = next(path for path, module in model.named_modules() if module is getattr(block, "attn", block))
        pairs += [(plain.get_submodule(path).forward, model.get_submodule(path).forward) for path in (name, attn)]
    for theirs, ours in pairs:
        theirs, ours = (
            [(p.name, p.default) for p in inspect.signature(f).parameters.values() if p.kind == p.POSITIONAL_OR_KEYWORD]
            for f in (theirs, ours)
        )
        assert ours[: len(theirs)] == theirs
