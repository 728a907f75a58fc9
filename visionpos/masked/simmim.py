"""SimMIM for Swin, whose windows cannot drop tokens: a mask token replaces hidden patches, every token is kept.

Xie et al., SimMIM: A Simple Framework for Masked Image Modeling, 2021, arXiv 2111.09886.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..hosts.host import find_host
from ..hosts.swin import EncodedSwinMixin
from .masks import Mask
from .model import MaskedImageModel


class SimMIM(MaskedImageModel):
    """Hide patches behind a mask token, encode all tokens, predict the pixels of the hidden patches by one layer.

    loss = mean over hidden patches and their pixels of |prediction - pixel|. What is hidden and predicted as one is
    what one token of the last stage stands for: patch size times 2 for each merging, 32 pixels for Swin at 224.
    `simmim.encoder` is the model that was given, a converted timm model, ready to fine-tune.

    Args:
        encoder: a timm Swin or Swin v2, converted by `set_encoding`, or else with its own positions.
        mask_ratio: share of the patches that are hidden, 0 to 0.95; the paper's is 0.6.
        norm_pix_loss: predict pixels normalised patch by patch; the paper predicts pixels.
        masking: "random", "block" or "grid", see `draw_mask`.

    Raises:
        ValueError: an encoder of another family, or a ratio or masking out of range.

    Example:
        >>> options = {"img_size": (32, 48), "patch_size": 2, "window_size": 4, "depths": (1, 1), "num_heads": (2, 4)}
        >>> swin = vp.create_model("swin_tiny_patch4_window7_224", embed_dim=32, **options)
        >>> result = vp.SimMIM(swin, mask_ratio=0.5)(torch.randn(2, 3, 32, 48))  # units of 4 x 4 pixels
        >>> result.prediction.shape, result.mask.hidden.sum(dim=1).tolist()
        (torch.Size([2, 96, 48]), [48, 48])
    """

    def __init__(
        self, encoder: nn.Module, mask_ratio: float = 0.6, norm_pix_loss: bool = False, masking: str = "random"
    ):
        find_host(encoder).convert(encoder)
        if not isinstance(encoder, EncodedSwinMixin):
            raise ValueError(
                f"SimMIM takes a Swin or Swin v2, not {type(encoder).__name__}; for ViT-like models there is "
                "MaskedAutoencoder"
            )
        merged = 2 ** (encoder.num_layers - 1)
        patch_size = tuple(side * merged for side in encoder.patch_embed.patch_size)
        super().__init__(encoder, patch_size, mask_ratio, norm_pix_loss, masking)
        self.mask_token = nn.Parameter(torch.zeros(encoder.embed_dim))
        self.pred = nn.Linear(encoder.num_features, self.patch_dim)
        nn.init.trunc_normal_(self.mask_token, std=0.02)

    def predict(self, images: Tensor, mask: Mask) -> Tensor:
        """Return the prediction for every patch, from the visible ones."""
        x = self.encoder.patch_embed(images)  # (B, H, W, C); input encodings are added after it
        hidden = mask.hidden.unflatten(1, self.feat_shape(images))
        for axis in (1, 2):
            hidden = hidden.repeat_interleave(x.shape[axis] // hidden.shape[axis], dim=axis)
        x = torch.where(hidden.unsqueeze(-1), self.mask_token.to(x.dtype), x)
        x = self.encoder.norm(self.encoder.layers(x))
        return self.pred(x.flatten(1, 2))

    def error(self, difference: Tensor) -> Tensor:
        """Return the absolute values of differences, elementwise."""
        return difference.abs()

    def set_input_size(self, img_size: tuple[int, int]) -> None:
        """Work on images of another size from now on."""
        self.encoder.set_input_size(img_size=img_size)

    def no_weight_decay(self) -> set[str]:
        """Return the names that the encoder names, and the mask token."""
        return super().no_weight_decay() | {"mask_token"}
