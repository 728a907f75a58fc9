"""The contract as a test that anyone can run on an encoding of their own: `vp.check_encoding("my_encoding")`.

Each `check_*` function takes a class and raises AssertionError where it breaks its word. Grids are not square.
"""

from __future__ import annotations

import copy
import pickle
import tempfile
from collections.abc import Callable

import torch
from timm.models import save_for_hf
from torch import Tensor

from .convert import get_encoding, set_encoding
from .create import create_model
from .encoding import PositionEncoding
from .hosts.host import find_host, mixes_tokens
from .places import BiasEncoding
from .positions import Positions
from .probe import BATCH, DIM, GRID, HEAD_DIM, HEADS, content, output, raw, small_encoding
from .registry import complete_options, constructor_parameters, get_encoding_class

PREFIXES = (0, 1, 2, 5)
HALVES = (torch.bfloat16, torch.float16)

CHECKS: dict[str, Callable[[type[PositionEncoding]], None]] = {}


def _check(function: Callable[[type[PositionEncoding]], None]):
    CHECKS[function.__name__.removeprefix("check_")] = function
    return function


def _tokens_last(place: str, table: Tensor) -> Tensor:
    return table if place == "bias" else table.movedim(-2, -1)  # (..., N) or (..., N, N)


def _close(got: Tensor, want: Tensor, what: str, tolerance: float = 1e-5) -> None:
    assert got.shape == want.shape, f"{what}: shape {tuple(got.shape)} instead of {tuple(want.shape)}"
    error = (got.double() - want.double()).abs().max().item() if got.numel() else 0.0
    assert error <= tolerance, f"{what}: off by {error:.3g}"


@_check
def check_shapes(cls: type[PositionEncoding]) -> None:
    """Check the documented shapes and dtypes, also on grids of one row or column."""
    for grid in (GRID, (1, 6), (6, 1), (1, 1)):
        count = grid[0] * grid[1]
        encoding = small_encoding(cls, grid)
        table = raw(encoding, Positions.grid(grid))
        want = {
            "input": [(count, DIM)],
            "bias": [(HEADS, count, count)],
            "conditional": [(count, DIM)],
            "rotary": [(heads, count, getattr(encoding, "num_angles", 0)) for heads in (1, HEADS)],
        }[cls.place]
        want = [(BATCH, *shape) for shape in want] if cls.content_dependent else want
        assert tuple(table.shape) in want, f"on a {grid} grid: shape {tuple(table.shape)}, expected one of {want}"
        assert table.dtype == torch.float32, f"dtype {table.dtype}, expected float32"
        assert table.isfinite().all(), f"not finite on a {grid} grid"


@_check
def check_prefix_tokens(cls: type[PositionEncoding]) -> None:
    """Check that patch tokens do not depend on prefix tokens, whose q and k stay bit-equal."""
    bare = output(small_encoding(cls), Positions.grid(GRID))
    for prefix in PREFIXES:
        positions = Positions.grid(GRID, num_prefix_tokens=prefix)
        encoding = small_encoding(cls, prefix=0)
        full = output(encoding, positions)
        patches = full[:, prefix:] if cls.place in ("input", "conditional") else full[..., prefix:, prefix:]
        _close(patches, bare, f"patch tokens with {prefix} prefix tokens")
        if cls.place == "rotary":
            q = torch.randn(BATCH, HEADS, positions.num_tokens, HEAD_DIM)
            rotated, _ = encoding(q, q, positions)
            same = torch.equal(rotated[:, :, :prefix], q[:, :, :prefix])
            assert same or not cls.linear, "prefix tokens were rotated"
            assert cls.linear or not (same and prefix), "claims not to be linear, but leaves prefix tokens as they are"


@_check
def check_kept_tokens(cls: type[PositionEncoding]) -> None:
    """Check that encode then keep equals keep then encode, per sample, in any order; a shared index too.

    Not for conditional encodings: a token whose neighbours were dropped is another token.
    """
    encoding, positions = small_encoding(cls), Positions.grid(GRID, num_prefix_tokens=2)
    index = torch.tensor([[7, 1, 0, 6, 2, 5], [3, 14, 9, 0, 11, 12]])  # the first leaves out the last row and columns
    assert output(encoding, positions.keep(index)).isfinite().all()
    if cls.place == "conditional":
        return
    full = _tokens_last(cls.place, raw(encoding, Positions.grid(GRID)))
    full = full[0] if cls.content_dependent else full
    kept = _tokens_last(cls.place, raw(encoding, Positions.grid(GRID).keep(index)))
    shared = _tokens_last(cls.place, raw(encoding, Positions.grid(GRID).keep(index[0])))
    for sample, rows in enumerate(index):
        want = full[..., rows, :][..., rows] if cls.place == "bias" else full[..., rows]
        _close(kept[sample], want, "kept tokens", 1e-6)
        if sample == 0:
            shared = shared[0] if cls.content_dependent else shared
            _close(shared, want, "kept tokens shared by the batch", 1e-6)


