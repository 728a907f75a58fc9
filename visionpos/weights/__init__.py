"""Weights of converted models: reading their own and those of other origins.

`visionpos.load_weights` is for users; the rest serves `masked` and `timm_models`.
"""
