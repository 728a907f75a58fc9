"""Small masked autoencoders, pictures and masks."""

import torch

import visionpos as vp
from tests import small

SIZE, OTHER = (16, 24), (24, 32)


def vit(spec="sincos2d", **options):
    return small.vit(spec, **{"img_size": SIZE, **options})


def autoencoder(encoder=None, decoder_encoding="sincos2d", **options):
    encoder = vit() if encoder is None else encoder
    options = {"decoder_dim": 32, "decoder_depth": 1, "decoder_num_heads": 2, **options}
    return vp.MaskedAutoencoder(encoder, decoder_encoding=decoder_encoding, **options)


def drawn(mae, images, seed=2):
    return mae.draw_mask(images, torch.Generator().manual_seed(seed))
