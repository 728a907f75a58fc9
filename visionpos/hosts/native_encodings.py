"""Parts of timm's models that no encoding here is the same function as, kept as they are: the encodings of one family.

Specs know their names, so that a model keeps them, and no other model can have one.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from timm.models import coat
from timm.models.convit import GPSA
from timm.models.swin_transformer_v2_cr import WindowMultiHeadAttention
from torch import Tensor

from ..encoding import AttentionTensors
from ..places import BiasEncoding, ConditionalEncoding
from ..positions import Positions
from ..registry import register_native


class Decayed:
    """Mixin for an encoding whose parameters timm lets decay like any others."""

    def no_weight_decay(self) -> set[str]:
        """Return no name."""
        return set()


@register_native
class MetaNetwork(Decayed, BiasEncoding):
    """The network of a Swin v2-CR, kept as the host's own: b = MLP(g), g = sign(delta) log(1 + |delta|) on each axis.

    delta = query minus key, in grid steps. While training, some hidden channels of each pair are dropped.

    Args:
        host: timm's attention, whose network, under the name `meta_mlp`, is used.

    Attributes:
        meta_mlp: timm's Mlp, 2 -> hidden -> heads.
    """

    paper = "Liu et al. 2021, arXiv 2111.09883"
    name = "meta_mlp"
    learnable = True
    translation_invariant = True
    extrapolation = "formula"

    def __init__(self, host: WindowMultiHeadAttention):
        super().__init__(host.num_heads)
        self.meta_mlp = host.meta_mlp

    def encode(self, queries: Positions, keys: Positions) -> Tensor:
        delta = queries.coords[..., :, None, :] - keys.coords[..., None, :, :]  # (N, N, 2)
        g = delta.sign() * torch.log(1.0 + delta.abs())
        bias = self.meta_mlp(g.flatten(0, -2).to(self.meta_mlp.fc1.weight.dtype))  # (N N, heads)
        return bias.unflatten(0, delta.shape[:-1]).movedim(-1, -3)  # (heads, N, N)


@register_native
class GatedPositions(Decayed, BiasEncoding):
    """ConViT's positional attention, kept as the host's own: it is blended with that of the content, after the softmax.

    A = (1 - s) softmax(q k^T / sqrt(head_dim)) + s softmax(w (x, y, x^2 + y^2) + c), s = sigmoid(g), for each head;
    (y, x) = key minus query, in grid steps.

    Args:
        host: timm's attention, whose parameters are used.

    Attributes:
        pos_proj: w and c, Linear(3, heads).
        gating_param: g, (heads,).
    """

    paper = "d'Ascoli et al. 2021, arXiv 2103.10697"
    name = "GPSA"
    learnable = True
    translation_invariant = True

    def __init__(self, host: GPSA):
        super().__init__(host.num_heads)
        self.pos_proj, self.gating_param = host.pos_proj, host.gating_param

    def encode(self, queries: Positions, keys: Positions) -> Tensor:
        delta = keys.coords[..., None, :, :] - queries.coords[..., :, None, :]  # ([B,] N, N, 2)
        offsets = torch.cat([delta.flip(-1), delta.square().sum(-1, keepdim=True)], dim=-1)
        return self.pos_proj(offsets.to(self.pos_proj.weight.dtype)).movedim(-1, -3)  # ([B,] heads, N, N)

    def modify_attention(self, tensors: object, prepared: Tensor) -> None:
        """Do nothing: the layer blends the softmax of these logits in."""

    def blend(self, probabilities: Tensor, logits: Tensor) -> Tensor:
        """Return the attention (B, heads, N, N) of both, each row divided by its sum, as in timm."""
        gate = self.gating_param.view(-1, 1, 1).sigmoid()  # (heads, 1, 1)
        both = (1.0 - gate) * probabilities + gate * logits.softmax(dim=-1)
        return both / both.sum(dim=-1, keepdim=True)


@register_native
class ConvRelPosEnc(Decayed, ConditionalEncoding):
    """CoaT's convolutional relative encoding, kept as the host's own: attention returns q conv(v) besides.

    The product is channel by channel, and the convolution depthwise, with another kernel size for some heads. Prefix
    tokens get nothing.

    Args:
        host: timm's module, whose convolutions, under the name `conv_list`, are used.

    Attributes:
        conv_list: for some heads each, a depthwise Conv2d.
    """

    paper = "Xu et al. 2021, arXiv 2104.06399"
    name = "ConvRelPosEnc"
    site = "values"

    def __init__(self, host: coat.ConvRelPosEnc):
        super().__init__(sum(host.channel_splits))
        self.channel_splits, self.conv_list = tuple(host.channel_splits), host.conv_list

    def mixed(self, q: Tensor, v: Tensor, positions: Positions) -> Tensor:
        """Return what is added to the output of attention, (B, heads, prefix + N, head_dim), from q and v like it."""
        prefix = positions.num_prefix_tokens
        maps = v[:, :, prefix:].mT.flatten(1, 2).unflatten(2, positions.feat_shape)  # (B, heads * head_dim, H, W)
        parts = zip(self.conv_list, maps.split(self.channel_splits, dim=1), strict=True)
        maps = torch.cat([conv(part) for conv, part in parts], dim=1)  # (B, heads * head_dim, H, W)
        return F.pad(q[:, :, prefix:] * maps.flatten(2).unflatten(1, (q.shape[1], -1)).mT, (0, 0, prefix, 0))

    def modify_attention(self, tensors: AttentionTensors, prepared: Positions) -> None:
        """Add to the output of an attention layer."""
        added = self.mixed(tensors.q, tensors.v, prepared)
        tensors.output = added if tensors.output is None else tensors.output + added
