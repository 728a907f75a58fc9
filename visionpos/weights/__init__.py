"""Weights of converted models: reading those of other origins, and saving an encoding with its options.

`visionpos.load_weights` is for users; the rest serves `convert` and `timm_models`.
"""
