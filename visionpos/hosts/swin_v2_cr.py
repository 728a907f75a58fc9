"""timm's Swin Transformer V2 of Christoph Reich as host: what Swin v1's host does, with cosine attention.

Its network of log-spaced offsets has one hidden layer, part of which is dropped while training, for each pair anew.
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch.nn.functional as F
from timm.layers import use_fused_attn
from timm.models import swin_transformer_v2_cr as timms
from torch import Tensor, nn

from ..encoding import OneNode
from ..rotary.split import split_qkv
from .attention import encoded
from .grids import AddPositionsToMap
from .host import register_host
from .native_encodings import MetaNetwork
from .parameters import bind_parameters
from .shifted_windows import EncodedGridBlock
from .swin import EncodedSwinMixin, SwinHost
from .swin_v2 import hide_by_temperature
from .window_attention import attend_windows, prepare_windows, takes_fused_path


class EncodedAttention(OneNode, timms.WindowMultiHeadAttention):
    """Cosine attention in windows x (B * windows, N, C) with encodings; these get q and k of length 1."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return tokens (B * windows, N, C); `mask` (windows, N, N) is Swin's shift mask, added to the logits."""
        q, k, v = split_qkv(self.qkv(x).unflatten(-1, (3, self.num_heads, -1)))
        tensors = encoded(x, F.normalize(q, dim=-1), F.normalize(k, dim=-1), v, prepare_windows(self, x))
        tau = self.logit_scale.view(-1, 1, 1).clamp(max=math.log(1.0 / 0.01)).exp()  # (heads, 1, 1)
        hide_by_temperature(tensors, mask, tau)
        return attend_windows(self, tensors, takes_fused_path(self, x), tau)

    def set_window_size(self, window_size: tuple[int, int]) -> None:
        """Work on another window from now on; tables are resized."""
        self.window_size = tuple(window_size)
        for encoding in self.encodings:
            encoding.set_feat_shape(self.window_size)

    def _init_buffers(self) -> None:
        """Do nothing: the encodings compute their own buffers."""


class _Block(timms.SwinTransformerV2CrBlock):
    _attn = timms.SwinTransformerV2CrBlock._shifted_window_attn  # by the name that it has in other Swins

    @property
    def input_resolution(self) -> tuple[int, int]:
        return self.feat_size


class EncodedBlock(EncodedGridBlock, _Block):
    """A block of a converted Swin v2-CR."""

    def _shifted_window_attn(self, x: Tensor) -> Tensor:
        return self._attn(x)


class EncodedPatchEmbed(AddPositionsToMap, timms.PatchEmbed):
    """The patches, to whose map input encodings are added."""


class EncodedSwinV2Cr(EncodedSwinMixin, timms.SwinTransformerV2Cr):
    """A Swin v2-CR whose positions are encodings of this package."""


class SwinV2CrHost(SwinHost):
    """The family of Swin v2-CR."""

    name = "SwinTransformerV2Cr (Swin v2-CR)"
    channels_last_features = False
    models: ClassVar = {timms.SwinTransformerV2Cr: EncodedSwinV2Cr}
    parts: ClassVar = {
        timms.SwinTransformerV2CrBlock: EncodedBlock,
        timms.WindowMultiHeadAttention: EncodedAttention,
        timms.PatchEmbed: EncodedPatchEmbed,
    }
    input_part = "patch_embed"
    native = MetaNetwork

    def stages(self, model: timms.SwinTransformerV2Cr) -> list[list[nn.Module]]:
        return [list(stage.blocks) for stage in model.stages]

    def adopt_table(self, attn: nn.Module) -> MetaNetwork:
        attn.fused_attn = use_fused_attn(experimental=True)
        del attn._buffers["relative_coordinates_log"]
        own = MetaNetwork(attn)
        bind_parameters(own, attn)
        return own


HOST = register_host(SwinV2CrHost())
