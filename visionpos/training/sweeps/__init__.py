"""Many runs: the sweep file, the plan of its runs, the choice of settings by trials, and the worker that does them.

`train.sweep` starts a worker; a plan knows runs as directories, and no list of them is kept anywhere else.
"""
