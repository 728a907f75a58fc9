"""The machinery behind the training scripts, importable after `pip install visionpos[train]`.

Rooms, from the ground up: `data`, `config`, `run`, `sweeps`, `reports`.
"""
