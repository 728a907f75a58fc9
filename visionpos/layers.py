"""Layers for a model of one's own: an encoding together with the positions of a grid, used as a layer of timm is.

`PosEmbed` and `SinCos2d` add to tokens, `RelPosBias` adds to attention logits, `Rope2d` rotates queries and keys,
`PosConv` mixes neighbouring tokens. Each takes any encoding of its place by name, and is built for a grid (H, W), whose
coordinates it holds as a buffer, so that they follow `.to()`; tokens, logits or queries and keys are all it is given.

Parameters have timm's names in the state dict: `pos_embed`, `relative_position_bias_table`. docs/layers.md builds five
small models from these layers.

Example:
    >>> pos_embed = vp.layers.PosEmbed((14, 10), dim=192, num_prefix_tokens=1)
    >>> pos_embed(torch.zeros(2, 1 + 140, 192)).shape, list(pos_embed.state_dict())
    (torch.Size([2, 141, 192]), ['pos_embed'])
"""

from __future__ import annotations

from typing import Any, ClassVar

from jaxtyping import Float
from torch import Tensor, nn

from .encoding import LayerFacts, Place, PositionEncoding, full_precision
from .hosts.parameters import bind_parameters
from .positions import Positions
from .registry import check_options, complete_options, get_encoding_class, list_encodings

__all__ = ["PosConv", "PosEmbed", "RelPosBias", "Rope2d", "SinCos2d"]


class PositionLayer(nn.Module):
    """Base class of the layers: an encoding, and the coordinates of the grid that it is used on.

    Every call takes `positions` besides, for tokens elsewhere than on the whole grid: `layer.positions.keep(index)`
    where some are dropped or masked, `vp.Positions.grid((h, w))` for another grid.

    Attributes:
        encoding: the encoding. Its parameters are the layer's own, under the encoding's names for them.
        coords: buffer (N, 2) of integers, (y, x) of each patch token; not in the state dict.
        feat_shape: (H, W).
        num_prefix_tokens: class and register tokens in front of the patch tokens.
    """

    place: ClassVar[Place]

    def __init__(
        self,
        encoding: str,
        feat_shape: tuple[int, int],
        num_prefix_tokens: int,
        options: dict[str, Any],
        **facts: int | None,
    ):
        super().__init__()
        cls = get_encoding_class(encoding)
        if cls.place != self.place:
            valid = ", ".join(list_encodings(place=self.place))
            raise ValueError(
                f"{type(self).__name__} takes one of {valid}; {encoding!r} acts in the place {cls.place!r}"
            )
        check_options(cls, options)
        grid = Positions.grid(feat_shape, num_prefix_tokens)  # checked as well
        known = LayerFacts(feat_shape=grid.feat_shape, num_prefix_tokens=num_prefix_tokens, **facts)
        self.feat_shape, self.num_prefix_tokens = grid.feat_shape, num_prefix_tokens
        self.register_buffer("coords", grid.coords.int(), persistent=False)  # integers keep their values under .half()
        self.encoding: PositionEncoding = cls(**complete_options(cls, options, known))
        bind_parameters(self.encoding, self)

    @property
    def positions(self) -> Positions:
        """Return the positions of all tokens of the grid, on the device of the layer."""
        return Positions(self.coords, self.feat_shape, self.num_prefix_tokens, is_grid=True)

    def set_feat_shape(self, feat_shape: tuple[int, int]) -> None:
        """Work on another grid (H, W) from now on: a learned table is resized for good, as its paper does."""
        grid = Positions.grid(feat_shape, device=self.coords.device)
        self.encoding.set_feat_shape(grid.feat_shape)
        self.feat_shape, self.coords = grid.feat_shape, grid.coords.int()

    def reinit_buffers(self) -> None:
        """Compute the buffers again, for use after `to_empty` of a layer that was built on the meta device."""
        self.coords = Positions.grid(self.feat_shape, device=self.coords.device).coords.int()
        self.encoding.reinit_buffers()

    def init_non_persistent_buffers(self) -> None:
        """Compute the buffers again: timm's name for `reinit_buffers`."""
        self.reinit_buffers()

    def no_weight_decay(self) -> set[str]:
        """Return the names of the parameters that weight decay must not touch."""
        return self.encoding.no_weight_decay()

    def extra_repr(self) -> str:
        prefix = f", num_prefix_tokens={self.num_prefix_tokens}" if self.num_prefix_tokens else ""
        return f"feat_shape={self.feat_shape}{prefix}"


