"""Finished runs side by side: collected, with intervals over seeds and pictures, and drawn.

`train.report` writes the pages.
"""
