"""Rotation of blocks of b channels by the exponential of a skew-symmetric generator, which `liere` and `comrope` share.

For b = 2 a generator is one angle; for larger b its upper triangle takes the place of the angle.
"""

from __future__ import annotations

from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from ..encoding import full_precision
from ..frequencies import require_multiple, to_float64
from ..materialize import is_plain_eager
from ..options import Count
from ..places import RotaryEncoding, take_tokens
from ..positions import Positions
from ..rotation import Layout


def skew(upper: Float[Tensor, "*batch k"], size: int) -> Float[Tensor, "*batch b b"]:
    """Return the skew-symmetric matrices U - U^T of upper triangles (..., size (size - 1) / 2), read row by row."""
    rows, columns = torch.triu_indices(size, size, 1, device=upper.device)
    matrix = upper.new_zeros(*upper.shape[:-1], size, size)
    matrix[..., rows, columns] = upper
    return matrix - matrix.mT


_last: WeakKeyDictionary[BlockRotary, tuple[Tensor, Tensor]] = WeakKeyDictionary()  # copies and pickles are not in it
DEGREE, SQUARINGS = 10, 16  # of the Taylor polynomial, and how often it is squared


def skew_exp(generators: Float[Tensor, "*batch b b"]) -> Float[Tensor, "*batch b b"]:
    """Return exp(A) of skew-symmetric matrices (..., b, b), which are rotations: for b = 2 by a cosine and a sine.

    For b > 2 a Taylor polynomial of A / 2^16, squared 16 times: matrix products alone, so that nothing waits for the
    device. What is squared is Y = exp - I, by exp(2A) - I = 2Y + Y Y: the rounding errors of Y are relative to Y, so
    that the many squarings cost a small A nothing. In float64 the error is that of the generator's own rounding,
    about 1e-16 times its norm, up to a spectral norm of 8192 radians; it is below 1e-6 up to 16384.
    """
    eye = torch.eye(generators.shape[-1], dtype=generators.dtype, device=generators.device)
    if generators.shape[-1] == 2:  # A = [[0, u], [-u, 0]]
        angle = generators[..., :1, 1:]
        return angle.cos() * eye + generators.sin()
    x = generators / 2**SQUARINGS
    y = x
    for n in range(DEGREE, 1, -1):
        y = x + x @ y / n  # at last x + x^2 / 2! + ... + x^DEGREE / DEGREE!
    for _ in range(SQUARINGS):
        y = torch.add(y @ y, y, alpha=2)
    return eye + y


class BlockRotary(RotaryEncoding):
    """Block j of a head is multiplied by exp(A_j), A_j skew-symmetric; `encode` returns the upper triangles of all A_j.

    A = U - U^T turns a block of two channels by minus its angle U, against the sense of RoPE.

    Args:
        num_heads: attention heads.
        head_dim: channels of a head, a multiple of `block`.
        block: b, channels that turn together.
        layout: "interleaved" makes blocks of neighbours, (b j .. b j + b - 1); "half" of every (head_dim / b)-th
            channel. For b = 2 they are the layouts of all rotary encodings.
    """

    def __init__(self, num_heads: Count, head_dim: Count, block: Count, layout: Layout):
        super().__init__(num_heads, head_dim, layout)
        if block < 2:
            raise ValueError(f"block must be 2 or more, got {block}")
        require_multiple("head_dim", head_dim, block, "channels that turn together")
        self.block = block

    @property
    def num_blocks(self) -> int:
        """Blocks of a head."""
        return self.head_dim // self.block

    @property
    def block_angles(self) -> int:
        """Entries of a generator's upper triangle."""
        return self.block * (self.block - 1) // 2

    @property
    def num_angles(self) -> int:
        """Angles per token and head: the upper triangles of all blocks, one after the other."""
        return self.num_blocks * self.block_angles

    def prepare(self, positions: Positions) -> Tensor:
        """Return rotation matrices ([B,] heads or 1, prefix + N, head_dim / b, b, b), for a prefix the identity."""
        positions = self.promote(positions)
        with full_precision(positions):
            angles = F.pad(self.encode(self.locate(positions)), (0, 0, positions.num_prefix_tokens, 0))
            upper = to_float64(angles).unflatten(-1, (self.num_blocks, self.block_angles))
            return self._exp(upper).to(positions.coords.dtype)

    def take_tokens(self, prepared: Tensor, index: Tensor, num_prefix_tokens: int) -> Tensor:
        """Return the matrices of the prefix tokens and of the patch tokens index (B, K)."""
        return take_tokens(prepared.flatten(-3), index, num_prefix_tokens).unflatten(-1, prepared.shape[-3:])

    def _exp(self, upper: Tensor) -> Tensor:
        """Return the exponentials of the generators with these upper triangles.

        They are the costliest of all tables: on a CPU, without gradients, those of the last call are taken where the
        triangles are the same numbers.
        """
        if upper.requires_grad or upper.device.type != "cpu" or not is_plain_eager():
            return skew_exp(skew(upper, self.block))
        triangles, table = _last.get(self, (None, None))
        if triangles is None or not torch.equal(triangles, upper):
            with torch.inference_mode(False):  # of use outside of it, too
                table = skew_exp(skew(upper, self.block))
            _last[self] = upper, table
        return table

    def rotate(self, x: Tensor, prepared: Tensor) -> Tensor:
        """Return x (B, heads, prefix + N, head_dim) turned by what `prepare` returned."""
        interleaved = self.layout == "interleaved"
        with torch.autocast(x.device.type, enabled=False):
            blocks = x.to(torch.promote_types(x.dtype, prepared.dtype))
            if interleaved:
                blocks = blocks.unflatten(-1, (self.num_blocks, self.block))
            else:
                blocks = blocks.unflatten(-1, (self.block, self.num_blocks)).mT
            batch = "b" if prepared.ndim == 6 else ""  # shared matrices are not copied for every sample
            turned = torch.einsum(f"{batch}hnjrc,bhnjc->bhnjr", prepared.to(blocks.dtype), blocks)
            return (turned if interleaved else turned.mT).flatten(-2).to(x.dtype)
