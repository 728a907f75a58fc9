"""The contract of a position encoding. The base class of each of the four places is in `places/`.

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

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .options import GridSize, check_values
from .positions import Positions
from .windows import check_size

Place = Literal["input", "rotary", "bias", "conditional", "none"]
Shape = tuple[int, int]


@dataclass(frozen=True, kw_only=True)
class LayerFacts:
    """The facts that a model knows of one of its layers, or of its stem, where input encodings act. Built by its host.

    A constructor parameter of an encoding that has the name of a field is filled in from here if it has no default, or
    if the class names it in `from_model`. None stands for what this model does not know, such as the heads of a stem.
    """

    dim: int | None  # channels of the tokens that the layer returns
    feat_shape: Shape  # (H, W) of the tokens that see each other: of the grid, or of a window
    num_prefix_tokens: int = 0  # in front of the patch tokens; in a stem, those that get a position
    num_heads: int | None = None
    head_dim: int | None = None
    value_dim: int | None = None  # channels of the values of all heads; by default num_heads * head_dim
    layer: int | None = None  # index, from 0 to depth - 1
    depth: int | None = None  # number of attention layers of the model
    dim_in: int | None = None  # channels of the tokens that the layer gets; by default `dim`
    reference_shape: Shape | None = None  # the grid that is trained on; by default `feat_shape`
    pretrained_window: Shape | None = None  # the window that is trained on; by default `feat_shape`
    window_size: Shape | None = None  # of the attention windows, in a stem before windows that tables repeat
    grid_size: Shape | None = None  # of the table that the model's own position embedding has

    def __post_init__(self):
        for name, source in (("dim_in", "dim"), ("reference_shape", "feat_shape"), ("pretrained_window", "feat_shape")):
            if getattr(self, name) is None:
                object.__setattr__(self, name, getattr(self, source))
        if self.value_dim is None and self.num_heads is not None and self.head_dim is not None:
            object.__setattr__(self, "value_dim", self.num_heads * self.head_dim)


@dataclass(eq=False)
class AttentionTensors:
    """The tensors of one attention layer before the softmax. Encodings change what they need, one after the other."""

    x: Tensor  # (B, T, C) the layer's input, T = prefix + N
    q: Tensor  # (B, heads, T, head_dim), not scaled
    k: Tensor  # (B, heads, T, head_dim)
    v: Tensor  # (B, heads, T, head_dim)
    bias: Tensor | None = None  # ([B,] heads, T, T), added to the scaled logits
    fully_masked: Tensor | None = None  # ([B, heads,] T, 1), queries that a caller's mask lets see no key
    formula: tuple[PositionEncoding, Positions] | None = None  # a bias that attention computes from coordinates
    output: Tensor | None = None  # (B, heads, T, head_dim), added to what attention returns
    value_terms: list[Callable[[Tensor], Tensor]] = field(default_factory=list)  # probabilities -> more output

    def add_bias(self, bias: Tensor) -> None:
        """Add a bias, ([B,] heads or 1, T, T), to what will be added to the logits."""
        self.bias = bias if self.bias is None else self.bias + bias


class OneNode:
    """Base of the modules whose call is one node in a graph of torch.fx, which cannot follow it.

    timm's tracer is told of this class as soon as visionpos and timm are imported, and takes subclasses too: a list of
    leaf modules is complete before the first conversion imports the layers of its family.
    """


class PositionEncoding(OneNode, nn.Module):
    """The position encoding of one layer: base class of the four places, one `torch.nn.Module` per encoding.

    Claims are class attributes, and `check_encoding` holds every class to them. `extrapolation` is what another grid
    does: "interpolate" takes positions into the trained one (`Positions.rescale`), "run_on" lets coordinates run on in
    its steps, "formula" has a frame of its own, "resize" resizes a table, "error" is undefined.

    A model fills in the constructor parameters that have no default and the name of a field of `LayerFacts`, and those
    with a default that `from_model` names. One module serves all layers if it has no parameters and is built alike in
    all of them; otherwise every layer has its own.

    Args:
        reference_shape: the grid that was trained on, a size for each axis. None: coordinates are taken as they are.
        extrapolate: True lets coordinates run on, False interpolates them. None: what `extrapolation` says.

    Example:
        >>> encoding = vp.create_encoding("alibi2d", num_heads=4)
        >>> isinstance(encoding, vp.PositionEncoding), encoding.place, encoding.translation_invariant
        (True, 'bias', True)
    """

    name: ClassVar[str] = ""  # the registry's key
    place: ClassVar[Place]
    paper: ClassVar[str] = ""
    learnable: ClassVar[bool] = False  # has parameters
    from_model: ClassVar[tuple[str, ...]] = ("reference_shape",)  # a class adds to those of its bases
    axes: int | None = 2  # of the coordinates that it takes; None: as many as the grid that was trained on, or any
    translation_invariant: ClassVar[bool] = False  # only coordinate differences matter
    content_dependent: ClassVar[bool] = False  # needs the queries, not only positions
    continuous: ClassVar[bool] = True  # any real coordinates
    extrapolation: ClassVar[Literal["interpolate", "run_on", "formula", "resize", "error"]] = "interpolate"

    _spec: dict[str, Any] | None = None  # in a model: {"name": ..., every option}, see `convert`

    def __new__(cls, *args: Any, **options: Any):
        """Check the values of all options, before any constructor works with them."""
        if args or options:  # a copy has none
            names = list(inspect.signature(cls.__init__).parameters)[1:]
            check_values(cls, {**dict(zip(names, args, strict=False)), **options})
        return super().__new__(cls)

    def __init__(self, *, reference_shape: GridSize | None = None, extrapolate: bool | None = None):
        super().__init__()
        if reference_shape is not None:
            reference_shape = check_size(f"{self.name}: reference_shape", reference_shape, self.axes)
        self.reference_shape, self.extrapolate = reference_shape, extrapolate

    def encode(self, positions: Positions) -> Tensor:
        """Return the encoding of tokens, by their coordinates alone: the one method that an author writes."""
        raise TypeError(f"{type(self).__name__} must define encode()")

    def promote(self, positions: Positions) -> Positions:
        """Return the positions that an encoding was given, in float64 where its parameters are (`Positions.promote`).

        Raises:
            ValueError: coordinates on another number of axes than the encoding takes.
        """
        given, axes = len(positions.feat_shape), self.axes or len(self.reference_shape or ()) or None
        if axes not in (None, given):
            raise ValueError(f"{self.name} needs {axes} coordinates of a token, (y, x) on two axes, got {given}")
        for parameter in self.owner.parameters():  # `next` with a default breaks a graph of torch 2.8
            return positions.promote(parameter.dtype)
        return positions

    @property
    def runs_on(self) -> bool:
        """Return whether coordinates run on beyond the trained grid."""
        return self.extrapolation == "run_on" if self.extrapolate is None else self.extrapolate

    def locate(self, positions: Positions) -> Positions:
        """Return the positions in the coordinates of the grid that was trained on."""
        if self.reference_shape is None or self.runs_on:
            return positions
        return positions.rescale(self.reference_shape)

    def prepare(self, positions: Positions) -> Any:
        """Return what `forward` adds or `modify_attention` needs, computed once for a forward pass."""
        raise TypeError(f"{type(self).__name__} must define prepare()")

    def set_feat_shape(self, feat_shape: tuple[int, int]) -> None:
        """Work on another grid from now on: learned tables are resized for good, formulas need nothing."""

    def reinit_buffers(self) -> None:
        """Compute every non-persistent buffer again, for use after meta-device initialisation."""

    def reset_parameters(self) -> None:
        """Draw the parameters again, and compute the buffers: both are what timm's `init_weights` asks for."""
        self.reinit_buffers()

    def init_non_persistent_buffers(self) -> None:
        """Compute non-persistent buffers again: timm's name for `reinit_buffers`."""
        self.reinit_buffers()

    def no_weight_decay(self) -> set[str]:
        """Return the names of the parameters, in `owner`, that weight decay must not touch: all of them."""
        owner, names, _ = self.__dict__.get("_bound", (self, {}, None))
        return {name for name, _ in owner.named_parameters() if owner is self or name.split(".")[0] in names.values()}

    # `_bound` is (owner, {own name: the owner's}, view) where a table is read in the place that a host has for it.
    @property
    def owner(self) -> nn.Module:
        """Return the module that has the parameters: the encoding itself, or a part of its model."""
        return self.__dict__.get("_bound", (self,))[0]

    def set_parameter(self, name: str, value: Tensor) -> None:
        """Replace a parameter by one of another shape, wherever it lives."""
        owner, names, view = self.__dict__.get("_bound", (self, {}, None))
        name = names.get(name, name)
        new = nn.Parameter(value if view is None else view.write(value, self), getattr(owner, name).requires_grad)
        setattr(owner, name, new)

    def __getattr__(self, name: str):
        owner, names, view = self.__dict__.get("_bound", (None, {}, None))
        if name not in names:
            return super().__getattr__(name)
        if "_is_replica" in self.__dict__:  # which torch made without telling it of the replica's owner
            raise TypeError(f"nn.DataParallel cannot copy {self.name} of a model: take DistributedDataParallel")
        value = getattr(owner, names[name])
        return value if view is None else view.read(value)

    def extra_repr(self) -> str:
        shown = {k: v for k, v in vars(self).items() if not k.startswith("_") and k != "training" and v is not None}
        return ", ".join(f"{key}={value!r}" for key, value in shown.items())


def check_tokens(x: Tensor, axis: int, positions: Positions, what: str) -> None:
    """Check that tokens and positions fit, and say in one clear line where they do not.

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


def put_in_front(table: Tensor, prefix: Tensor | None, num_prefix_tokens: int) -> Tensor:
    """Return a table of patch tokens (..., N, C) with rows of prefix tokens in front: (..., prefix + N, C).

    Args:
        table: (..., N, C).
        prefix: (prefix, C), or with leading axes that broadcast; None for zeros.
        num_prefix_tokens: how many prefix tokens there are.
    """
    if prefix is None:
        return F.pad(table, (0, 0, num_prefix_tokens, 0)) if num_prefix_tokens else table
    return torch.cat([prefix.to(table).expand(*table.shape[:-2], -1, -1), table], dim=-2)


def full_precision(positions: Positions) -> torch.autocast:
    """Return a context in which positions are computed in float32 or better, whatever autocast says."""
    return torch.autocast(positions.coords.device.type, enabled=False)
