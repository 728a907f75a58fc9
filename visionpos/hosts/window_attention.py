"""Window attention of Swin Transformers with a slot for encodings.

Encodings see the coordinates of the window, which differ from the grid's by an offset.
"""

from __future__ import annotations

import torch
from timm.layers import use_fused_attn
from timm.models.swin_transformer import WindowAttention as TimmWindowAttention
from torch import Tensor, nn

from ..encoding import AttentionTensors, OneNode
from ..kernels import window_attention
from ..kernels.choose import considered
from ..materialize import materialize
from ..positions import Positions
from .attention import Prepared, attend, attend_logits, encoded, is_hooked, split_heads


def takes_fused_path(layer: nn.Module, x: Tensor) -> bool:
    """Return whether torch's fused attention runs: where timm's switch says so, on CUDA unless TIMM_FUSED_ATTN=0.

    On a CPU timm's own steps run by default, and so give its bits.
    """
    return layer.fused_attn or (x.is_cuda and use_fused_attn())


def prepare_windows(layer: nn.Module, x: Tensor) -> Prepared:
    """Return the encodings of the layer and their tables, for windows x (B * windows, N, C)."""
    positions = Positions.grid(layer.window_size, device=x.device).promote(x.dtype)
    prepared = ((encoding, encoding.prepare(positions)) for encoding in layer.encodings)
    return tuple((e, materialize(table) if isinstance(table, Tensor) else table) for e, table in prepared)


def hide_regions(tensors: AttentionTensors, mask: Tensor | None, least: Tensor | None = None) -> None:
    """Add Swin's shift mask to the bias, which becomes (1 or B, windows, heads or 1, N, N): one term for the logits.

    Once for all images. A mask of 0 and -inf leaves the bits of (logits + bias) + mask.

    Args:
        tensors: after all encodings.
        mask: (windows, N, N), additive; the windows of an image are neighbours in the batch. None changes nothing.
        least: what a hidden key gets instead of -inf, (heads, 1, 1).
    """
    if mask is None:
        return
    bias = tensors.bias
    hidden = mask.unsqueeze(1) if least is None else mask.unsqueeze(1).maximum(least)  # (windows, 1 or heads, N, N)
    if bias is None:
        tensors.bias = hidden.unsqueeze(0)  # (1, windows, 1 or heads, N, N)
    else:
        alike = bias.shape[0] == 1  # for all images
        tensors.bias = bias.unflatten(0, (-1, 1 if alike else len(mask))) + hidden


def attend_windows(layer: nn.Module, tensors: AttentionTensors, fused: bool, tau: Tensor | None = None) -> Tensor:
    """Return softmax(q k^T + bias) v, projected: (B * windows, N, C).

    Args:
        layer: has `num_heads`, `attn_drop`, `proj` and `proj_drop`.
        tensors: after all encodings and `hide_regions`; q or k has the scale of the logits, but for tau.
        fused: by torch's fused attention; otherwise by timm's steps, and so with its bits.
        tau: what the product of q and k is multiplied with, (heads, 1, 1), if anything.
    """
    q, bias = tensors.q, tensors.bias
    if fused:
        tensors.k = tensors.k if tau is None else (tensors.k * tau).to(tensors.k.dtype)
        if bias is not None and bias.ndim == 5:  # torch's fused attention takes four dimensions only
            tensors.bias = bias.expand(q.shape[0] // bias.shape[1], -1, layer.num_heads, -1, -1).flatten(0, 1)
        out = attend(tensors, 1.0, layer.attn_drop, fused=True)  # (B * windows, heads, N, head_dim)
    else:
        tensors.bias = None
        out = attend_logits(tensors, window_logits(q, tensors.k, bias, tau), layer.attn_drop)
    return layer.proj_drop(layer.proj(out.transpose(1, 2).flatten(2)))


def window_logits(q: Tensor, k: Tensor, bias: Tensor | None, tau: Tensor | None = None) -> Tensor:
    """Return tau q k^T + bias, (B * windows, heads, N, N), in the wider dtype of both."""
    if bias is None:
        logits = q @ k.transpose(-2, -1)  # (B * windows, heads, N, N)
        return logits if tau is None else logits * tau
    windows = bias.shape[-4] if bias.ndim == 5 else q.shape[0]  # whose bias repeats
    logits = q.unflatten(0, (-1, windows)) @ k.unflatten(0, (-1, windows)).transpose(-2, -1)
    logits = logits if tau is None else logits * tau
    wider = torch.promote_types(logits.dtype, bias.dtype)
    logits = logits.add_(bias) if logits.dtype == wider else logits + bias  # nobody else needs the product
    return logits.flatten(0, 1)


def fuse_windows(block: nn.Module, x: Tensor) -> Tensor | None:
    """Return the attention of a Swin block on its grid x (B, H, W, C) by one kernel, which cuts the windows itself.

    None where that kernel does not run: it knows biases and the shift mask, and neither hooks nor dropout.
    """
    if not considered(x):
        return None
    attn = block.attn
    biases = len(attn.encodings) and all(e.place == "bias" and not e.content_dependent for e in attn.encodings)
    drops = attn.training and attn.attn_drop.p > 0
    if not biases or drops or is_hooked(attn) or attn._forward_pre_hooks:
        return None
    bias = sum(table for _, table in prepare_windows(attn, x))  # (heads, N, N)
    options = tuple(block.window_size), tuple(block.shift_size), attn.scale
    kind = x.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
    shape = *x.shape[:3], 3, attn.num_heads, x.shape[-1] // attn.num_heads
    if not window_attention.runs(x.new_empty(1, dtype=dtype).expand(shape), bias, *options):
        return None
    out = window_attention.fused(attn.qkv(x).view(shape), bias, *options)  # (B, H, W, heads, head_dim)
    return attn.proj_drop(attn.proj(out.flatten(3)))


class WindowAttention(OneNode, TimmWindowAttention):
    """Window attention of Swin with encodings, on tokens x (B * windows, N, C)."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return tokens (B * windows, N, C); `mask` (windows, N, N) is Swin's shift mask, added to the logits."""
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, -1))  # (B * windows, N, 3, heads, head_dim)
        q, k, v, prepared = split_heads(self, qkv, prepare_windows(self, x))  # (B * windows, heads, N, head_dim) each
        tensors = encoded(x, q, k, v, prepared)
        tensors.q = tensors.q * self.scale
        hide_regions(tensors, mask)
        return attend_windows(self, tensors, takes_fused_path(self, x))

    def set_window_size(self, window_size: tuple[int, int]) -> None:
        """Work on another window from now on; tables are resized."""
        self.window_size = tuple(window_size)
        self.window_area = self.window_size[0] * self.window_size[1]
        for encoding in self.encodings:
            encoding.set_feat_shape(self.window_size)

    def reset_parameters(self) -> None:
        """Do nothing: the encodings reset their own parameters."""

    def _init_buffers(self) -> None:
        """Do nothing: the encodings compute their own buffers."""
