"""Many runs: the sweep file, the plan of its runs, and the choice of settings by trials.

`train.sweep` works a plan off.
"""
