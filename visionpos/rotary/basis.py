"""Rotation in a learned basis, which `string` and `harope` share, and the way of the basis into the projection."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from ..encoding import AttentionTensors, full_precision
from ..positions import Positions
from ..rotation import map_qk_rows, rotate
from .scaling import FrequencyRotary

Prepared = tuple[Tensor, Tensor, Tensor]  # cosines and sines; the bases of queries and of keys


class BasisRotary(FrequencyRotary):
    """Queries and keys are multiplied by a matrix each before they turn: q A and k B, rows, with A^T B = I.

    So q . k is what it was at the offset 0, and depends on the offset alone as it does without a basis. Attention
    leaves it at that. Called by itself, the encoding goes back into the channels that it got, by the inverses B^T and
    A^T, which cancel in q . k: so prefix tokens stay as they are.
    """

    def bases(self) -> tuple[Float[Tensor, "heads d d"], Float[Tensor, "heads d d"]]:
        """Return the matrices A of queries and B of keys, (heads or 1, head_dim, head_dim), float64."""
        raise TypeError(f"{type(self).__name__} must define bases()")

    def prepare(self, positions: Positions) -> Prepared:
        """Return cosines and sines as for any rotary encoding, and the bases."""
        positions = self.promote(positions)
        with full_precision(positions):
            a, b = (basis.to(positions.coords.dtype) for basis in self.bases())
            return super().prepare(positions), a, b

    def take_tokens(self, prepared: Prepared, index: Tensor, num_prefix_tokens: int) -> Prepared:
        """Return cosines and sines of the prefix tokens and of the patch tokens index (B, K), and the bases."""
        table, *bases = prepared
        return super().take_tokens(table, index, num_prefix_tokens), *bases

    def _turn(self, x: Tensor, table: Tensor, inner: Tensor, outer: Tensor | None = None) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            exact = x.to(torch.promote_types(x.dtype, inner.dtype))
            inside = exact @ inner.to(exact.dtype)
            turned = rotate(inside, *table.unbind(0), self.layout)
            if outer is not None:  # prefix tokens do not turn, so nothing is added to them
                turned = exact + (turned - inside) @ outer.to(exact.dtype)
            return turned.to(x.dtype)

    def rotate(self, x: Tensor, prepared: Prepared) -> Tensor:
        """Return queries x (B, heads, prefix + N, head_dim) turned, and back in their own channels."""
        table, a, b = prepared
        return self._turn(x, table, a, b.mT)

    def rotate_qk(self, q: Tensor, k: Tensor, prepared: Prepared) -> tuple[Tensor, Tensor]:
        """Return queries and keys turned, and back in their own channels."""
        table, a, b = prepared
        return self._turn(q, table, a, b.mT), self._turn(k, table, b, a.mT)

    def modify_attention(self, tensors: AttentionTensors, prepared: Prepared) -> None:
        """Multiply queries and keys, those of prefix tokens too, and turn them: the same logits for half the work."""
        table, a, b = prepared
        tensors.q, tensors.k = self._turn(tensors.q, table, a), self._turn(tensors.k, table, b)

    def fold(self, rows: Tensor, fused: bool = True, keys: bool = False) -> Tensor:
        """Return weight or bias of the query and key projection with the bases in it.

        Args:
            rows: as in `convert_qk_layout`.
            fused: False for a projection of queries or of keys alone.
            keys: of a projection that is not fused: it is that of the keys.
        """
        bases = torch.stack(self.bases()) if fused else self.bases()[int(keys)].unsqueeze(0)  # (2 or 1, heads, D, D)
        return map_qk_rows(rows, self.num_heads, lambda table: (bases.mT @ table.to(bases)).to(rows), fused)