class PosEmbed(PositionLayer):
    """Add a vector to each token, x + e(position): by default ViT's learned table (Dosovitskiy et al. 2021).

    Args:
        feat_shape: (H, W) of the patch grid.
        dim: channels of a token.
        num_prefix_tokens: class and register tokens in front, which have rows of their own in a learned table.
        encoding: the name of an input encoding.
        options: of the encoding, such as init_std.

    Raises:
        ValueError: an encoding of another place, or a wrong option.

    Example:
        >>> layer = vp.layers.PosEmbed((2, 3), dim=8, encoding="factorized")
        >>> layer(torch.zeros(5, 6, 8)).shape, layer.get_embed().shape
        (torch.Size([5, 6, 8]), torch.Size([1, 6, 8]))
    """

    place = "input"

    def __init__(
        self,
        feat_shape: tuple[int, int],
        dim: int,
        num_prefix_tokens: int = 0,
        encoding: str = "learned",
        **options: Any,
    ):
        super().__init__(encoding, feat_shape, num_prefix_tokens, options, dim=dim)

    def get_embed(self, positions: Positions | None = None) -> Float[Tensor, "batch t dim"]:
        """Return what is added, (1, prefix + N, dim) as timm's `pos_embed`; (B, ...) for positions of each sample."""
        table = self.encoding.prepare(self.positions if positions is None else positions)
        return table if table.ndim == 3 else table.unsqueeze(0)

    def forward(self, x: Float[Tensor, "b t dim"], positions: Positions | None = None) -> Float[Tensor, "b t dim"]:
        """Return tokens x (B, prefix + N, dim) plus the encoding, in x's dtype.

        Raises:
            ValueError: another number of tokens or channels.
        """
        return self.encoding(x, self.positions if positions is None else positions)


class SinCos2d(PosEmbed):
    """Add MAE's fixed sinusoid of the column and of the row (He et al. 2021); it has no parameters.

    Args:
        feat_shape: (H, W) of the patch grid.
        dim: channels of a token, a multiple of 4.
        num_prefix_tokens: class and register tokens in front, which get zeros.
        options: of the encoding `sincos2d`: temperature, preset ("mae", "mocov3", "big_vision" or "timm").

    Example:
        >>> layer = vp.layers.SinCos2d((2, 3), dim=8, num_prefix_tokens=1)
        >>> torch.equal(layer.get_embed()[0, 1:], vp.sincos_2d((2, 3), dim=8)), layer.state_dict()
        (True, OrderedDict())
    """

    def __init__(self, feat_shape: tuple[int, int], dim: int, num_prefix_tokens: int = 0, **options: Any):
        super().__init__(feat_shape, dim, num_prefix_tokens, "sincos2d", **options)


class RelPosBias(PositionLayer):
    """Add a number to each attention logit, q k^T / sqrt(head_dim) + b: by default Swin's table (Liu et al. 2021).

    Args:
        feat_shape: (H, W) of the window, or of the grid for global attention.
        num_heads: attention heads.
        num_prefix_tokens: class and register tokens in front; without bias, but in `preset="beit"`.
        encoding: the name of a bias encoding.
        options: of the encoding, such as init_std. What a model would know is given here too: head_dim, layer, depth.

    Attributes:
        relative_position_bias_table: the parameter of `relative_table`, ((2H - 1)(2W - 1), heads).
        relative_position_index: its buffer (N, N) int64, the row for each pair; not in the state dict, as in timm.

    Raises:
        ValueError: an encoding of another place, a wrong option, or encodings that add vectors to values too.

    Example:
        >>> layer = vp.layers.RelPosBias((7, 7), num_heads=3)
        >>> layer(torch.zeros(8, 3, 49, 49)).shape, layer.as_attn_mask(8).shape
        (torch.Size([8, 3, 49, 49]), torch.Size([24, 49, 49]))
    """

    place = "bias"

    def __init__(
        self,
        feat_shape: tuple[int, int],
        num_heads: int,
        num_prefix_tokens: int = 0,
        encoding: str = "relative_table",
        **options: Any,
    ):
        super().__init__(encoding, feat_shape, num_prefix_tokens, options, dim=None, num_heads=num_heads)
        if getattr(self.encoding, "value_table", None) is not None:
            raise ValueError(f"{encoding} with vectors of values is more than a bias: RelPosBias takes it without")

    @property
    def relative_position_index(self) -> Tensor:
        """Return the row of the table for each pair, (N, N) int64, of encodings that have one."""
        return self.encoding.relative_position_index

    def get_bias(
        self, positions: Positions | None = None, content: Tensor | None = None
    ) -> Float[Tensor, "batch heads t t"]:
        """Return the bias, (1, heads, T, T) with T = prefix + N, as timm's `get_bias`; float32 or better.

        Args:
            positions: of other tokens than the whole grid.
            content: the queries (B, heads, T, head_dim) that some encodings depend on (`decomposed`, `irpe`, `shaw`);
                the bias then is (B, heads, T, T).
        """
        positions = self.positions if positions is None else positions
        bias = self.encoding.bias(positions, **({} if content is None else {"content": content}))
        return bias if bias.ndim == 4 else bias.unsqueeze(0)

    def as_attn_mask(self, batch: int, positions: Positions | None = None) -> Float[Tensor, "samples t t"]:
        """Return the bias as the `attn_mask` of `nn.MultiheadAttention` for `batch` samples: (batch * heads, T, T).

        It is in float32 or better, and attention in another dtype wants it in its own: `.to(queries.dtype)`.
        """
        bias = self.get_bias(positions)
        return bias.expand(batch, -1, -1, -1).flatten(0, 1)

    def forward(
        self, attn: Float[Tensor, "b heads t t"], positions: Positions | None = None, content: Tensor | None = None
    ) -> Float[Tensor, "b heads t t"]:
        """Return scaled logits attn (B, heads, T, T) plus the bias, in their dtype.

        Raises:
            ValueError: another number of heads or tokens.
        """
        positions = self.positions if positions is None else positions
        return self.encoding(attn, positions, **({} if content is None else {"content": content}))


