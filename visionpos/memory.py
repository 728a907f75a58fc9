"""A result that is computed again only where something has changed that it depends on.

What it depends on is compared by value, tensor by tensor, with copies made when it was computed: an edit of any kind is
seen, through `.data` too, and no name or count of a version can be out of date.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

_COMPARABLE = {bool, int, float, str, type(None), torch.dtype, torch.device}
_OF_EVERY_MODULE = {*vars(nn.Module()), "_bound", "_spec"}
_RANDOM = object()  # a module in training mode, which may drop out
_results: WeakKeyDictionary[nn.Module, tuple[tuple, Any]] = WeakKeyDictionary()  # copies and pickles are not in it


def is_plain_eager() -> bool:
    """Whether operations do what they say and nothing else: no trace, no transformation of functions."""
    return not (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or is_in_torch_dispatch_mode()
    )


def _flatten(value: Any, leaves: list[Any]) -> None:
    """Append all that a value consists of; of a module its parameters, buffers, children, attributes and hooks."""
    if isinstance(value, nn.Module):
        own = {name: part for name, part in vars(value).items() if name not in _OF_EVERY_MODULE}
        unknown = [*value._forward_hooks.values(), *value._forward_pre_hooks.values(), *[_RANDOM] * value.training]
        value = (type(value), value._parameters, value._buffers, value._modules, own, unknown)
    if isinstance(value, dict):
        value = tuple(value.items())
    if isinstance(value, (tuple, list)):
        leaves.append(len(value))
        for part in value:
            _flatten(part, leaves)
    else:
        leaves.append(value)


def _is_comparable(leaf: Any) -> bool:
    """On a CPU, where comparing does not wait; tensors of other classes may be traced or distributed."""
    if type(leaf) in (Tensor, nn.Parameter):
        return leaf.device.type == "cpu"
    return type(leaf) in _COMPARABLE or isinstance(leaf, type)


def _same(leaf: Any, old: Any) -> bool:
    if type(old) is Tensor:
        return isinstance(leaf, Tensor) and leaf.dtype == old.dtype and torch.equal(leaf, old)
    return type(leaf) is type(old) and leaf == old


def remembered(module: nn.Module, compute: Callable[[], Any], depends_on: tuple) -> Any:
    """What `compute` returns, or what it returned for this module last time if all of `depends_on` is the same.

    Computed every time in training mode, where gradients are wanted, away from a CPU, under transformations, and where
    something is no tensor, number or text. A module has one result: the last.

    Args:
        module: the owner; the result goes with it.
        compute: without randomness, a function of `depends_on` alone.
        depends_on: tensors, numbers, texts, modules, and containers of them.
    """
    if not is_plain_eager():
        return compute()
    leaves: list[Any] = [torch.is_inference_mode_enabled()]  # its tensors are of no use to a training step
    _flatten(depends_on, leaves)
    needs_grad = torch.is_grad_enabled() and any(isinstance(leaf, Tensor) and leaf.requires_grad for leaf in leaves)
    if needs_grad or not all(map(_is_comparable, leaves)):
        _results.pop(module, None)
        return compute()
    old, result = _results.get(module, ((), None))
    if len(leaves) != len(old) or not all(map(_same, leaves, old)):
        result = compute()
        copies = tuple(leaf.detach().clone() if isinstance(leaf, Tensor) else leaf for leaf in leaves)
        _results[module] = copies, result
    return result
