"""The configuration of a run: what can be set and what is accepted, and the command line that reads it.

Scripts and sweeps build configurations here; nothing here trains.
"""
