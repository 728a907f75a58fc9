"""torch's fused attention, kept from a backend whose gradients are wrong."""

from __future__ import annotations

from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from .choose import one_thread

WITHOUT_CUDNN = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float, dropout_p: float = 0.0) -> Tensor:
    """Return softmax(scale q k^T + bias) v, (B, heads, T, head_dim), by `F.scaled_dot_product_attention`.

    cuDNN, torch's first choice on a GPU of compute capability 9.0, gives gradients of the queries that are NaN where
    there is a bias, the keys are 64 more than a multiple of 128 (a grid of 8 x 8 has 64), and the logits of a query are
    so low that their sum of exponentials is below 1 / FLT_MAX (https://github.com/pytorch/pytorch/issues/196678). Such
    attention goes to another backend.
    """
    options = {"attn_mask": bias, "dropout_p": dropout_p, "scale": scale}
    if bias is None or not q.is_cuda or not torch.is_grad_enabled() or k.shape[-2] % 128 != 64:
        return F.scaled_dot_product_attention(q, k, v, **options)
    with nullcontext() if torch.compiler.is_compiling() else one_thread, sdpa_kernel(WITHOUT_CUDNN):
        return F.scaled_dot_product_attention(q, k, v, **options)
