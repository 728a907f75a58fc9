"""Positions of tokens: points on the image plane, not indices in a sequence."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Int, Num
from torch import Tensor

from .materialize import is_plain_eager
from .windows import check_shift, check_size, same_grid, window_partition


@dataclass(frozen=True, eq=False)
class Positions:
    """The coordinates of a model's patch tokens, in units of one grid step, first axis first: (y, x).

    Args:
        coords: (N, A), or (B, N, A) where every sample has its own. Kept in float32 (or float64) whatever the model's
            dtype. Token order is free: coordinates, not order, say where a token is.
        feat_shape: the grid that the coordinates live on, (H, W) for A = 2. It is never guessed from the coordinates.
        num_prefix_tokens: class and register tokens in front of the patch tokens. They have no coordinates.

    Raises:
        ValueError: coordinates that are no real numbers, of another rank or number of axes, an empty grid, or a count
            that is no integer.

    Example:
        >>> positions = vp.Positions.grid((2, 3), num_prefix_tokens=1)
        >>> positions.num_tokens, positions.coords[4].tolist()
        (7, [1.0, 1.0])
        >>> positions.keep(torch.tensor([5, 0])).coords.tolist()
        [[1.0, 2.0], [0.0, 0.0]]
    """

    coords: Num[Tensor, "*batch n axes"] = field(repr=False)
    feat_shape: tuple[int, ...]
    num_prefix_tokens: int = 0
    is_grid: bool = False  # every cell of `feat_shape` once, in row-major order

    def __post_init__(self):
        coords = self.coords
        if not isinstance(coords, Tensor) or coords.is_complex() or coords.dtype == torch.bool:
            raise ValueError(f"coords must be a tensor of real numbers, got {getattr(coords, 'dtype', repr(coords))}")
        if coords.ndim not in (2, 3) or not coords.shape[-1]:
            raise ValueError(f"coords must have shape (N, axes) or (B, N, axes), got {tuple(coords.shape)}")
        coords = coords if coords.dtype == torch.float64 else coords.float()
        prefix = self.num_prefix_tokens
        if not isinstance(prefix, (int, torch.SymInt)) or isinstance(prefix, bool) or prefix < 0:
            raise ValueError(f"num_prefix_tokens must be 0 or more, an integer, got {prefix!r}")
        object.__setattr__(self, "coords", coords)
        object.__setattr__(self, "feat_shape", check_size("feat_shape", self.feat_shape, coords.shape[-1]))

    @classmethod
    def grid(
        cls, feat_shape: tuple[int, ...], num_prefix_tokens: int = 0, device: torch.device | str | None = None
    ) -> Positions:
        """Return the positions of all cells of a grid in row-major order: that of row y and column x is (y, x)."""
        feat_shape = check_size("feat_shape", feat_shape, None)
        axes = [torch.arange(size, dtype=torch.float32, device=device) for size in feat_shape]
        coords = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).flatten(0, -2)  # (N, A)
        return cls(coords, feat_shape, num_prefix_tokens, is_grid=True)

    @property
    def num_patches(self) -> int:
        """Return N, the number of patch tokens of one sample."""
        return self.coords.shape[-2]

    @property
    def num_tokens(self) -> int:
        """Return the number of prefix and patch tokens of one sample."""
        return self.num_prefix_tokens + self.num_patches

    @property
    def is_batched(self) -> bool:
        """Return whether every sample has its own coordinates."""
        return self.coords.ndim == 3

    def keep(self, index: Int[Tensor, "*batch k"]) -> Positions:
        """Return the positions of a subset of the patch tokens: masked autoencoders, patch dropout.

        Args:
            index: (B, K) or (K,) indices into the patch tokens (prefix tokens not counted), from 0 to N - 1, in any
                order. One that comes twice gives two tokens in one place, both of which see and are seen; a convolution
                adds up what stands in a place.

        Raises:
            ValueError: an index that is no tensor of integers, of another shape, or, on a CPU, out of range.
        """
        whole = isinstance(index, Tensor) and index.dtype in (torch.int64, torch.int32)
        if not whole or index.ndim not in (1, 2):
            given = f"{index.dtype} {tuple(index.shape)}" if isinstance(index, Tensor) else repr(index)
            raise ValueError(f"index must be a tensor of integers of shape (K,) or (B, K), got {given}")
        if index.device.type == "cpu" and index.numel() and is_plain_eager():  # elsewhere it would wait for the device
            outside = index[(index < 0) | (index >= self.num_patches)].tolist()
            if outside:
                raise ValueError(f"index must lie in 0 .. {self.num_patches - 1}, got {outside[0]}")
        coords = self.coords
        if index.ndim == 2 and self.is_batched and len(coords) not in (1, len(index)):
            raise ValueError(f"index has {len(index)} samples, but the positions have {len(coords)}")
        if index.ndim == 1:
            coords = coords.index_select(-2, index)  # ([B,] K, A)
        else:
            coords = coords.expand(index.shape[0], -1, -1)  # (B, N, A)
            coords = coords.gather(1, index.long().unsqueeze(-1).expand(-1, -1, coords.shape[-1]))  # (B, K, A)
        return replace(self, coords=coords, is_grid=False)

    def windows(self, window_size: tuple[int, int], shift: tuple[int, int] = (0, 0)) -> Positions:
        """Return the positions cut into windows exactly as Swin cuts tokens: rolled up and left by `shift`, then cut.

        Returns:
            Positions with coords (windows, wh * ww, 2), windows and the tokens of a window in row-major order, in the
            coordinates of the whole grid.

        Raises:
            ValueError: the positions are not a whole two-axis grid, the grid is not a multiple of the window, or the
                shift is not in [0, window).
        """
        window_size = check_size("window_size", window_size)
        shift = check_shift(shift, window_size)
        if not self.is_grid or len(self.feat_shape) != 2:
            raise ValueError("windows() needs the positions of a whole two-axis grid: Positions.grid((H, W))")
        coords = self.coords.unflatten(0, self.feat_shape).roll((-shift[0], -shift[1]), (0, 1))  # (H, W, 2)
        coords = window_partition(coords.unsqueeze(0), window_size)  # (windows, wh * ww, 2)
        return Positions(coords, self.feat_shape)

    def rescale(self, feat_shape: tuple[int, ...]) -> Positions:
        """Return the same tokens in the coordinates of another grid, end to end.

        Each axis: coords * (new - 1) / (old - 1), with the numbers of cells of both grids.

        The corner tokens of a whole grid keep their places at the corners, so a larger grid stays inside the
        coordinates of the smaller one. An axis of one cell has only the coordinate 0.
        """
        feat_shape = check_size("feat_shape", feat_shape, len(self.feat_shape))
        if same_grid(feat_shape, self.feat_shape):
            return self
        ratio = [(new - 1) / max(old - 1, 1) for new, old in zip(feat_shape, self.feat_shape, strict=True)]
        coords = torch.stack([axis * r for axis, r in zip(self.coords.unbind(-1), ratio, strict=True)], dim=-1)
        return replace(self, coords=coords, feat_shape=feat_shape, is_grid=False)

    def promote(self, dtype: torch.dtype) -> Positions:
        """Return the same positions for tokens or parameters of a dtype: in float64 if it is, and never in less.

        What is computed from positions has the dtype of their coordinates, so that a float64 model is that throughout.
        """
        wide = torch.promote_types(self.coords.dtype, dtype)
        return self if wide == self.coords.dtype else replace(self, coords=self.coords.to(wide))

    def to(self, device: torch.device | str) -> Positions:
        """Return the same positions on another device."""
        return replace(self, coords=self.coords.to(device))
