"""What a run can be told: its configuration with the accepted values, and the command line that reads it.

Scripts and sweeps build configurations here; nothing here trains.
"""
