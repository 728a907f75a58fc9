"""Finished runs side by side: collected, summarised with intervals over seeds and pictures, drawn, put into words.

`train.report` calls these in turn. Nothing here trains; all is read from run directories.
"""