@_check
def check_batched_coordinates(cls: type[PositionEncoding]) -> None:
    """Check that coordinates (B, N, A) give what each sample's own coordinates give."""
    encoding, coords = small_encoding(cls), Positions.grid(GRID).coords
    batched = raw(encoding, Positions(torch.stack([coords, coords.roll(4, 0)]), GRID))
    for sample, own in zip(batched, (coords, coords.roll(4, 0)), strict=True):
        alone = raw(encoding, Positions(own, GRID))
        _close(sample, alone[0] if cls.content_dependent else alone, "batched coordinates", 1e-6)


@_check
def check_positions_matter(cls: type[PositionEncoding]) -> None:
    """Check that permuting the coordinates changes the output: the encoding is not a no-op."""
    encoding, positions = small_encoding(cls), Positions.grid(GRID)
    order = torch.randperm(15, generator=torch.Generator().manual_seed(3))
    moved = (output(encoding, positions.keep(order)) - output(encoding, positions)).abs().max()
    assert moved > 1e-3, "permuted coordinates changed nothing"


@_check
def check_dtypes(cls: type[PositionEncoding]) -> None:
    """Check that output dtype is input dtype, and that .half(), .bfloat16() and autocast change no numbers."""
    positions = Positions.grid((24, 40), num_prefix_tokens=1)
    exact = raw(small_encoding(cls, (24, 40)), positions)
    for dtype in HALVES:
        encoding = small_encoding(cls, (24, 40)).to(dtype)
        small = Positions.grid((24, 40)).keep(torch.arange(0, 960, 97))
        assert output(encoding, small, dtype).dtype == dtype, f"output of {dtype} tokens is not {dtype}"
        tolerance = 1e-6 if not cls.learnable else 4 * torch.finfo(dtype).eps * exact.abs().max().item()
        _close(raw(encoding, positions), exact, f"after .to({dtype})", tolerance)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(raw(small_encoding(cls, (24, 40)), positions), exact), "autocast changed the numbers"


@_check
def check_state(cls: type[PositionEncoding]) -> None:
    """Check that deepcopy, pickle and state dict keep it, without buffers, and that backward leaves nothing behind."""
    encoding, positions = small_encoding(cls), Positions.grid(GRID)
    want = output(encoding, positions)
    if cls.learnable:
        output(encoding, positions).sum().backward()
    for copied in (copy.deepcopy(encoding), pickle.loads(pickle.dumps(encoding))):
        assert torch.equal(output(copied, positions), want), "a copy differs"
    names = {name for name, _ in encoding.named_parameters()}
    assert set(encoding.state_dict()) == names, f"the state dict holds {set(encoding.state_dict())}, not {names}"
    fresh = small_encoding(cls)
    with torch.no_grad():
        for parameter in fresh.parameters():
            parameter.fill_(7)
    output(fresh, positions)  # a cache filled here would be stale below
    fresh.load_state_dict(encoding.state_dict())
    assert torch.equal(output(fresh, positions), want), "stale after load_state_dict"


@_check
def check_meta_device(cls: type[PositionEncoding]) -> None:
    """Check that one built on the meta device, loaded, its buffers computed again, is as good as new.

    timm's models call `reset_parameters` after `to_empty`, which must leave no buffer as it was.
    """
    encoding, positions = small_encoding(cls), Positions.grid(GRID)
    with torch.device("meta"):
        other = small_encoding(cls)
    other = other.to_empty(device="cpu")
    for restore in ("reinit_buffers", "reset_parameters"):
        with torch.no_grad():
            for tensor in [*other.parameters(), *other.buffers()]:
                tensor.fill_(-12345)
        getattr(other, restore)()
        other.load_state_dict(encoding.state_dict())
        same = torch.equal(output(other, positions), output(encoding, positions))
        assert same, f"differs after {restore}(), which must compute every buffer"


