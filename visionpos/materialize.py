"""Differences between eager mode and traced graphs: which of them runs, and tables that graphs write to memory.

A compiler repeats the computation of a table, such as the gather of a bias, for every element that reads it: in windows
as often as there are windows.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._python_dispatch import is_in_torch_dispatch_mode


def is_plain_eager() -> bool:
    """Return whether operations do what they say and nothing else: no trace, no transformation of functions."""
    return not (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or is_in_torch_dispatch_mode()
    )


def must_be_differentiable(*grads: Tensor) -> bool:
    """Return whether a backward pass may only use operations that have derivatives and batches themselves.

    That is so where a graph of it is built, for gradients of a higher order, where it is transformed, and where `grads`
    are batches of gradients, as `torch.autograd.grad(is_grads_batched=True)` has them.
    """
    if torch.is_grad_enabled() or not is_plain_eager():
        return True
    return any(torch._C._functorch.is_legacy_batchedtensor(grad) for grad in grads)


@torch.library.custom_op("visionpos::materialize", mutates_args=(), schema="(Tensor x) -> Tensor")
def _materialize(x: Tensor) -> Tensor:
    return x.clone()


@_materialize.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


@_materialize.register_vmap
def _(info, in_dims: tuple[int], x: Tensor) -> tuple[Tensor, int]:
    return _materialize(x), in_dims[0]


_materialize.register_autograd(lambda ctx, grad: grad)


def _is_exporting() -> bool:  # asked while a graph is traced: torch 2.8 takes every graph for an exported one
    return torch.compiler.is_exporting()


_is_exporting._dynamo_marked_constant = True  # torch.compiler.assume_constant_result without importing the compiler


def materialize(x: Tensor) -> Tensor:
    """Return x, in a compiled graph as an operation that nothing is fused with. Exported programs do without."""
    if torch.compiler.is_compiling() and not _is_exporting():
        return _materialize(x)
    return x
