"""Masked image models around any host: MAE, which encodes the visible patches alone, and SimMIM, which encodes all.

Masks, decoder and models live here; `visionpos.MaskedAutoencoder`, `SimMIM` and `draw_mask` are for users.
"""
