"""Masked autoencoders around any ViT-like host, with any encoding.

He et al., Masked Autoencoders Are Scalable Vision Learners, 2021, arXiv 2111.06377.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ..convert import get_encoding, set_encoding
from ..hosts.host import find_host
from ..hosts.isotropic import IsotropicMixin
from ..input.learned import Learned
from ..input.sincos2d import SinCos2D
from ..positions import Positions
from ..registry import Spec
from ..weights.formats import rename_foreign
from ..weights.load import load_converted
from ..weights.read import read_weights
from .decoder import MaskedDecoder
from .masks import Mask
from .model import MaskedImageModel


class MaskedAutoencoder(MaskedImageModel):
    """Hide most patches, encode the visible ones with their own coordinates, predict the pixels of the hidden ones.

    loss = mean over hidden patches and their pixels of (prediction - pixel)^2, pixels normalised patch by patch if
    `norm_pix_loss`. `mae.encoder` is the model that was given, a converted timm model, ready to fine-tune and to save
    under timm's names.

    Args:
        encoder: a timm model of a family whose blocks see all patches at once: ViT, DeiT, EVA, BEiT, CaiT, the
            relative position ViT; converted by `set_encoding`, or else with its own positions.
        decoder_dim: channels of the decoder.
        decoder_depth: its blocks.
        decoder_num_heads: its attention heads.
        mask_ratio: share of the patches that are hidden, 0 to 0.95.
        decoder_encoding: the decoder's own encoding; it needs one, since mask tokens are all alike.
        norm_pix_loss: predict pixels normalised patch by patch.
        masking: "random", "block" or "grid", see `draw_mask`.

    Raises:
        ValueError: an encoder of another family or with patch dropout, a ratio or masking out of range, a decoder of
            no width, an unknown encoding.

    Example:
        >>> vit = vp.create_model("vit_tiny_patch16_224", encoding="rope_axial", img_size=(32, 48), depth=1)
        >>> mae = vp.MaskedAutoencoder(vit, decoder_dim=32, decoder_depth=1, decoder_num_heads=2, mask_ratio=0.5)
        >>> result = mae(torch.randn(2, 3, 32, 48))  # of 2 x 3 patches, 16 x 16 pixels of 3 channels each
        >>> result.prediction.shape, result.mask.hidden.sum(dim=1).tolist()
        (torch.Size([2, 6, 768]), [3, 3])
    """

    def __init__(
        self,
        encoder: nn.Module,
        decoder_dim: int = 128,
        decoder_depth: int = 4,
        decoder_num_heads: int = 4,
        mask_ratio: float = 0.75,
        decoder_encoding: Spec = "sincos2d",
        norm_pix_loss: bool = True,
        masking: str = "random",
    ):
        find_host(encoder).convert(encoder)
        if not isinstance(encoder, IsotropicMixin):
            raise ValueError(
                f"MaskedAutoencoder takes an encoder that can run on a subset of its patches (ViT, DeiT, EVA, BEiT, "
                f"CaiT, the relative position ViT), not {type(encoder).__name__}; for Swin there is SimMIM"
            )
        if getattr(getattr(encoder, "patch_drop", None), "prob", 0.0) > 0:
            raise ValueError("MaskedAutoencoder hides patches itself: build the encoder with patch_drop_rate=0")
        super().__init__(encoder, encoder.patch_embed.patch_size, mask_ratio, norm_pix_loss, masking)
        self.decoder = MaskedDecoder(
            encoder.embed_dim,
            self.patch_dim,
            decoder_dim,
            decoder_depth,
            decoder_num_heads,
            tuple(encoder.patch_embed.grid_size),
            encoder.num_prefix_tokens,
        )
        set_encoding(self.decoder, decoder_encoding)

    def encode(self, images: Float[Tensor, "b c h w"], keep: Tensor) -> Float[Tensor, "b t dim"]:
        """Return the encoder's features of the visible patches, (B, prefix + K, C), normalised.

        Where the model normalises after pooling (timm's `fc_norm`), each token gets that norm.
        """
        tokens = self.encoder.forward_kept(images, keep)
        return self.encoder.fc_norm(tokens) if isinstance(getattr(self.encoder, "norm", None), nn.Identity) else tokens

    def predict(self, images: Tensor, mask: Mask) -> Tensor:
        """Return the decoder's prediction for every patch, from the visible ones."""
        return self.decoder(self.encode(images, mask.keep), mask.restore, self.feat_shape(images))

    def error(self, difference: Tensor) -> Tensor:
        """Return the squares of differences, elementwise."""
        return difference.square()

    def set_input_size(self, img_size: tuple[int, int]) -> None:
        """Work on images of another size from now on; learned tables of encoder and decoder are resized."""
        self.encoder.set_input_size(img_size=img_size)
        self.decoder.set_feat_shape(tuple(self.encoder.patch_embed.grid_size))

    def no_weight_decay(self) -> set[str]:
        """Return the names that the encoder and the decoder name."""
        return super().no_weight_decay() | {f"decoder.{name}" for name in self.decoder.no_weight_decay()}

    def original_state_dict(self) -> dict[str, Tensor]:
        """Return the weights in the format of the paper's code: one flat model, its position tables written out.

        Raises:
            ValueError: encodings that the format has no place for: it knows `sincos2d` and `learned` alone.
        """
        ours = self.state_dict()
        weights = {name: ours[key] for key, name in self._original_names().items()}
        return {**self._computed_tables(), **weights}

    def load_original_state_dict(self, weights: str | Path | Mapping[str, Any]) -> None:
        """Load weights in the format of the paper's code or of Hugging Face's ViTMAE; the classifier stays as it is.

        Args:
            weights: of encoder and decoder; a file, a directory or a state dict, as `load_weights` takes them.

        Raises:
            ValueError: missing or unknown tensors, another shape, or a position table that is not what the encoding
                computes; nothing is loaded then.
        """
        weights = dict(rename_foreign(read_weights(weights)))
        for name, table in self._computed_tables().items():
            given = weights.pop(name, None)
            if given is None or given.shape != table.shape or not torch.allclose(given.to(table), table, atol=1e-5):
                height, width = self.decoder.patch_embed.grid_size
                raise ValueError(
                    f"{name} must be what sincos2d computes for the grid {height} x {width}, {tuple(table.shape)}; "
                    f"the weights have {'none' if given is None else f'{tuple(given.shape)} with other values'}"
                )
        names = {name: key for key, name in self._original_names().items()}
        classifier = {key: value for key, value in self.state_dict().items() if key.startswith("encoder.head")}
        load_converted(self, {**classifier, **{names.get(name, name): value for name, value in weights.items()}})

    def _original_names(self) -> dict[str, str]:
        """Return this model's names -> those of the paper's code, which has nothing for the classifier."""
        norm = "fc_norm." if isinstance(getattr(self.encoder, "norm", None), nn.Identity) else "norm."  # see `encode`
        names = {}
        for key in self.encoder.state_dict():
            if not key.startswith("head"):
                names[f"encoder.{key}"] = f"norm.{key.removeprefix(norm)}" if key.startswith(norm) else key
        for key in self.decoder.state_dict():
            first, dot, rest = key.partition(".")
            names[f"decoder.{key}"] = ORIGINAL_NAMES[first] + dot + rest
        return names

    def _computed_tables(self) -> dict[str, Tensor]:
        """Return the position tables of encoder and decoder that are no parameters, under the paper's names."""
        tables = {"pos_embed": computed_table(self.encoder), "decoder_pos_embed": computed_table(self.decoder)}
        return {name: table for name, table in tables.items() if table is not None}


ORIGINAL_NAMES = {  # of the decoder -> of the paper's code
    "pos_embed": "decoder_pos_embed",
    "embed_tokens": "decoder_embed",
    "mask_token": "mask_token",
    "blocks": "decoder_blocks",
    "norm": "decoder_norm",
    "pred": "decoder_pred",
}


def computed_table(model: nn.Module) -> Tensor | None:
    """Return the table of a model's `sincos2d` as the paper's code stores it: zeros for prefix tokens.

    Returns:
        None for a model with `learned`, which has its table as a parameter.

    Raises:
        ValueError: the model has other encodings than one of these two.
    """
    encodings = get_encoding(model)
    if len(encodings) != 1 or not isinstance(encodings[0], (SinCos2D, Learned)):
        found = ", ".join(encoding.name for encoding in encodings) or "none"
        raise ValueError(f"the original format of MAE has one table, sincos2d or learned; this model has: {found}")
    if isinstance(encodings[0], Learned):
        return None
    reference = next(model.parameters())
    positions = Positions.grid(model.patch_embed.grid_size, model.num_prefix_tokens, device=reference.device)
    return encodings[0](reference.new_zeros(1, positions.num_tokens, model.embed_dim), positions)
