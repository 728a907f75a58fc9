"""The contract: what a position encoding is. The base class of each of the four places is in `places.py`.

The author of an encoding writes a single method, `encode`, on positions; the base class of the place adds what is
the same for all: coordinates carried to the grid that was trained on, full precision under autocast, prefix tokens,
dtypes, clear errors.

| place  | base class       | `encode` returns                                     | public method          |
| ------ | ---------------- | ---------------------------------------------------- | ---------------------- |
| input  | `InputEncoding`  | (N, dim), added to the patch tokens                  | `embed(positions)`     |
| rotary | `RotaryEncoding` | (heads or 1, N, head_dim / 2) angles in radians      | `angles(positions)`    |
| bias   | `BiasEncoding`   | (heads, Nq, Nk), added to the scaled attention logits| `bias(positions, keys)`|
| condi- | `Conditional-    | tokens (B, N, C) mixed with their neighbours         | `mix(x, positions)`    |
| tional | Encoding`        |                                                      |                        |

With coordinates of shape (B, N, A) every result has a leading B. A bias that also needs the content of the query
derives from `ContextualBias`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from .positions import Positions

Place = Literal["input", "rotary", "bias", "conditional", "none"]


@dataclass(eq=False)
class AttentionTensors:
    """One attention layer's tensors before the softmax. Encodings change what they need, one after the other."""

    x: Tensor  # (B, T, C) the layer's input, T = prefix + N
    q: Tensor  # (B, heads, T, head_dim), not scaled
    k: Tensor  # (B, heads, T, head_dim)
    v: Tensor  # (B, heads, T, head_dim)
    bias: Tensor | None = None  # ([B,] heads, T, T), added to the scaled logits
    blind: Tensor | None = None  # ([B, heads,] T, 1), queries that a caller's mask lets see no key, if there is a mask
    formula: tuple[PositionEncoding, Positions] | None = None  # a bias that attention computes from coordinates
    output: Tensor | None = None  # (B, heads, T, head_dim), added to what attention returns
    value_terms: list[Callable[[Tensor], Tensor]] = field(default_factory=list)  # probabilities -> more output

    def add_bias(self, bias: Tensor) -> None:
        """Add to the logits."""
        self.bias = bias if self.bias is None else self.bias + bias


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

    def prepare(self, positions: Positions) -> Any:
        """What `forward` adds or `modify_attention` needs, computed once for a forward pass."""
        raise TypeError(f"{type(self).__name__} must define prepare()")

    def set_feat_shape(self, feat_shape: tuple[int, int]) -> None:
        """The model works on another grid from now on. Learned tables are resized for good, formulas need nothing."""

    def reinit_buffers(self) -> None:
        """Compute every non-persistent buffer again, for use after meta-device initialisation."""

    def init_non_persistent_buffers(self) -> None:
        """timm's name for `reinit_buffers`."""
        self.reinit_buffers()

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters, in `home`, that weight decay must not touch: all of them."""
        home, names = self.__dict__.get("_home", (self, ()))
        return {name for name, _ in home.named_parameters() if home is self or name.split(".")[0] in names}

    # A host such as timm's ViT or Swin has its own name and place for a table, which optimisers, checkpoints and timm
    # itself rely on. The encoding then reads the parameter from there, so that it exists once, under the host's name.

    @property
    def home(self) -> nn.Module:
        """The module that has the parameters: the encoding itself, or the owner that it lives in."""
        return self.__dict__.get("_home", (self,))[0]

    def live_in(self, owner: nn.Module) -> None:
        """Keep parameters and child modules in `owner`, under their own names. Those that it has are taken over."""
        if "_home" in self.__dict__:
            return
        names = (*self._parameters, *self._modules)
        for name in names:
            part = getattr(self, name)
            delattr(self, name)
            if getattr(owner, name, None) is None:
                setattr(owner, name, part)
        self._home = (owner, names)  # in a tuple, so that the owner is not registered as a child

    def move_out(self) -> None:
        """Take the parameters and child modules back from the owner."""
        owner, names = self.__dict__.pop("_home", (None, ()))
        for name in names:
            part = getattr(owner, name)
            if isinstance(part, Tensor) and not isinstance(part, nn.Parameter):  # a slice of a larger parameter
                part = nn.Parameter(part.detach().clone())
            setattr(self, name, part)
            setattr(owner, name, None)

    def set_parameter(self, name: str, value: Tensor) -> None:
        """Replace a parameter by one of another shape, wherever it lives."""
        setattr(self.home, name, nn.Parameter(value, requires_grad=getattr(self.home, name).requires_grad))

    def __getattr__(self, name: str):
        home = self.__dict__.get("_home")
        if home is not None and name in home[1]:
            return getattr(home[0], name)
        return super().__getattr__(name)

    def extra_repr(self) -> str:
        hidden = {"training"} if self.extrapolate else {"training", "extrapolate"}
        shown = {k: v for k, v in vars(self).items() if not k.startswith("_") and k not in hidden and v is not None}
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
