"""Small masked autoencoders, pictures and masks."""

import torch

import visionpos as vp

SIZE, OTHER = (16, 24), (24, 32)


def vit(spec="sincos2d", **options):
    torch.manual_seed(0)
    shape = {"img_size": SIZE, "patch_size": 4, "embed_dim": 48, "depth": 2, "num_heads": 3, "num_classes": 5}
    return vp.create_model("vit_tiny_patch16_224", encoding=spec, **{**shape, **options})


def autoencoder(encoder=None, decoder_encoding="sincos2d", **options):
    encoder = vit() if encoder is None else encoder
    options = {"decoder_dim": 32, "decoder_depth": 1, "decoder_num_heads": 2, **options}
    return vp.MaskedAutoencoder(encoder, decoder_encoding=decoder_encoding, **options)


def pictures(size=SIZE, batch=2, seed=1):
    return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(seed))


def drawn(mae, images, seed=2):
    return mae.draw_mask(images, torch.Generator().manual_seed(seed))
