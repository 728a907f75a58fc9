"""One run from a configuration to a result: source, model, objective, trainer, checkpoints, run directory.

The scripts in `train/` start runs, and sweeps start many.
"""