@_check
def check_gradients(cls: type[PositionEncoding]) -> None:
    """Check that every parameter gets a gradient, finite and not zero; without parameters `learnable` is False."""
    encoding, positions = small_encoding(cls), Positions.grid(GRID)
    parameters = dict(encoding.named_parameters())
    assert bool(parameters) == cls.learnable, f"learnable is {cls.learnable}, parameters: {list(parameters)}"
    if parameters:
        out = output(encoding, positions)
        (out * torch.randn(out.shape, generator=torch.Generator().manual_seed(5))).sum().backward()
    for name, parameter in parameters.items():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), f"{name} has no finite gradient"
        assert parameter.grad.abs().sum() > 0, f"{name} has a zero gradient"


@_check
def check_translation(cls: type[PositionEncoding]) -> None:
    """Check the claim `translation_invariant`: shifted coordinates leave logits unchanged, or must change them."""
    encoding, positions = small_encoding(cls), Positions.grid(GRID)
    shifted = Positions(positions.coords + torch.tensor([1.0, 2.0]), GRID)
    if cls.extrapolation in ("resize", "error") and not cls.translation_invariant:
        return  # a table knows no place outside its grid
    if cls.place == "input":  # logits of tokens that carry only the encoding
        tables = raw(encoding, positions), raw(encoding, shifted)
        # random projections, as attention has them: sinusoids are only relative without
        weights = torch.randn(2, DIM, DIM, generator=torch.Generator().manual_seed(2)) / DIM
        before, after = ((table @ weights[0]) @ (table @ weights[1]).T for table in tables)
    else:
        before, after = output(encoding, positions), output(encoding, shifted)
    moved = ((after - before).abs().max() / before.abs().max()).item()
    if cls.translation_invariant:
        assert moved < 1e-4, f"claims translation invariance, but a shift moves logits by {moved:.2g}"
    else:
        assert moved > 1e-2, f"does not claim translation invariance, but a shift moves logits by only {moved:.2g}"


@_check
def check_formula(cls: type[PositionEncoding]) -> None:
    """Check that a bias's formula, for kernels, gives what `encode` does: on grids, at real coordinates, per sample."""
    if cls.place != "bias":
        return
    encoding, coords = small_encoding(cls), Positions.grid(GRID).coords
    between = torch.stack([coords, coords.roll(4, 0)]) * (0.7 if cls.continuous else 1)
    for positions in (Positions.grid(GRID), Positions.grid((5, 9)), Positions(between, GRID)):
        located = encoding.locate(positions)
        if encoding.formula(located) is not None:
            pairs = BiasEncoding.encode(encoding, located, located)
            _close(pairs, encoding.encode(located, located), "formula() against encode()")


@_check
def check_resolution(cls: type[PositionEncoding]) -> None:
    """Check other grids: coordinates are interpolated or run on, as `extrapolation` claims; a table is resized."""
    other = Positions.grid((5, 9))
    if cls.extrapolation == "error":
        return
    table = raw(small_encoding(cls), other)
    assert table.isfinite().all(), "not finite on a larger grid"
    own_frame = cls.locate is not PositionEncoding.locate  # not end to end
    if cls.extrapolation != "resize" and "extrapolate" in constructor_parameters(cls) and not own_frame:
        corner = torch.tensor([0, 4, 18, 22, 44])  # cells of the larger grid that lie on cells of the smaller one
        same = torch.tensor([0, 2, 5, 7, 14])
        inside, on, claimed = (
            raw(small_encoding(cls, reference_shape=GRID, extrapolate=way), other) for way in (False, True, None)
        )
        own = _tokens_last(cls.place, raw(small_encoding(cls), Positions.grid(GRID)))
        pick = (lambda t, i: t[..., i, :][..., i]) if cls.place == "bias" else (lambda t, i: t[..., i])
        _close(pick(_tokens_last(cls.place, inside), corner), pick(own, same), "interpolated coordinates")
        assert torch.equal(on, table), "extrapolate=True is not the formula itself"
        want = on if cls.extrapolation == "run_on" else inside
        assert torch.equal(claimed, want), f"claims {cls.extrapolation!r} and does not do it"
    elif cls.extrapolation == "resize":
        encoding = small_encoding(cls)
        encoding.set_feat_shape((5, 9))
        _close(raw(encoding, other), table, "set_feat_shape() against resizing in forward", 1e-6)


