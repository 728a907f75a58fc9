"""timm's `ConvRelPosEnc`, of CoaT, as an encoding."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from timm.models import coat
from torch import Tensor

from ..encoding import AttentionTensors
from ..places import ConditionalEncoding
from ..positions import Positions
from ..registry import register_native


@register_native
class ConvRelPosEnc(ConditionalEncoding):
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

    def no_weight_decay(self) -> set[str]:
        """Return no name: these are convolutions like any other."""
        return set()

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
