"""The contract: what a position encoding is, and what its base class does once for all of them.

An encoding acts in one of four places. The author of one writes a single method, `encode`, on positions; the base
class of the place adds what is the same for all: coordinates carried to the grid that was trained on, full precision
under autocast, prefix tokens, dtypes, clear errors.

| place  | base class       | `encode` returns                                     | public method          |
| ------ | ---------------- | ---------------------------------------------------- | ---------------------- |
| input  | `InputEncoding`  | (N, dim), added to the patch tokens                  | `embed(positions)`     |
| rotary | `RotaryEncoding` | (heads or 1, N, head_dim / 2) angles in radians      | `angles(positions)`    |
| bias   | `BiasEncoding`   | (heads, Nq, Nk), added to the scaled attention logits| `bias(positions, keys)`|

With coordinates of shape (B, N, A) every result has a leading B.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from .frequencies import require_multiple
from .positions import Positions
from .rotary.rotation import Layout, rotate

Place = Literal["input", "rotary", "bias", "conditional", "none"]


class PositionEncoding(nn.Module):
    """One layer's position encoding. Claims are class attributes, and `check_encoding` holds every class to them.

    Args:
        reference_shape: the grid that was trained on. Positions on another grid are interpolated into it, end to end
            (`Positions.rescale`). None: coordinates are taken as they are.
        extrapolate: let coordinates run on beyond `reference_shape` instead of interpolating them.
    """

    name: ClassVar[str] = ""  # the registry's key
    place: ClassVar[Place]
    paper: ClassVar[str] = ""
    learnable: ClassVar[bool] = False  # has parameters
    shared: ClassVar[bool] = True  # one module serves all layers of a model
    translation_invariant: ClassVar[bool] = False  # only coordinate differences matter
    content_dependent: ClassVar[bool] = False  # needs the queries, not only positions
    continuous: ClassVar[bool] = True  # any real coordinates
    extrapolation: ClassVar[Literal["formula", "resize", "error"]] = "formula"  # what another grid size does

    def __init__(self, *, reference_shape: tuple[int, int] | None = None, extrapolate: bool = False):
        super().__init__()
        self.reference_shape = None if reference_shape is None else tuple(reference_shape)
        self.extrapolate = extrapolate

    def encode(self, positions: Positions) -> Tensor:
        """The one method of an encoding. Written by its author; called through the public method of the place."""
        raise TypeError(f"{type(self).__name__} must define encode()")

    def locate(self, positions: Positions) -> Positions:
        """The positions in the coordinates of the grid that was trained on."""
        if self.reference_shape is None or self.extrapolate:
            return positions
        return positions.rescale(self.reference_shape)

    def set_feat_shape(self, feat_shape: tuple[int, int]) -> None:
        """The model works on another grid from now on. Learned tables are resized for good, formulas need nothing."""

    def reinit_buffers(self) -> None:
        """Compute every non-persistent buffer again, for use after meta-device initialisation."""

    def init_non_persistent_buffers(self) -> None:
        """timm's name for `reinit_buffers`."""
        self.reinit_buffers()

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that weight decay must not touch: all of them."""
        return {name for name, _ in self.named_parameters(recurse=True)}

    # A host such as timm's ViT or Swin has its own name and place for a table, which optimisers, checkpoints and timm
    # itself rely on. The encoding then reads the parameter from there, so that it exists once, under the host's name.

    def live_in(self, owner: nn.Module) -> None:
        """Keep the parameters in `owner`, under their own names. One that `owner` already has there is taken over."""
        if "_home" in self.__dict__:
            return
        names = tuple(self._parameters)
        for name in names:
            parameter = self._parameters.pop(name)
            if getattr(owner, name, None) is None:
                setattr(owner, name, parameter)
        self._home = (owner, names)  # in a tuple, so that the owner is not registered as a child

    def move_out(self) -> None:
        """Take the parameters back from the owner."""
        owner, names = self.__dict__.pop("_home", (None, ()))
        for name in names:
            self.register_parameter(name, getattr(owner, name))
            setattr(owner, name, None)

    def set_parameter(self, name: str, value: Tensor) -> None:
        """Replace a parameter by one of another shape, wherever it lives."""
        owner = self.__dict__.get("_home", (self,))[0]
        setattr(owner, name, nn.Parameter(value, requires_grad=getattr(owner, name).requires_grad))

    def __getattr__(self, name: str):
        home = self.__dict__.get("_home")
        if home is not None and name in home[1]:
            return getattr(home[0], name)
        return super().__getattr__(name)

    def extra_repr(self) -> str:
        shown = {k: v for k, v in vars(self).items() if not k.startswith("_") and k != "training" and v is not None}
        return ", ".join(f"{key}={value!r}" for key, value in shown.items())


def check_tokens(x: Tensor, axis: int, positions: Positions, what: str) -> None:
    """One clear line where tokens and positions do not fit.

    Raises:
        ValueError: another number of tokens, or of samples.
    """
    if x.shape[axis] != positions.num_tokens:
        raise ValueError(
            f"{what} has {x.shape[axis]} tokens, but the positions describe {positions.num_tokens}: "
            f"{positions.num_prefix_tokens} prefix + {positions.num_patches} patch tokens"
        )
    if positions.is_batched and positions.coords.shape[0] not in (1, x.shape[0]):
        raise ValueError(f"{what} has {x.shape[0]} samples, but the positions have {positions.coords.shape[0]}")


def full_precision(positions: Positions) -> torch.autocast:
    """Positions are computed in float32 or better, whatever autocast says."""
    return torch.autocast(positions.coords.device.type, enabled=False)


class InputEncoding(PositionEncoding):
    """Adds a vector to each token before the first block.

    Args:
        dim: channels of a token.
    """

    place = "input"

    def __init__(self, dim: int, **frame):
        super().__init__(**frame)
        require_multiple("dim", dim, 1, "the channels of a token")
        self.dim = dim

    def embed(self, positions: Positions) -> Float[Tensor, "*batch n dim"]:
        """The vectors of the patch tokens: (N, dim), or (B, N, dim) for batched coordinates."""
        with full_precision(positions):
            return self.encode(self.locate(positions)).to(positions.coords.dtype)

    def embed_prefix(self, num_prefix_tokens: int) -> Tensor | None:
        """The vectors of the prefix tokens, (P, dim); None means zeros, as in MAE."""
        return None

    def forward(self, x: Float[Tensor, "b t dim"], positions: Positions) -> Float[Tensor, "b t dim"]:
        """x (B, prefix + N, dim) plus the encoding, in x's dtype.

        Raises:
            ValueError: another number of tokens or channels than the positions and the encoding have.
        """
        check_tokens(x, 1, positions, "x")
        if x.shape[-1] != self.dim:
            raise ValueError(f"x has {x.shape[-1]} channels, but {self.name} was built with dim={self.dim}")
        table = self.embed(positions)
        if positions.num_prefix_tokens:
            prefix = self.embed_prefix(positions.num_prefix_tokens)
            if prefix is None:
                table = F.pad(table, (0, 0, positions.num_prefix_tokens, 0))
            else:
                table = torch.cat([prefix.expand(*table.shape[:-2], -1, -1), table], dim=-2)
        return x + table.to(x.dtype)


class RotaryEncoding(PositionEncoding):
    """Rotates the channel pairs of queries and keys by angles that depend on the token's position.

    Args:
        num_heads: attention heads.
        head_dim: channels of a head, even.
        layout: which channels form a pair: "interleaved" (2i, 2i + 1) or "half" (i, i + head_dim / 2).
    """

    place = "rotary"

    def __init__(self, num_heads: int, head_dim: int, layout: Layout = "interleaved", **frame):
        super().__init__(**frame)
        require_multiple("head_dim", head_dim, 2, "channels are rotated in pairs")
        if layout not in ("interleaved", "half"):
            raise ValueError(f"layout must be 'interleaved' or 'half', got {layout!r}")
        self.num_heads, self.head_dim, self.layout = num_heads, head_dim, layout

    def angles(self, positions: Positions) -> Float[Tensor, "*batch heads n pairs"]:
        """Angles of the patch tokens in radians: (heads or 1, N, head_dim / 2), float32."""
        with full_precision(positions):
            return self.encode(self.locate(positions)).to(positions.coords.dtype)

    def prepare(self, positions: Positions) -> Tensor:
        """Cosines and sines, (2, [B,] heads or 1, prefix + N, head_dim / 2); prefix tokens get the identity."""
        with full_precision(positions):
            angles = F.pad(self.encode(self.locate(positions)), (0, 0, positions.num_prefix_tokens, 0))
            return torch.stack([angles.cos(), angles.sin()]).to(positions.coords.dtype)

    def modify_attention(self, q: Tensor, k: Tensor, bias: Tensor | None, prepared: Tensor):
        """Queries, keys and bias (or None) of an attention layer, with this encoding in them."""
        cos, sin = prepared.unbind(0)
        return rotate(q, cos, sin, self.layout), rotate(k, cos, sin, self.layout), bias

    def forward(self, q: Float[Tensor, "b heads t d"], k: Float[Tensor, "b heads t d"], positions: Positions):
        """q and k (B, heads, prefix + N, head_dim), rotated, in their own dtype. Prefix tokens stay as they are.

        Raises:
            ValueError: another number of tokens, heads or channels than the positions and the encoding have.
        """
        for what, x in (("q", q), ("k", k)):
            check_tokens(x, 2, positions, what)
            if (x.shape[1], x.shape[3]) != (self.num_heads, self.head_dim):
                raise ValueError(
                    f"{what} has {x.shape[1]} heads of {x.shape[3]} channels, but {self.name} was built with "
                    f"num_heads={self.num_heads}, head_dim={self.head_dim}"
                )
        q, k, _ = self.modify_attention(q, k, None, self.prepare(positions))
        return q, k


class BiasEncoding(PositionEncoding):
    """Adds a number to each attention logit, after the scaling by 1 / sqrt(head_dim).

    Args:
        num_heads: attention heads.
    """

    place = "bias"

    def __init__(self, num_heads: int, **frame):
        super().__init__(**frame)
        require_multiple("num_heads", num_heads, 1, "attention heads")
        self.num_heads = num_heads

    def encode(self, queries: Positions, keys: Positions) -> Tensor:
        """The bias between patch tokens, (heads, Nq, Nk), or (B, heads, Nq, Nk)."""
        raise TypeError(f"{type(self).__name__} must define encode()")

    def bias(self, positions: Positions, keys: Positions | None = None) -> Float[Tensor, "*batch heads q k"]:
        """The bias of queries at `positions` and keys at `keys` (by default the same): (heads, prefix + N, prefix + N).

        Rows and columns of prefix tokens are zero. Float32, and added after the scaling of the logits.
        """
        keys = positions if keys is None else keys
        with full_precision(positions):
            queries = self.locate(positions)
            bias = self.encode(queries, queries if keys is positions else self.locate(keys))
        bias = bias.to(positions.coords.dtype)
        if positions.num_prefix_tokens or keys.num_prefix_tokens:
            bias = F.pad(bias, (keys.num_prefix_tokens, 0, positions.num_prefix_tokens, 0))
        return bias

    def prepare(self, positions: Positions) -> Tensor:
        """What `modify_attention` needs, computed once for a forward pass."""
        return self.bias(positions)

    def modify_attention(self, q: Tensor, k: Tensor, bias: Tensor | None, prepared: Tensor):
        """Queries, keys and bias (or None) of an attention layer, with this encoding in them."""
        return q, k, prepared if bias is None else bias + prepared

    def forward(self, logits: Float[Tensor, "b heads q k"], positions: Positions, keys: Positions | None = None):
        """Scaled logits (B, heads, prefix + N, prefix + N) plus the bias, in the logits' dtype."""
        check_tokens(logits, 2, positions, "logits")
        check_tokens(logits, 3, positions if keys is None else keys, "logits")
        return logits + self.bias(positions, keys).to(logits.dtype)