class Rope2d(PositionLayer):
    """Rotate queries and keys by angles of their position: by default axial RoPE, half of the pairs for each axis.

    Args:
        feat_shape: (H, W) of the patch grid.
        num_heads: attention heads.
        head_dim: channels of a head, a multiple of 4 in most encodings.
        num_prefix_tokens: class and register tokens in front, which are not rotated.
        encoding: the name of a rotary encoding.
        options: of the encoding, such as temperature. Another grid than `feat_shape` gets what the paper does, or what
            `scaling` asks for: "interpolate", "run_on", "ntk" ...

    Raises:
        ValueError: an encoding of another place, or a wrong option.

    Example:
        >>> layer = vp.layers.Rope2d((2, 3), num_heads=2, head_dim=8, temperature=100.0)
        >>> q, k = layer(torch.randn(5, 2, 6, 8), torch.randn(5, 2, 6, 8))
        >>> q.shape, layer.get_embed().shape
        (torch.Size([5, 2, 6, 8]), torch.Size([1, 6, 4]))
    """

    place = "rotary"

    def __init__(
        self,
        feat_shape: tuple[int, int],
        num_heads: int,
        head_dim: int,
        num_prefix_tokens: int = 0,
        encoding: str = "rope_axial",
        **options: Any,
    ):
        facts = {"dim": num_heads * head_dim, "num_heads": num_heads, "head_dim": head_dim}
        super().__init__(encoding, feat_shape, num_prefix_tokens, options, **facts)

    def get_embed(self, positions: Positions | None = None) -> Float[Tensor, "*batch heads t pairs"]:
        """Return the angles in radians, ([B,] heads or 1, prefix + N, head_dim / 2), for `vp.apply_rotary`.

        Raises:
            ValueError: the encoding does more than turn pairs of channels by angles: call the layer.
        """
        encoding = self.encoding
        positions = encoding.promote(self.positions if positions is None else positions)
        if not encoding.turns_by_angles(positions):
            raise ValueError(
                f"{encoding.name} does more here than turn by angles, which is all that get_embed() returns"
            )
        with full_precision(positions):
            return encoding.token_angles(positions).to(positions.coords.dtype)

    def forward(
        self, q: Float[Tensor, "b heads t d"], k: Float[Tensor, "b heads t d"], positions: Positions | None = None
    ) -> tuple[Float[Tensor, "b heads t e"], Float[Tensor, "b heads t e"]]:
        """Return q and k (B, heads, prefix + N, head_dim), rotated, in their own dtype; by `pope` twice as wide.

        Raises:
            ValueError: another number of tokens, heads or channels.
        """
        return self.encoding(q, k, self.positions if positions is None else positions)


class PosConv(PositionLayer):
    """Mix neighbouring tokens, x + conv(x): by default PEG's depthwise convolution (Chu et al. 2021).

    Args:
        feat_shape: (H, W) of the patch grid.
        dim: channels of a token.
        num_prefix_tokens: class and register tokens in front, which are left alone.
        encoding: the name of a conditional encoding.
        options: of the encoding, such as kernel_size.

    Example:
        >>> layer = vp.layers.PosConv((2, 3), dim=8)
        >>> layer(torch.randn(5, 6, 8)).shape
        torch.Size([5, 6, 8])
    """

    place = "conditional"

    def __init__(
        self, feat_shape: tuple[int, int], dim: int, num_prefix_tokens: int = 0, encoding: str = "peg", **options: Any
    ):
        super().__init__(encoding, feat_shape, num_prefix_tokens, options, dim=dim)

    def forward(self, x: Float[Tensor, "b t dim"], positions: Positions | None = None) -> Float[Tensor, "b t dim"]:
        """Return x (B, prefix + N, dim) with its patch tokens mixed, in x's dtype."""
        return self.encoding(x, self.positions if positions is None else positions)