@_check
def check_errors(cls: type[PositionEncoding]) -> None:
    """Check that tokens that do not fit the positions are one clear ValueError."""
    encoding, wrong = small_encoding(cls), Positions.grid((2, 5), num_prefix_tokens=1)
    right = Positions.grid(GRID)
    message = ""
    try:
        if cls.place == "rotary":
            encoding(content(encoding, right), content(encoding, right), wrong)
        elif cls.place == "bias":
            encoding(torch.zeros(1, HEADS, right.num_tokens, right.num_tokens), wrong)
        else:
            encoding(content(encoding, right), wrong)
    except ValueError as error:
        message = str(error)
    assert message, "15 tokens with positions for 11 raised no ValueError"
    assert "tokens" in message and "\n" not in message, f"unclear: {message}"


# Small models of two families, in which grid and windows have other sides, and stages other numbers of heads.
MODELS = {
    "vit_tiny_patch16_224": {"img_size": (16, 24), "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3},
    "swin_tiny_patch4_window7_224": {
        **{"img_size": (16, 32), "window_size": 4, "embed_dim": 48, "depths": (1, 1), "num_heads": (3, 6)},
    },
}


@_check
def check_layers(cls: type[PositionEncoding]) -> None:
    """Check that every layer of a ViT and a Swin has it, a module of its own where it learns, built for that layer."""
    for name, options in MODELS.items():
        model = create_model(name, encoding=cls.name, **options)
        host = find_host(model)
        inputs, layers = host.encodings(model)
        facts = host.layer_facts(model)
        if cls.place == "input":
            layers, facts = [inputs], [host.input_facts(model)]
        elif mixes_tokens(cls):
            layers, facts = ([of[i] for i in host.mixing_layers(model)] for of in (layers, facts))
        for index, (encodings, fact) in enumerate(zip(layers, facts, strict=True)):
            assert [type(each) for each in encodings] == [cls], f"layer {index} of {name} has {encodings}"
            for key, want in complete_options(cls, {}, fact).items():
                got = want if want is None else getattr(encodings[0], key, want)
                assert got == want, f"in layer {index} of {name} {key} is {got!r}, but it was built with {want!r}"
        different = len({encodings[0] for encodings in layers})
        assert different == len(layers) or not cls.learnable, f"the layers of {name} share a module with parameters"


@_check
def check_round_trips(cls: type[PositionEncoding]) -> None:
    """Check that a ViT and a Swin stay what they are when given what they have, and when saved and loaded."""
    for name, options in MODELS.items():
        torch.manual_seed(0)
        model = create_model(name, encoding=cls.name, **options).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        images = torch.randn(2, 3, *options["img_size"])
        keys, want = list(model.state_dict()), model(images)
        set_encoding(model, get_encoding(model))
        assert list(model.state_dict()) == keys, f"set_encoding(m, get_encoding(m)) renames parameters of {name}"
        assert torch.equal(model(images), want), f"set_encoding(m, get_encoding(m)) changes {name}"
        if "img_size" not in getattr(model, "_model_args", ()):  # timm records what made a model since 1.0.31
            continue
        with tempfile.TemporaryDirectory() as folder:
            save_for_hf(model, folder)
            loaded = create_model(f"local-dir:{folder}", pretrained=True).eval()
        assert torch.equal(loaded(images), want), f"{name} saved and loaded is another function"


def check_encoding(name_or_class: str | type[PositionEncoding]) -> list[str]:
    """Hold an encoding to the contract and to every claim that it declares.

    Args:
        name_or_class: a registered name, or a registered class.

    Returns:
        The names of the checks that were run; "none" has nothing to check.

    Raises:
        AssertionError: one line that names the encoding, the check and what was found.

    Example:
        >>> vp.check_encoding("peg")[:3]
        ['shapes', 'prefix_tokens', 'kept_tokens']
    """
    cls = get_encoding_class(getattr(name_or_class, "name", name_or_class))
    if cls.place == "none":
        return []
    for name, check in CHECKS.items():
        try:
            check(cls)
        except AssertionError as error:
            raise AssertionError(f"{cls.name}: {name}: {error}") from None
        except Exception as error:
            raise AssertionError(f"{cls.name}: {name}: raised {type(error).__name__}: {error}") from error
    return list(CHECKS)
