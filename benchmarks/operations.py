"""Rows of single operations over their floor, a copy of what must be read and written; timm's stand beside ours."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from timm.layers import apply_rot_embed_cat
from timm.layers.pos_embed_sincos import RotaryEmbeddingCat
from timm.models.swin_transformer import WindowAttention
from torch import Tensor, nn

import visionpos as vp
from benchmarks.measure import Case, Row, Setting
from visionpos.kernels import rotate_qkv, window_attention


class Copy(nn.Module):
    """A copy of queries and keys, values left where they are: what a rotation must read and write."""

    def forward(self, qkv: Tensor) -> tuple[Tensor, ...]:
        """Return q, k, v (B, heads, N, head_dim) of qkv (B, N, 3, heads, head_dim)."""
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        return q.clone(), k.clone(), v


class Rotation(nn.Module):
    """The rotation of queries and keys by a table that is there already."""

    def __init__(self, encoding: nn.Module, positions: vp.Positions):
        super().__init__()
        self.table, self.layout = encoding.prepare(positions), encoding.layout

    def forward(self, qkv: Tensor) -> tuple[Tensor, ...]:
        """Return q, k, v (B, heads, N, head_dim) of qkv (B, N, 3, heads, head_dim)."""
        return rotate_qkv(qkv, self.table, self.layout)


class TimmRotation(nn.Module):
    """The rotation as timm's attention does it."""

    def __init__(self, table: Tensor):
        super().__init__()
        self.table = table

    def rotate(self, x: Tensor) -> Tensor:
        """Return x (B, heads, N, head_dim) rotated; the first token is a class token."""
        return torch.cat([x[:, :, :1], apply_rot_embed_cat(x[:, :, 1:], self.table)], dim=2).type_as(x)

    def forward(self, qkv: Tensor) -> tuple[Tensor, ...]:
        """Return q, k, v (B, heads, N, head_dim) of qkv (B, N, 3, heads, head_dim)."""
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        return self.rotate(q), self.rotate(k), v


def rotation(setting: Setting, heads: int, head_dim: int, grid: tuple[int, int], batch: tuple[int, int]) -> Case:
    """Build a row of rope_axial; queries and keys are views of one buffer, as a projection leaves them."""
    positions = vp.Positions.grid(grid, num_prefix_tokens=1)
    ours = Rotation(vp.create_encoding("rope_axial", num_heads=heads, head_dim=head_dim), positions)
    shape = {"in_pixels": False, "feat_shape": list(grid), "temperature": 100.0, "grid_indexing": "xy"}
    peer = TimmRotation(RotaryEmbeddingCat(head_dim, **shape).get_embed())
    dtype = torch.bfloat16 if setting.dtype == "bf16" else torch.float32
    qkv = torch.randn(setting.batch(*batch), positions.num_tokens, 3, heads, head_dim, dtype=dtype)
    qkv.requires_grad_(setting.backward)
    return Case((qkv,), {"copy": Copy(), "rope_axial": ours, "timm's": peer}, {"rope_axial": "timm's"})


class Bias(nn.Module):
    """The bias of a whole grid from its table, (heads, N, N)."""

    def __init__(self, encoding: nn.Module, positions: vp.Positions):
        super().__init__()
        self.encoding, self.positions = encoding, positions

    def forward(self) -> Tensor:
        """Return the bias, computed anew."""
        return self.encoding.bias(self.positions)


class TimmBias(nn.Module):
    """The bias as timm's Swin computes it."""

    def __init__(self, attn: WindowAttention):
        super().__init__()
        self.attn = attn

    def forward(self) -> Tensor:
        """Return the bias, computed anew."""
        return self.attn._get_rel_pos_bias()[0]


def gather(setting: Setting, heads: int, grid: tuple[int, int]) -> Case:
    """Build a row of relative_table's bias; the backward pass sums up the gradient of the table."""
    attn = WindowAttention(32 * heads, heads, window_size=grid)
    encoding = vp.create_encoding("relative_table", num_heads=heads, feat_shape=grid)
    encoding.relative_position_bias_table.data.copy_(attn.relative_position_bias_table.data)
    modules = {"timm": TimmBias(attn), "visionpos": Bias(encoding, vp.Positions.grid(grid))}
    return Case((), modules, {"visionpos": "timm"})


class Traffic(torch.autograd.Function):
    """Function that reads and writes as many bytes as two buffers have, one forward and one backward."""

    @staticmethod
    def forward(ctx, qkv: Tensor, forth: Tensor, back: Tensor) -> Tensor:
        ctx.back = back
        return forth.clone()

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[None, None, None]:
        ctx.back.clone()
        return None, None, None


class Roofline(nn.Module):
    """The time that the traffic of window attention takes: q, k, v in, the output out; back also three gradients."""

    def __init__(self, qkv: Tensor):
        super().__init__()
        each = qkv.numel() // 3  # a clone reads and writes, so half of what is moved
        self.forth, self.back = (qkv.new_empty(int(each * moved / 2)) for moved in (3 + 1, 3 + 1 + 3))

    def forward(self, qkv: Tensor) -> Tensor:
        """Return the output's traffic; qkv is not touched."""
        return Traffic.apply(qkv, self.forth, self.back)


class WindowKernel(nn.Module):
    """Attention in the windows of a grid, with bias and shift, by one of two versions."""

    def __init__(self, version: Callable[..., Tensor], bias: Tensor, shifted: bool):
        super().__init__()
        self.version, self.bias, self.shift = version, nn.Parameter(bias), (3, 3) if shifted else (0, 0)

    def forward(self, qkv: Tensor) -> Tensor:
        """Return the attention of qkv (B, H, W, 3, heads, head_dim)."""
        return self.version(qkv, self.bias, (7, 7), self.shift, qkv.shape[-1] ** -0.5)


def window_kernel(setting: Setting, grid: int, heads: int, shifted: bool, batch: tuple[int, int]) -> Case:
    """Build a row of the fused kernel and the plain version over the roofline, a copy of the same bytes."""
    dtype = torch.bfloat16 if setting.dtype == "bf16" else torch.float32
    qkv = torch.randn(setting.batch(*batch), grid, grid, 3, heads, 32, dtype=dtype, requires_grad=setting.backward)
    bias = torch.randn(heads, 49, 49)
    versions = {"fused": window_attention, "plain": window_attention.reference}
    modules = {name: WindowKernel(version, bias.clone(), shifted) for name, version in versions.items()}
    return Case((qkv,), {"roofline": Roofline(qkv.detach()), **modules}, {"fused": "plain"})


ROWS = [
    Row(
        "rotation", "rotation S/16", partial(rotation, heads=6, head_dim=64, grid=(14, 14), batch=(8, 256)), quick=True
    ),
    Row(
        "rotation", "rotation Ti/4", partial(rotation, heads=3, head_dim=64, grid=(8, 8), batch=(64, 1024)), quick=True
    ),
    Row("gather", "gather 7 x 7", partial(gather, heads=3, grid=(7, 7)), quick=True),
    Row("gather", "gather 14 x 14", partial(gather, heads=12, grid=(14, 14)), quick=True),
    *(
        Row(
            "kernel",
            f"kernel {grid} x {grid}{', shifted' * shifted}",
            partial(window_kernel, grid=grid, heads=heads, shifted=shifted, batch=(2, 256)),
            cuda=True,
        )
        for grid, heads in ((56, 3), (14, 12))
        for shifted in (False, True)
    ),
]
