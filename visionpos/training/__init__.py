"""The machinery behind the training scripts, importable after `pip install visionpos[train]`.

Rooms, from the ground up: `data`, `config`, `run`, `sweeps`, `reports`, each importing only those before it; under them
all lie `errors` and `files`. The scripts of `train/` stand on top, and nothing here imports one.
"""
